"""Sources of sessions: logs collected in the world, logs on disk, KuaiRand, or your own log."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np

from mmrf_jax import types
from mmrf_jax.data import named_features, records, sessions, statistics, stream
from mmrf_jax.data.device_log import DeviceLog
from mmrf_jax.data.frame_log import SessionLog
from mmrf_jax.data.readers import feedback_log, feedback_sessions, kuairand, served_items
from mmrf_jax.data.session_log import InputSpec, Sessions
from mmrf_jax.envs import collect, device_collection, rankers
from mmrf_jax.envs.environment import Environment
from mmrf_jax.envs.short_video import env, parameters, reference_policies
from mmrf_jax.envs.short_video.truth import expected_feedback
from mmrf_jax.io import files
from mmrf_jax.io.progress import counted, say
from mmrf_jax.parallel import multihost
from mmrf_jax.parallel.partitioner import Partitioner
from mmrf_jax.training import configs, own_logs

#: First user ids of the logs, far from each other and from the A/B tests, which start at 0.
_TRAIN_USERS, _TEST_USERS = 100_000_000, 200_000_000
_LARGE = 2**20  # sessions; longer logs are streamed
_SAMPLE = 2**14  # sessions of the first log that the host collects too, if the log itself stays on the devices
_MOST_STATISTICS = 2**28  # entries of the table of running means
_USERS_A_SEED, _SEEDS_APART = 1_000_000, 100  # seeds this far apart share user ids but not randomness: the key differs

Progress = Callable[[str, int], Callable[[int], None]]


@dataclasses.dataclass
class Source:
    """The data that a run learns from and is evaluated on.

    Attributes:
      sim: the environment that policies run in: the world, or a learned feedback model; None if there are only logs.
      policies: arms of `sim` that need no training; the first one collected its logs.
      truth: (parameters of `sim`, state, slot = 0) -> expected feedback [B, C, S] of the candidates shown in the slot,
        and log1p seconds [B, C]; None if the truth is unknown.
      collect: (policy, round) -> the log of a later round, served by the policy; None if there are only logs.
      collect_on_devices: (policy, round, partitioner, discount) -> the same log, which stays on the devices; None if
        there are only logs.
      train_on_devices: (partitioner, discount) -> the training log that is collected so; None if it is given.
      train: makes the training log; called only if training is left to do.
      blocks: opens the training log for streaming; gives None if `train` is to be called instead. When streaming,
        `train`, `valid` and `test` give logs of at most about 2^20 sessions, in evenly spread blocks.
      valid: makes the log of the validation days; None if there is none.
      test: makes {name: held-out log}; called only for the final evaluation.
      choose: wraps a collecting policy (the first one or the run's own) as a choice between these two, so that all
        collections share one program.
      video_ids: makes the platform's ids [V] of the videos; None if these are the row numbers.
      users: ids and features of the users, if the source knows them: {"user_id": [U], "profile": [U, Du]}.
      unknown_video: row of any other video; None if there is none.
      names: encoders of features by name (`data.named_features`), {"item", "profile", "context": encoders}, where the
        source knows them; the context's without the position.
      vocabularies: {"author", "tag": the platform's ids [n] of rows 1, 2, …, in order}; None if these are the rows.
    """

    items: types.Items
    spec: InputSpec
    sim: Environment | None
    policies: dict[str, rankers.PrivilegedPolicy | rankers.Ranker]
    truth: Callable[..., tuple[chex.Array, chex.Array]] | None
    collect: Callable[[rankers.AnyRanker, int], Sessions] | None
    train: Callable[[], Sessions]
    valid: Callable[[], Sessions] | None
    test: Callable[[], dict[str, Sessions]]
    report: dict[str, Any]
    config: Any
    video_ids: Callable[[], np.ndarray] | None = None
    users: dict[str, np.ndarray] | None = None
    unknown_video: int | None = None
    names: dict[str, Any] | None = None
    collect_on_devices: Callable[[rankers.AnyRanker, int, Partitioner, float], DeviceLog] | None = None
    train_on_devices: Callable[[Partitioner, float], DeviceLog] | None = None
    vocabularies: dict[str, np.ndarray] | None = None
    blocks: Callable[[], stream.Blocks | None] = lambda: None
    choose: Callable[[rankers.AnyRanker], rankers.AnyRanker] = lambda policy: policy

    def local(self) -> Source:
        """Return the source with its items on this process's devices only."""
        return dataclasses.replace(self, items=multihost.to_local(self.items))


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


#: The world's arms that read its hidden state, and the names of all its arms that need no training.
world_policies = reference_policies.policies
WORLD_ARMS = (*world_policies(), "oracle_observable")


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
    sim: Environment,
    policy: rankers.AnyRanker,
    seed: int,
    *,
    first_user: int,
    sessions: int,
    progress: Progress,
    slots: int | None = None,
    keep_scores: bool = False,
    random_share: float | None = None,
) -> Sessions:
    """Collect a log of `sessions` users, starting at `first_user`; equal seeds give equal logs. With several processes,
    each collects a part, and all receive the whole. `random_share` is that of `config.collect`.
    """
    first, share = multihost.share(sessions)
    sim, policy = _with_random_exposures(sim, policy, random_share)
    log = collect.collect(
        sim,
        policy,
        log_key(seed),
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


def from_config(
    config: configs.Run,
    progress: Progress,
    own: Callable[[Source], rankers.AnyRanker] | None = None,
    workdir: Path | None = None,
) -> Source:
    """Return the source that a config describes (`config.source` is `world`, `kuairand` or `logs`).

    Args:
      own: gives a policy with the shapes of the one that will collect the run's logs; see `Source.choose`.
      workdir: the run folder, which holds the log of a run on `logs`.
    """
    if config.source == "world":
        return _world(config, progress, own)
    if config.source == "kuairand":
        return _kuairand(config)
    if config.source == "logs":
        return _own_logs(config, workdir)
    raise ValueError(f"unknown source {config.source!r}; use --config.source=world, kuairand or logs")


def of_seed(
    like: Source, config: configs.Run, progress: Progress, own: Callable[[Source], rankers.AnyRanker] | None = None
) -> Source:
    """Return the source of a config that differs from another's in its seed alone; they share the world, or the logs.

    Args:
      like: the other source, not in a learned simulator.
      own: as of `from_config`.
    """
    if like.sim is None:
        return dataclasses.replace(like, config=config)
    return dataclasses.replace(_world(config, progress, own, like.sim), items=like.items)


def in_simulator(
    source: Source,
    sim: Environment,
    truth,
    progress: Progress,
    own: Callable[[Source], rankers.AnyRanker] | None = None,
) -> Source:
    """Return the source with training logs collected in an environment, in the first round by its first policy."""
    policies, size = dict(sim.reference_policies), source.config.collect.sessions
    first = next(iter(policies.values()))
    most = _SAMPLE if source.config.train.log_on_device else size
    if own is not None:
        source = dataclasses.replace(source, choose=_chooser(first, functools.cache(lambda: own(source))))
    share = source.config.collect.random_share
    collect = functools.partial(_collect, source, sim, progress, random_share=share)
    collect_on_devices = functools.partial(_collect_on_devices, source, sim, progress)
    return dataclasses.replace(
        source,
        sim=sim,
        policies=policies,
        truth=truth,
        collect=lambda policy, number: collect(policy, _TRAIN_USERS + number * size, size),
        collect_on_devices=collect_on_devices,
        train_on_devices=functools.partial(collect_on_devices, first, 0),
        train=functools.cache(lambda: collect(first, _TRAIN_USERS, min(size, most))),
        blocks=lambda: None,
    )


def _chooser(
    first: rankers.AnyRanker, own: Callable[[], rankers.AnyRanker]
) -> Callable[[rankers.AnyRanker], rankers.PolicyChoice]:
    """Return a function that wraps a policy as the first or second option of `rankers.choices`."""

    def choose(policy: rankers.AnyRanker) -> rankers.PolicyChoice:
        mine = own() if policy is first else policy
        return rankers.choices({"first": first, "own": mine})["first" if policy is first else "own"]

    return choose


def _collect(
    source: Source,
    sim: Environment,
    progress: Progress,
    policy: rankers.AnyRanker,
    first_user: int,
    number: int,
    keep_scores: bool = False,
    random_share: float | None = None,
) -> Sessions:
    offset = _USERS_A_SEED * (source.config.seed % _SEEDS_APART)
    return collect_log(
        sim,
        source.choose(policy),
        source.config.seed,
        first_user=first_user + offset,
        sessions=number,
        progress=progress,
        slots=min(source.config.collect.slots, number) or collect.slots_for(source.config.collect.sessions),
        keep_scores=keep_scores,
        random_share=random_share,
    )


def _collect_on_devices(
    source: Source,
    sim: Environment,
    progress: Progress,
    policy: rankers.AnyRanker,
    number: int,
    partitioner: Partitioner,
    discount: float,
) -> DeviceLog:
    config = source.config
    size, offset = config.collect.sessions, _USERS_A_SEED * (config.seed % _SEEDS_APART)
    sim, policy = _with_random_exposures(sim, source.choose(policy), config.collect.random_share)
    return device_collection.collect_on_devices(
        sim,
        policy,
        log_key(config.seed),
        partitioner,
        source.spec,
        first_user=_TRAIN_USERS + number * size + offset,
        num_sessions=size,
        day=0,
        discount=discount,
        slots=config.collect.slots or None,
        progress=progress("collect", size),
    )


def _world(
    config: configs.Run,
    progress: Progress,
    own: Callable[[Source], rankers.AnyRanker] | None,
    made: Environment | None = None,
) -> Source:
    world = config.world
    assert world is not None
    given = config.data.dir if isinstance(config.data, configs.LogData) else ""
    if given and not files.user_path(given, "config.data.dir").exists():  # said before the world is made
        raise FileNotFoundError(f"{given} does not exist; name a folder that mmrf collect or mmrf serve wrote")
    sim, marked = env.make_world(world) if made is None else made, config.collect.random_share is not None
    if marked and isinstance(sim, env.ShortVideoEnv):
        sim = sim.with_random_share(0.0)  # A/B tests have no random exposures

    def nothing() -> Any:
        return None

    source = Source(
        items=sim.items,
        spec=world_spec(sim, world),
        sim=None,
        policies={},
        truth=None,
        collect=None,
        train=nothing,
        valid=None,
        test=nothing,
        report={},
        config=config,
    )
    source = in_simulator(source, sim, expected_feedback, progress, own)
    test = functools.cache(  # with scores, for per-video propensities
        lambda: _collect(
            source,
            sim,
            progress,
            source.policies["production"],
            _TEST_USERS,
            config.collect.test_sessions,
            keep_scores=True,
            random_share=0.0 if marked else None,  # as in training, whose program it shares
        )
    )
    source = dataclasses.replace(source, test=lambda: {"test": test()})
    if not given:
        return source
    return dataclasses.replace(
        source,
        train=functools.cache(functools.partial(_given, source, progress)),
        train_on_devices=None,
        blocks=functools.partial(_given_blocks, source),
    )


def _given(source: Source, progress: Progress) -> Sessions:
    """Load the log of `data.dir`, which mmrf collect or a ranking service wrote."""
    folder = files.user_path(source.config.data.dir, "config.data.dir")
    if feedback_log.is_log(folder):
        return _served(folder, source.spec, np.arange(source.spec.num_videos), progress)
    if (blocks := _given_blocks(source)) is not None:
        return _held(source.config, blocks, "training")
    return records.read_log(folder, source.spec, origin=world_origin(source.config))[0]


def _served(
    folder: Path, spec: InputSpec, video_ids: np.ndarray, progress: Progress, user_ids: np.ndarray | None = None
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


def _given_blocks(source: Source) -> stream.Blocks | None:
    """Return the log of `data.dir` for streaming; None if it is not streamed. A service's log is joined in memory."""
    folder = files.user_path(source.config.data.dir, "config.data.dir")
    if feedback_log.is_log(folder):
        return None
    return _streamed(source.config, records.Blocks(folder, source.spec, world_origin(source.config)))


def _streamed(config: configs.Run, blocks: stream.Blocks) -> stream.Blocks | None:
    """Return the blocks if `config.data.stream` or the size of their log says to stream it; otherwise None."""
    large = int(blocks.sessions.sum(dtype=np.int64)) > _LARGE
    wanted = config.data.stream
    return blocks if (large if wanted is None else wanted) else None


def _held(config: configs.Run, blocks: stream.Blocks, name: str) -> Sessions:
    """Load a log into memory; of a log to be streamed, only about 2^20 sessions in evenly spread blocks."""
    chosen = np.arange(len(blocks.sessions))
    if _streamed(config, blocks) is not None:
        chosen = stream.spread(blocks, _LARGE)
    if len(chosen) < len(blocks.sessions):
        held, total = (int(number.sum(dtype=np.int64)) for number in (blocks.sessions[chosen], blocks.sessions))
        say(f"input: of the {name} log, {held:,} of {total:,} sessions are what is read whole: blocks spread evenly")
    return blocks.read(chosen)


def kuairand_config(config: configs.Run) -> kuairand.KuaiRandConfig:
    """Return the config of how KuaiRand's rows become sessions."""
    d = config.kuairand
    return kuairand.KuaiRandConfig(
        train_until=d.train_until,
        valid_until=d.valid_until,
        test_from=d.test_from,
        candidates=d.candidates,
        slate=d.slate,
        history=d.history,
        session_gap_minutes=d.session_gap_minutes or None,
        request_gap_minutes=d.request_gap_minutes,
    )


def _with_statistics(items: types.Items, spec: InputSpec, past: list[Sessions]) -> tuple[types.Items, InputSpec]:
    """Add running means of feedback in past logs to the items, if the table of all days fits on every device.

    Returns:
      The items, and the spec with the features that they have now.
    """
    days, added = len(np.unique(np.concatenate([log.date for log in past]))), statistics.num_features(spec.signals)
    if (days + 1) * items.num_videos * added > _MOST_STATISTICS:
        size = 4 * (days + 1) * items.num_videos * added / 2**30
        say(
            f"input: running means of {items.num_videos:,} videos over {days} days would take {size:.1f} GiB of each "
            "device and are left out"
        )
        return items, spec
    dates, table = statistics.by_day(past, items, spec.signals)
    spec = dataclasses.replace(spec, item_features=spec.item_features + added)
    return dataclasses.replace(items, dates=dates, statistics=table), spec


def _with_random_log(logs: Mapping[str, Callable[[], Sessions]]) -> dict[str, Any]:
    """Return the logs with a first context feature that flags requests exposed at random (1 or 0).

    The training and validation logs also include the random exposures of their days, each as a session of one request.
    """

    def said(name: str) -> Sessions:
        log = logs[name]()
        flag = np.full((log.num_requests, 1), name.startswith("random"), log.context.dtype)
        return dataclasses.replace(log, context=np.concatenate([flag, log.context], axis=1))

    def together(name: str) -> Sessions:
        return sessions.concatenate([said(name), said(f"random_{name}")])

    tests = {name: functools.cache(functools.partial(said, name)) for name in ("test", "random_test")}
    return tests | {name: functools.cache(functools.partial(together, name)) for name in ("train", "valid")}


def _own_logs(config: configs.Run, workdir: Path | None) -> Source:
    log = own_logs.of_run(config, workdir)
    context = named_features.plain(["at_random"] if config.own_logs.random_log == "train" else [])
    context += [*named_features.plain(["hour_sin", "hour_cos", "hours_away"]), *log.encoders.get("context", ())]
    return dataclasses.replace(
        _of_log(config, log, log.parts, counted),
        users={"user_id": log.user_ids, "profile": log.profiles},
        unknown_video=0,
        names={"item": log.encoders["items"], "profile": log.encoders["users"], "context": context},
    )


def _kuairand(config: configs.Run) -> Source:
    if not config.kuairand.dir:
        raise ValueError("no data directory; use --config.data.dir=DIR, the folder with KuaiRand's CSV files")
    d = config.kuairand
    wanted = kuairand_config(config)
    given = files.user_path(d.dir, "config.data.dir")
    cache = files.user_path(d.cache_dir, "config.data.cache_dir")
    progress = counted if jax.process_count() == 1 else kuairand.unchecked
    log = multihost.in_turn(lambda: kuairand.open_or_prepare(given, cache, wanted, progress=progress))
    parts: dict[str, Any] = dict(log.parts)
    if d.max_sessions:
        parts["train"] = stream.Beginning(parts["train"], d.max_sessions)
    for name, field in (("train", "train_until"), ("test", "test_from")):
        if not parts[name].sessions.sum():
            found = {split: _held(config, part, split).date for split, part in parts.items()}
            days = {split: [int(date.min()), int(date.max())] for split, date in found.items() if len(date)}
            raise ValueError(
                f"no session is in the {name} days with config.data.{field}={getattr(d, field)}; "
                f"the logs hold {days}: change it"
            )
    return _of_log(config, log, parts, progress)


def _of_log(
    config: configs.Run, log: SessionLog | kuairand.KuaiRand, parts: Mapping[str, stream.Blocks], progress: Progress
) -> Source:
    """Return the source of a prepared log; `parts` are its sessions, or some of them."""
    d: Any = config.data
    logs: dict[str, Any] = {
        name: functools.cache(functools.partial(_held, config, part, name)) for name, part in parts.items()
    }
    there = [name for name, part in parts.items() if part.sessions.sum()]
    items, spec, ids = log.items, log.spec, log.item_ids
    served = files.user_path(d.served, "config.data.served") if d.served else None
    if served is not None:
        items, ids = served_items.with_new(items, ids, served, log.encoders.get("items", ()), log.vocabularies)
        spec = dataclasses.replace(spec, num_videos=items.num_videos)
    if d.statistics:  # computed from the platform's logs, even when training on a service's log
        items, spec = _with_statistics(items, spec, [logs[name]() for name in ("train", "valid") if name in there])
    if d.random_log == "train":
        if "random_train" not in there:
            fix = "use --config.data.random_log=off" + ("" if "random_train" in logs else ", or name schema.random")
            raise ValueError(f"config.data.random_log is 'train', and no row of training was shown at random; {fix}")
        spec = dataclasses.replace(spec, context=spec.context + 1)
        logs = _with_random_log(logs)
    if served is not None:
        logs["train"] = functools.cache(lambda: _served(served, spec, ids, progress, log.user_ids))
    return Source(
        items=jax.tree.map(jax.numpy.asarray, items),
        spec=spec,
        sim=None,
        policies={},
        truth=None,
        collect=None,
        train=logs["train"],
        valid=logs["valid"] if "valid" in there else None,
        test=lambda: {name: logs[name]() for name in ("test", "random_test") if name in there},
        report=dict(log.report),
        config=config,
        video_ids=lambda: ids,
        vocabularies=dict(log.vocabularies) or None,
        blocks=lambda: None if d.served or d.random_log == "train" else _streamed(config, parts["train"]),
    )
