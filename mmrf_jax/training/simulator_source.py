"""Logs collected in a simulator: the world, or a learned feedback model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mmrf_jax import types
from mmrf_jax.data import records, stream
from mmrf_jax.data.device_log import DeviceLog
from mmrf_jax.data.readers import feedback_log
from mmrf_jax.data.session_log import InputSpec, Sessions
from mmrf_jax.envs import collect, device_collection, rankers
from mmrf_jax.envs.environment import Environment
from mmrf_jax.envs.short_video import env, parameters, reference_policies
from mmrf_jax.envs.short_video.truth import expected_feedback
from mmrf_jax.io import files
from mmrf_jax.io.progress import Counter
from mmrf_jax.parallel import multihost
from mmrf_jax.parallel.partitioner import Partitioner
from mmrf_jax.training import config_sections, configs, sources
from mmrf_jax.training.sources import Source

#: First user ids of the logs, far from each other and from the A/B tests, which start at 0.
_TRAIN_USERS, _TEST_USERS = 100_000_000, 200_000_000
_SAMPLE = 2**14  # sessions of the first log that the host collects too, if the log itself stays on the devices
_USERS_A_SEED, _SEEDS_APART = 1_000_000, 100  # seeds this far apart share user ids but not randomness: the key differs

#: The world's arms that read its hidden state, and the names of all its arms that need no training.
world_policies = reference_policies.policies
WORLD_ARMS = (*world_policies(), "oracle_observable")


def world_spec(sim: Environment, config: parameters.WorldConfig) -> InputSpec:
    return InputSpec(
        num_videos=sim.items.num_videos,
        num_authors=sim.items.num_authors,
        num_tags=sim.items.num_tags,
        num_users=0,
        item_features=sim.items.features.shape[1],
        profile=parameters.PROFILE,
        context=parameters.CONTEXT + (sim.default_params.random_share is not None),
        candidates=config.candidates,
        slate=config.slate,
        history=config.history,
        signals=sim.signals,
    )


def world_origin(config: configs.Run) -> dict[str, Any]:
    """Return the fields that identify a log's world, without `variant`: shifted worlds may be tested on its logs."""
    assert config.world is not None
    return {name: value for name, value in dataclasses.asdict(config.world).items() if name != "variant"}


def check_days(config: configs.Run, days: int) -> None:
    """Refuse days of a long-running test that the config's simulator does not have.

    Raises:
      ValueError: naming the available days.
    """
    if config.simulator != "world":
        raise ValueError(
            f"logs of single sessions do not say when users come back, so config.simulator={config.simulator!r} has no "
            f"{days} days; use --config.simulator=world"
        )
    first, last = config.ab_test.day, config.ab_test.day + days - 1
    if last > parameters.LAST_DAY:
        raise ValueError(
            f"days {first} to {last} end after day {parameters.LAST_DAY}, when no new videos come; "
            f"use at most {max(parameters.LAST_DAY - first + 1, 0)} days"
        )


def log_key(seed: int) -> types.Key:
    """Return the PRNG key of the logs of a seed."""
    return jax.random.fold_in(types.make_key(seed), 11)


def collect_log(
    source: Source,
    policy: rankers.AnyRanker,
    *,
    first_user: int,
    sessions: int,
    progress: Counter,
    slots: int | None = None,
    keep_scores: bool = False,
    random_share: float | None = None,
) -> Sessions:
    """Collect a log of users that a policy serves in a source's simulator; equal seeds give equal logs.

    With several processes, each collects a part, and all receive the whole.

    Args:
      source: its simulator, and the seed of its config.
      policy: serves.
      first_user: id of the first of `sessions` users.
      sessions: of the log, one a user.
      progress: as `io.progress.counted`.
      slots: users in flight at a time; None for the default of `envs.collect`.
      keep_scores: whether the log has the policy's scores.
      random_share: as `config.collect.random_share`.
    """
    assert source.sim is not None
    first, share = multihost.share(sessions)
    sim, policy = _with_random_exposures(source.sim, policy, random_share)
    log = collect.collect(
        sim,
        policy,
        log_key(source.config.seed),
        first_user=first_user + first,
        num_sessions=share,
        day=0,
        progress=progress("collect", share),
        slots=slots,
        keep_scores=keep_scores,
    )
    return _of_all(log)


def _with_random_exposures(
    sim: Environment, policy: rankers.AnyRanker, share: float | None
) -> tuple[Environment, rankers.AnyRanker]:
    """Return the simulator and the policy that give a share of requests a random slate; unchanged for None.

    The feedback model as a simulator has the marks of its log's requests.
    """
    if share is None:
        return sim, policy
    if isinstance(sim, env.ShortVideoEnv):
        sim = sim.with_random_share(share)
    return sim, rankers.WithRandomExposures(policy)


def _of_all(log: Sessions) -> Sessions:
    """Concatenate the logs of all processes."""
    names = [f.name for f in dataclasses.fields(log) if f.name != "offsets" and getattr(log, f.name) is not None]
    *fields, lengths = multihost.gather_rows([*(getattr(log, name) for name in names), np.diff(log.offsets)])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return dataclasses.replace(log, offsets=offsets, **dict(zip(names, fields, strict=True)))


def of_world(
    config: configs.Run,
    progress: Counter,
    own: Callable[[Source], rankers.AnyRanker] | None,
    made: Environment | None = None,
) -> Source:
    """Return the world of a config, or one that is `made`, as a source; other arguments as of `restore.open_source`.

    Raises:
      FileNotFoundError: if `config.data.dir` does not exist.
    """
    assert config.world is not None
    folder = _given_folder(config)
    if folder is not None and not folder.exists():  # said before the world is made
        raise FileNotFoundError(f"{folder} does not exist; name a folder that mmrf collect or mmrf serve wrote")
    sim = env.make_world(config.world) if made is None else made
    marked = config.collect.random_share is not None
    if marked and isinstance(sim, env.ShortVideoEnv):
        sim = sim.with_random_share(0.0)  # A/B tests have no random exposures
    spec = world_spec(sim, config.world)
    source = in_simulator(Source(config, spec, sim.items, _no_log, _no_log), sim, expected_feedback, progress, own)

    def collect_test() -> Sessions:
        return _collect_users(
            source,
            source.policies["production"],
            _TEST_USERS,
            config.collect.test_sessions,
            progress,
            keep_scores=True,  # for per-video propensities
            random_share=0.0 if marked else None,  # as in training, whose program it shares
        )

    test = functools.cache(collect_test)
    source = dataclasses.replace(source, test=lambda: {"test": test()})
    if folder is None:
        return source
    return dataclasses.replace(
        source,
        train=functools.cache(functools.partial(_read_given, source, folder, progress)),
        train_on_devices=None,
        blocks=functools.partial(_given_blocks, source, folder),
    )


def _no_log() -> Any:
    raise AssertionError("a source of the world that `of_world` has not finished")


def _given_folder(config: configs.Run) -> Path | None:
    """Return the folder of the log that is read instead of collected; None if there is none."""
    given = config.data.dir if isinstance(config.data, config_sections.LogData) else ""
    return files.user_path(given, "config.data.dir") if given else None


def _read_given(source: Source, folder: Path, progress: Counter) -> Sessions:
    """Load the log of a folder, which mmrf collect or a ranking service wrote."""
    if feedback_log.is_log(folder):
        return sources.read_served_log(folder, source.spec, np.arange(source.spec.num_videos), progress)
    if (blocks := _given_blocks(source, folder)) is not None:
        return sources.read_held(source.config, blocks, "training")
    return records.read_log(folder, source.spec, origin=world_origin(source.config))[0]


def _given_blocks(source: Source, folder: Path) -> stream.Blocks | None:
    """Return the log of a folder for streaming; None if it is not streamed. A service's log is joined in memory."""
    if feedback_log.is_log(folder):
        return None
    return sources.streamed(source.config, records.Blocks(folder, source.spec, world_origin(source.config)))


def in_simulator(
    source: Source,
    sim: Environment,
    truth,
    progress: Counter,
    own: Callable[[Source], rankers.AnyRanker] | None = None,
) -> Source:
    """Return the source with training logs collected in an environment, in the first round by its first policy."""
    config, policies = source.config, dict(sim.reference_policies)
    first, size = next(iter(policies.values())), config.collect.sessions
    source = dataclasses.replace(source, sim=sim, policies=policies, truth=truth)
    if own is not None:
        source = dataclasses.replace(source, choose=_chooser(first, functools.partial(own, source)))

    def collect_round(policy: rankers.AnyRanker, number: int, sessions: int = size) -> Sessions:
        first_user, share = _TRAIN_USERS + number * size, config.collect.random_share
        return _collect_users(source, policy, first_user, sessions, progress, random_share=share)

    collect_on_devices = functools.partial(_collect_on_devices, source, progress)
    most = min(size, _SAMPLE) if config.train.log_on_device else size
    return dataclasses.replace(
        source,
        collect=collect_round,
        collect_on_devices=collect_on_devices,
        train_on_devices=functools.partial(collect_on_devices, first, 0),
        train=functools.cache(functools.partial(collect_round, first, 0, most)),
        blocks=lambda: None,
    )


def _chooser(
    first: rankers.AnyRanker, own: Callable[[], rankers.AnyRanker]
) -> Callable[[rankers.AnyRanker], rankers.PolicyChoice]:
    """Return a function that wraps a policy as the first or second option of `rankers.choices`."""
    own = functools.cache(own)

    def choose(policy: rankers.AnyRanker) -> rankers.PolicyChoice:
        mine = own() if policy is first else policy
        return rankers.choices({"first": first, "own": mine})["first" if policy is first else "own"]

    return choose


def _first_user(config: configs.Run, first_user: int) -> int:
    """Return the first user of a log of a seed, so that near seeds have different users."""
    return first_user + _USERS_A_SEED * (config.seed % _SEEDS_APART)


def _collect_users(
    source: Source, policy: rankers.AnyRanker, first_user: int, sessions: int, progress: Counter, **options: Any
) -> Sessions:
    """Collect a log of a run with its own users; other arguments as of `collect_log`."""
    config = source.config
    return collect_log(
        source,
        source.choose(policy),
        first_user=_first_user(config, first_user),
        sessions=sessions,
        progress=progress,
        slots=min(config.collect.slots, sessions) or collect.slots_for(config.collect.sessions),
        **options,
    )


def _collect_on_devices(
    source: Source,
    progress: Counter,
    policy: rankers.AnyRanker,
    number: int,
    partitioner: Partitioner,
    discount: float,
) -> DeviceLog:
    assert source.sim is not None
    config, size = source.config, source.config.collect.sessions
    sim, policy = _with_random_exposures(source.sim, source.choose(policy), config.collect.random_share)
    return device_collection.collect_on_devices(
        sim,
        policy,
        log_key(config.seed),
        partitioner,
        source.spec,
        first_user=_first_user(config, _TRAIN_USERS + number * size),
        num_sessions=size,
        day=0,
        discount=discount,
        slots=config.collect.slots or None,
        progress=progress("collect", size),
    )
