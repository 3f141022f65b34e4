"""Logs collected in a simulator: the world, or a learned feedback model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
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
from mmrf_jax.parallel import multihost
from mmrf_jax.parallel.partitioner import Partitioner
from mmrf_jax.training import configs, sources
from mmrf_jax.training.sources import Progress, Source

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
    sim: Environment,
    policy: rankers.AnyRanker,
    seed: int,
    *,
    first_user: int,
    sessions: int,
    k: int,
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
        k=k,
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
    progress: Progress,
    own: Callable[[Source], rankers.AnyRanker] | None,
    made: Environment | None = None,
) -> Source:
    world = config.world
    assert world is not None
    given = config.data.dir if isinstance(config.data, configs.LogData) else ""
    if given and not files.user_path(given, "config.data.dir").exists():  # said before the world is made
        raise FileNotFoundError(f"{given} does not exist; name a folder that mmrf collect or mmrf serve wrote")
    sim, marked = env.make(world) if made is None else made, config.collect.random_share is not None
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
        return sources.read_served_log(folder, source.spec, np.arange(source.spec.num_videos), progress)
    if (blocks := _given_blocks(source)) is not None:
        return sources.read_held(source.config, blocks, "training")
    return records.read_log(folder, source.spec, origin=world_origin(source.config))[0]


def _given_blocks(source: Source) -> stream.Blocks | None:
    """Return the log of `data.dir` for streaming; None if it is not streamed. A service's log is joined in memory."""
    folder = files.user_path(source.config.data.dir, "config.data.dir")
    if feedback_log.is_log(folder):
        return None
    return sources.streamed(source.config, records.Blocks(folder, source.spec, world_origin(source.config)))


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
        k=source.spec.slate,
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
