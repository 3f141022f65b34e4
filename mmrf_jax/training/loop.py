"""The host loop: collect or load logs, learn, compare, write results. The only place that drives the device."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from mmrf_jax import types
from mmrf_jax.agents import state as st
from mmrf_jax.agents.config import AgentConfig
from mmrf_jax.baselines import boosting, popularity
from mmrf_jax.checkpointing import manager
from mmrf_jax.data import sessions
from mmrf_jax.data.schema import SessionLog
from mmrf_jax.evaluation import ab_test, gauc, offline
from mmrf_jax.metrics import files, writers
from mmrf_jax.metrics.progress import Progress
from mmrf_jax.parallel import mesh as par
from mmrf_jax.simulators import base
from mmrf_jax.training import arms, methods, sources
from mmrf_jax.training import workdir as wd

_KEEP = 3


def progress(phase: str, total: int):
    """A callback (units done) that prints progress with the time left, and a last line when all is done."""
    bar = Progress(phase, total, unit="users" if phase in ("collect", "ab_test") else "steps")

    def update(done: int) -> None:
        bar.update(done)
        if done >= total:
            bar.close()

    return update


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _phase(name: str) -> None:
    """Says which phase begins; Progress speaks only of what takes long."""
    _say(f"phase: {name}")


def agent_config(config) -> AgentConfig:
    """The agents of a run."""
    fields: dict[str, Any] = {
        name: tuple(v) if isinstance(v, (list, tuple)) else v for name, v in config.agents.items()
    }
    slate = config.world.slate if config.source == "world" else config.data.slate
    return AgentConfig(**fields, slate=slate)


def state_shapes(config, source: sources.Source, mesh) -> st.AgentState:
    """Shapes, types and shardings of a state, to restore onto; nothing is computed."""
    ones = jnp.ones(len(types.SIGNALS))
    agents = agent_config(config)
    shapes = jax.eval_shape(lambda: st.init(jax.random.key(0), agents, source.schema, source.items, ones, ones))
    return manager.targets(shapes, par.replicated(mesh))


def load_state(config, source: sources.Source, workdir: Path, mesh) -> st.AgentState:
    """The newest state of a run.

    Raises:
      ValueError: where the run has no checkpoint yet.
      CheckpointError: where all of them are damaged.
    """
    nothing = ValueError(f"{workdir} has no checkpoint; run launch.train with --workdir={workdir} first")
    if not (workdir / "checkpoints").exists():
        raise nothing
    with manager.Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        if checkpoints.latest_step() is None:
            raise nothing
        state, step = checkpoints.restore(state_shapes(config, source, mesh))
    done = workdir / "learned.json"
    if not done.exists() or wd.read_json(done)["updates"] != step:
        _say(f"{workdir} has not learned to its end: this is update {step}")
    return state


def policy_of(name: str, source: sources.Source, mesh) -> base.Policy:
    """The policy of an arm: a name of the world's own rankers, or a run folder.

    Raises:
      ValueError: for a name that is neither, or a run trained on another world.
    """
    built_in = sources.world_policies()
    if name in built_in:
        return built_in[name]
    if not Path(name).is_dir():
        raise ValueError(f"unknown policy {name!r}: neither a run folder nor one of {', '.join(built_in)}")
    config = ml_collections.ConfigDict(wd.read_config(Path(name)))
    if config.source != "world":
        raise ValueError(f"run {name} was trained on {config.source}, it cannot act in the world; name another run")
    trained, here = sources.world_origin(config), sources.world_origin(source.config)
    if differing := [n for n in trained if trained[n] != here.get(n)]:
        flags = " ".join(f"--config.world.{n}={trained[n]}" for n in differing)
        raise ValueError(f"run {name} was trained in another world; add {flags}")
    state = load_state(config, source, Path(name), mesh)
    return methods.get(config.method).make_policy(state, source.items, agent_config(config))


def train(config, workdir: Path) -> dict[str, Any]:
    """Runs a config to its results, going on from the newest checkpoint of the folder. Returns the results."""
    # What is wrong with the config is said before anything is written.
    method = methods.get(config.method)
    _check(config)
    mesh = par.make_mesh()
    par.check_divisible(config.train.batch, mesh, "train.batch")
    agent_config(config)
    if config.source == "world":
        _arms(config)
    made = wd.claim(workdir, config.to_dict())
    results = workdir / "results.json"
    if results.exists():
        finished = wd.read_json(results)
        _say(f"{workdir} is finished; nothing to do")
        return finished
    try:
        return _run(config, method, workdir, mesh)
    except Exception:
        if made is not None:
            wd.release(workdir, made)
        raise


def _check(config) -> None:
    """Refuses numbers that no run can have, and a source that the config file has no fields for."""
    if config.source not in ("world", "kuairand") or (config.source == "world") != ("world" in config):
        raise ValueError(
            f"config.source={config.source!r} does not go with this config file; use experiments/world.py for 'world' "
            "and experiments/kuairand.py for 'kuairand'"
        )
    least = {"seed": 0, "train.batch": 1, "train.segment": 1, "train.epochs": 1, "log_every": 1, "checkpoint_every": 1}
    if config.source == "world":
        least |= {"collect.sessions": 1, "collect.test_sessions": 1, "ab_test.sessions": 2}
    values = wd.flat(config.to_dict())
    for name, lowest in least.items():
        if values[name] < lowest:
            raise ValueError(f"config.{name} is {values[name]}; use --config.{name}={lowest} or more")


def _run(config, method, workdir: Path, mesh) -> dict[str, Any]:
    """Everything between a claimed folder and its results."""
    _phase("prepare")
    source = sources.from_config(config, progress)
    if source.report:
        _say(f"input: {json.dumps(source.report, default=str)}")
    source = dataclasses.replace(source, items=par.put_replicated(source.items, mesh))
    with manager.Checkpoints(workdir / "checkpoints", keep=_KEEP, save_interval=config.checkpoint_every) as checkpoints:
        state, metrics = _learn(config, source, method, workdir, checkpoints, mesh)
    result: dict[str, Any] = {"train": metrics}
    if source.sim is not None:
        _phase("ab_test")
        policies = _arms(config)
        policies[config.method] = method.make_policy(state, source.items, agent_config(config))
        test = compare(config, source, policies, mesh)
        result |= test
    _phase("offline")
    result |= evaluate(config, source, state)
    _phase("results")
    files.write_json(workdir / "results.json", result)
    return result


def _arms(config) -> dict[str, base.Policy]:
    """The arms of the config beside the run's own ranker, which joins by itself."""
    policies = sources.world_policies()
    names = [name for name in config.ab_test.arms if name != config.method]
    for name in names:
        if name not in policies:
            raise ValueError(f"unknown arm {name!r} in config.ab_test.arms; choose among {', '.join(policies)}")
    return {name: policies[name] for name in names}


@jax.jit
def _finite(tree) -> jax.Array:
    """Whether every floating-point number of a state is finite."""
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves]))


def _learn(config, source, method, workdir: Path, checkpoints: manager.Checkpoints, mesh):
    """The learning phase: from the newest checkpoint, or from a fresh state, to the last update."""
    if checkpoints.latest_step() is not None:
        state, step = checkpoints.restore(state_shapes(config, source, mesh))
        _say(f"resumed at update {step}")
        done = workdir / "learned.json"
        if done.exists() and (summary := wd.read_json(done))["updates"] == step:
            return state, summary
    else:
        state, step = None, 0
    if source.sim is not None:
        _phase("read" if config.data.dir else "collect")
    log = source.train()
    _phase("train")
    index = sessions.segment_index(log, config.train.segment)
    batch = config.train.batch
    per_epoch = len(index) // batch
    if per_epoch == 0:
        fits = len(index) // mesh.size * mesh.size
        fix = f"use --config.train.batch={fits}" if fits else "use a larger log"
        raise ValueError(f"the log has {len(index)} segments, fewer than one batch of {batch}; {fix}")
    total = config.train.epochs * per_epoch
    agents = agent_config(config)
    if state is None:
        feedback = log.feedback[log.slate >= 0].astype(np.float64)
        init = functools.partial(st.init, config=agents, schema=source.schema, items=source.items)
        born = jax.jit(
            lambda key, mean, std: init(key, feedback_mean=mean, feedback_std=std), out_shardings=par.replicated(mesh)
        )
        state = born(
            jax.random.key(config.seed),
            jnp.asarray(feedback.mean(0), jnp.float32),
            jnp.asarray(feedback.std(0), jnp.float32),
        )
    update = jax.jit(method.update, static_argnames="config", donate_argnames="state")
    writer = writers.MetricsWriter(workdir, start_step=step if step else None, seed=config.seed)
    bar = Progress("train", total, unit="updates", done=step)
    pending: tuple[int, Any] | None = None
    good = step  # the last update whose metrics were seen to be finite

    def log_metrics(at: int, metrics) -> int:
        try:
            writer.write(at, "train", jax.device_get(metrics))
        except FloatingPointError as error:
            raise FloatingPointError(f"updates {good + 1} to {at}: {error}") from error
        return at

    order_epoch, order = -1, np.empty(0, np.int64)
    with writer:
        while step < total:
            epoch, position = divmod(step, per_epoch)
            if epoch != order_epoch:
                order_epoch, order = epoch, np.random.default_rng([config.seed, epoch]).permutation(len(index))
            rows = index[order[position * batch : (position + 1) * batch]]
            data = par.put_batch(sessions.gather_segments(log, rows, config.train.segment), mesh)
            state, metrics = update(state, data, source.items, agents)
            step += 1
            if step % config.log_every == 0 or step == total:
                # The metrics of the logging step before: reading them does not wait for the device.
                if pending is not None:
                    good = log_metrics(*pending)
                pending = (step, metrics)
            if step % config.checkpoint_every == 0 or step == total:
                if pending is not None:
                    good = log_metrics(*pending)
                    pending = None
                if not _finite(state):
                    raise FloatingPointError(
                        f"updates {good + 1} to {step}: the state after update {step} is not finite and is not "
                        "saved; lower the learning rate"
                    )
                checkpoints.save(step, state, force=step == total)
            bar.update(step)
        bar.close()
    checkpoints.wait()
    history = (workdir / "metrics.jsonl").read_text().splitlines()
    final = {name: value for name, value in json.loads(history[-1]).items() if name != "seconds"}
    summary = {"updates": step, "sessions": log.num_sessions, "requests": log.num_requests, "final": final}
    files.write_json(workdir / "learned.json", summary)
    return state, summary


def compare(config, source: sources.Source, policies: dict[str, Any], mesh) -> dict[str, Any]:
    """A paired A/B test in the world, with progress; the first arm is the control."""
    names = list(policies)
    if source.sim is None:
        raise ValueError(f"A/B tests need the world, but config.source is {config.source!r}; use experiments/world.py")
    total = config.ab_test.sessions * len(names)
    key = jax.random.fold_in(jax.random.key(config.seed), 12)
    return arms.compare(
        source.sim._replace(items=source.items), policies, key, mesh, control=names[0],
        num_users=config.ab_test.sessions, day=config.ab_test.day, k=source.schema.slate,
        progress=progress("ab_test", total),
    )  # fmt: skip


def evaluate(config, source: sources.Source, state: st.AgentState) -> dict[str, Any]:
    """Offline metrics on the held-out logs; on KuaiRand beside popularity and boosting.

    Returns:
      {"offline": metrics of the test log, "offline_other": {log: metrics}}. Of the others, `test_frozen` is the test
      log again, every request scored without any feedback of the test days (`sessions.freeze_histories`).
    """
    signals = methods.get(config.method).signals(agent_config(config))
    tests = source.test()
    train, baselines = None, {}
    if source.sim is None:
        train = offline.exposures(source.train())
        baselines = _baselines(source, tests)
        tests["test_frozen"], baselines["test_frozen"] = sessions.freeze_histories(tests["test"]), baselines["test"]
    result: dict[str, Any] = {}
    for name, log in tests.items():
        rows = score(config, source, state, log, num_requests=1 if name == "test_frozen" else config.train.segment)
        duration = np.asarray(source.items.duration)[rows.video]
        before = _history_rows(log) if train is None else train
        result[name] = offline.metrics(rows, signals, before, duration, baselines.get(name))
    return {"offline": result.pop("test")} | ({"offline_other": result} if result else {})


def _baselines(source: sources.Source, tests: dict[str, SessionLog]) -> dict[str, Any]:
    """Scores of popularity and boosting for the exposures of each log, {log: {ranker: {signal: [n]}}}."""
    train, valid = source.train(), None if source.valid is None else source.valid()
    rows = offline.exposures(train)
    means = popularity.smoothed_means(rows.video, rows.feedback, source.items.num_videos)
    measure = lambda users, scores, labels: gauc.grouped_auc(users, scores, {"label": labels})["label"].value
    _phase("boosting")
    boosted = boosting.scores(train, valid, tests, source.items, measure)
    popular = {name: means[offline.exposures(log).video].T for name, log in tests.items()}
    return {
        name: {"popularity": dict(zip(types.SIGNALS, popular[name], strict=True)), "boosting": boosted[name]}
        for name in tests
    }


def _history_rows(log: SessionLog) -> offline.Rows:
    """What users were shown before the log, for their medians of watch time."""
    mask = log.history_mask
    user = np.broadcast_to(log.user_id[:, None], mask.shape)
    empty = np.zeros((int(mask.sum()), 0), np.float32)
    return offline.Rows(user[mask], log.history_videos[mask], log.history_feedback[mask], empty)


def score(config, source: sources.Source, state: st.AgentState, log: SessionLog, num_requests: int) -> offline.Rows:
    """Scores of a run for every exposure of a log, in segments of `num_requests`."""
    agents = agent_config(config)
    total = len(sessions.segment_index(log, num_requests))
    one = lambda batch: methods.score_batch(state, batch, source.items, agents, config.method)
    return offline.score_log(one, log, num_requests=num_requests, progress=progress("offline", total))


def print_results(result: dict[str, Any]) -> None:
    """The result tables, on stdout."""
    if "ab_test" in result:
        print(ab_test.format_table(result))
        print("sessions cut at their longest, %:", {k: round(v, 3) for k, v in result["truncated_pct"].items()})
    if "offline" in result:
        print(offline.format_table(result["offline"]))
    for name, entries in result.get("offline_other", {}).items():
        print(f"\n{name}:")
        print(offline.format_table(entries))
