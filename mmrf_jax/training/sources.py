"""What a run learns from and is evaluated on, wherever it comes from, and reading logs that are too long for memory.

`simulator_source` collects it in the world or in a feedback model, `log_source` opens KuaiRand or your own log, and
`restore.source_of` chooses between them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import chex
import numpy as np

from mmrf_jax import types
from mmrf_jax.data import stream
from mmrf_jax.data.device_log import DeviceLog
from mmrf_jax.data.readers import feedback_log, feedback_sessions
from mmrf_jax.data.session_log import InputSpec, Sessions
from mmrf_jax.envs import rankers
from mmrf_jax.envs.environment import Environment
from mmrf_jax.io.progress import Counter, say
from mmrf_jax.parallel import multihost
from mmrf_jax.parallel.partitioner import Partitioner
from mmrf_jax.training import configs

_LARGE = 2**20  # sessions; longer logs are streamed


@dataclasses.dataclass
class Source:
    """The data that a run learns from and is evaluated on.

    Attributes:
      train: makes the training log; called only if training is left to do.
      test: makes {name: held-out log}; called only for the final evaluation.
      valid: makes the log of the validation days; None if there is none.
      blocks: opens the training log for streaming; gives None if `train` is to be called instead. When streaming,
        `train`, `valid` and `test` give logs of at most about 2^20 sessions, in evenly spread blocks.
      sim: the environment that policies run in: the world, or a learned feedback model; None if there are only logs.
      policies: arms of `sim` that need no training; the first one collected its logs.
      truth: (parameters of `sim`, state, slot = 0) -> expected feedback [B, C, S] of the candidates shown in the slot,
        and log1p seconds [B, C]; None if the truth is unknown.
      collect: (policy, round) -> the log of a later round, served by the policy; None if there are only logs.
      collect_on_devices: (policy, round, partitioner, discount) -> the same log, which stays on the devices; None if
        there are only logs.
      train_on_devices: (partitioner, discount) -> the training log that is collected so; None if it is given.
      choose: wraps a collecting policy (the first one or the run's own) as a choice between these two, so that all
        collections share one program.
      video_ids: makes the platform's ids [V] of the videos; None if these are the row numbers.
      users: ids and features of the users, if the source knows them: {"user_id": [U], "profile": [U, Du]}.
      unknown_video: row of any other video; None if there is none.
      names: encoders of features by name (`data.named_features`), {"item", "profile", "context": encoders}, where the
        source knows them; the context's without the position.
      vocabularies: {"author", "tag": the platform's ids [n] of rows 1, 2, …, in order}; None if these are the rows.
    """

    config: configs.Run
    spec: InputSpec
    items: types.Items
    train: Callable[[], Sessions]
    test: Callable[[], dict[str, Sessions]]
    valid: Callable[[], Sessions] | None = None
    blocks: Callable[[], stream.Blocks | None] = lambda: None
    report: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sim: Environment | None = None
    policies: Mapping[str, rankers.PrivilegedPolicy | rankers.Ranker] = dataclasses.field(default_factory=dict)
    truth: Callable[..., tuple[chex.Array, chex.Array]] | None = None
    collect: Callable[[rankers.AnyRanker, int], Sessions] | None = None
    collect_on_devices: Callable[[rankers.AnyRanker, int, Partitioner, float], DeviceLog] | None = None
    train_on_devices: Callable[[Partitioner, float], DeviceLog] | None = None
    choose: Callable[[rankers.AnyRanker], rankers.AnyRanker] = lambda policy: policy
    video_ids: Callable[[], np.ndarray] | None = None
    users: dict[str, np.ndarray] | None = None
    unknown_video: int | None = None
    names: dict[str, Any] | None = None
    vocabularies: dict[str, np.ndarray] | None = None

    def local(self) -> Source:
        """Return the source with its items on this process's devices only."""
        return dataclasses.replace(self, items=multihost.to_local(self.items))


def read_served_log(
    folder: Path, spec: InputSpec, video_ids: np.ndarray, progress: Counter, user_ids: np.ndarray | None = None
) -> Sessions:
    """Read the feedback log of a ranking service as sessions.

    Args:
      folder: the log.
      spec: of the sessions.
      video_ids: [V] the service's ids of the videos.
      progress: as of `feedback_sessions.read`.
      user_ids: [U] the service's ids of the users; None if `user_id` is the id.
    """
    log, report = feedback_sessions.read(folder, spec, feedback_log.rows_by_id(video_ids), progress, user_ids)
    say(f"input: {json.dumps(report)}")
    return log


def streamed(config: configs.Run, blocks: stream.Blocks) -> stream.Blocks | None:
    """Return the blocks if `config.data.stream` or the size of their log says to stream it; otherwise None."""
    large = int(blocks.sessions.sum(dtype=np.int64)) > _LARGE
    wanted = config.data.stream
    return blocks if (large if wanted is None else wanted) else None


def read_held(config: configs.Run, blocks: stream.Blocks, name: str) -> Sessions:
    """Load a log into memory; of a log to be streamed, only about 2^20 sessions in evenly spread blocks."""
    chosen = np.arange(len(blocks.sessions))
    if streamed(config, blocks) is not None:
        chosen = stream.spread_blocks(blocks, _LARGE)
    if len(chosen) < len(blocks.sessions):
        held, total = (int(number.sum(dtype=np.int64)) for number in (blocks.sessions[chosen], blocks.sessions))
        say(f"input: of the {name} log, {held:,} of {total:,} sessions are what is read whole: blocks spread evenly")
    return blocks.read(chosen)
