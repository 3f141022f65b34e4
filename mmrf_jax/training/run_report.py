"""Data for a run's report that needs the trained state: attention, gradient conflict, example sessions."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mmrf_jax import types
from mmrf_jax.agents import registry
from mmrf_jax.agents.mmrf import diagnostics
from mmrf_jax.data import sessions
from mmrf_jax.data.session_log import Sessions
from mmrf_jax.envs import collect
from mmrf_jax.io import extras, files
from mmrf_jax.metrics import offline
from mmrf_jax.models.feedback_model import counterfactuals
from mmrf_jax.parallel import programs
from mmrf_jax.parallel.partitioner import Partitioner
from mmrf_jax.signals import Signals
from mmrf_jax.training import (
    batches,
    configs,
    predictions,
    provenance,
    run_folder,
    simulated_tests,
    steps,
    train_state,
)
from mmrf_jax.training.trained_run import TrainedRun

_BATCH, _BATCHES = 64, 16  # held-out segments per batch, and the maximum number of batches
_TOGETHER = ("attention", "actors", "encoder")  # matrices of how the agents depend on each other
_USERS = 12  # example sessions; of each, the requests of one segment
_BEST = 9  # candidates listed by the main agent's score, including those shown

_MEASURED = ("speed", "scale")  # suites of mmrf benchmark, written into the run folder as NAME.json
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "bokeh")

_predict = programs.Program(counterfactuals.predict, calls="few", static_argnames="config")


def explain_run(run: TrainedRun, thorough: bool = True) -> dict[str, Any]:
    """Compute the report's data that needs the trained state, as JSON.

    Args:
      thorough: whether to compute attention and per-agent gradients, which need additional compiled programs.

    Returns:
      {"attention", "actors", "encoder": matrices, or {"missing": why there are none}, "sessions": `example_sessions`}.
    """
    log = run.source.test()["test"]
    if thorough or _alone(run.plan):
        together = _together(run, log, _BATCHES)
    else:
        missing = {"missing": "mmrf report --workdir=RUN computes it, and writes this page again."}
        together = dict.fromkeys(_TOGETHER, missing)
    return together | {"sessions": example_sessions(run, log)}


def conflicts(run: TrainedRun, log: Sessions) -> dict[str, float]:
    """Compute each auxiliary agent's gradient cosine with the main agent, and the attention that the latter gives it.

    Returns:
      {"actors | encoder | attention/signal": of each auxiliary agent}, without those that a method does not have.
    """
    found = _together(run, log, run.config.alternation.conflict_batches)
    return {
        f"{name}/{signal}": found[name]["matrix"][-1][i]
        for name in ("actors", "encoder", "attention")
        if "matrix" in found[name]
        for i, signal in enumerate(run.plan.agents.agent_signals[:-1])
    }


def _together(run: TrainedRun, log: Sessions, most: int) -> dict[str, Any]:
    """Compute inter-agent attention and gradient cosines over requests of a log."""
    plan, state, items = run.plan, run.state, run.items
    if reason := _alone(plan):
        return {name: {"missing": reason} for name in _TOGETHER}
    talks = plan.agents.communication == "attention" and plan.agents.ablation != "no_collaboration"
    weights, acted, encoded, requests = [], [], [], 0
    segment = run.config.train.segment
    for batch in batches.spread_batches(log, sessions.segment_index(log, segment), segment, _BATCH, most):
        requests += int(batch.mask[:, :-1].sum())
        if not plan.agents.own_critics:
            encoded.append(np.asarray(diagnostics.encoder_gradients(state.agents, batch, items, plan.agents)))
        if talks:
            prediction = None
            if plan.use_feedback_model and plan.agents.values_use_model:
                prediction = _predict(train_state.model_of(state), batch, items, plan.feedback)
            weights.append(np.asarray(diagnostics.attention(state.agents, batch, items, plan.agents)))
            gradients = diagnostics.actor_gradients(state.agents, batch, items, prediction, plan.agents)
            acted.append(np.asarray(gradients))
    result: dict[str, Any] = {"encoder": {"missing": "Each agent has its own encoder, so they share nothing."}}
    if encoded:
        result["encoder"] = agreement(np.stack(encoded)) | {"requests": requests}
    if not talks:
        missing = {"missing": "These agents have no attention between them, so their actors share nothing."}
        return result | {"attention": missing, "actors": missing}
    mean = np.sum(weights, axis=0, dtype=np.float64).mean(axis=0) / requests
    result["attention"] = {"matrix": mean.tolist(), "requests": requests}
    return result | {"actors": agreement(np.stack(acted)) | {"requests": requests}}


def _alone(plan: steps.TrainConfig) -> str:
    """Return why a run has no agents to compare with each other; empty if it has."""
    if not registry.get(plan.method).uses_model:
        return f"method={plan.method} has no agents that work together, so there is nothing to compare."
    if plan.agents.num_agents == 1:
        return "This run has a single agent, so there is none to compare it with."
    return ""


def agreement(gradients: np.ndarray) -> dict[str, Any]:
    """Compute cosines between the agents' gradients [M, N, P], summed over M batches.

    Returns:
      {"matrix": [N, N], "itself": [N]}. "itself" is the cosine of an agent's gradients on two halves of the batches:
      how much of a gradient is not noise. It is None for a single batch. A cosine with a zero gradient is 0.
    """
    gradients = gradients.astype(np.float64)

    def unit(x):
        return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-30)

    every, even, odd = (unit(x.sum(axis=0)) for x in (gradients, gradients[::2], gradients[1::2]))
    itself = (even * odd).sum(axis=-1).tolist() if len(gradients) > 1 else None
    return {"matrix": (every @ every.T).tolist(), "itself": itself}


def example_sessions(run: TrainedRun, log: Sessions) -> dict[str, Any]:
    """Return example sessions, with each agent's scores of their candidates.

    With a simulator these are the first users of the A/B test, served by the run's own ranker; otherwise the longest
    sessions of the held-out log, one per user, as logged.

    Returns:
      {"served": whether the run's ranker chose the slates, "agents": names of the score columns, "users": [{"user",
      "date", "requests", "videos", "seconds": of the whole session, None if no signal is a duration, "left", "shown":
      [[candidate]] of each of its first requests}]}. A candidate is {"video", "duration", "slot": 0 … K − 1 or None,
      "scores": one per agent, "ranks" among all candidates, from 1} and, if it was shown, {"signals": those it
      received, numeric ones with their value, "seconds"}.
    """
    config, source, plan, state = run.config, run.source, run.plan, run.state
    method = registry.get(plan.method)
    if source.sim is not None:
        policy = method.make_policy(state.agents, source.items, plan.agents)
        log = collect.collect(
            source.sim,
            source.choose(policy),
            simulated_tests.ab_key(config.seed),
            first_user=0,
            num_sessions=_USERS,
            day=config.ab_test.day,
            slots=collect.slots_for(config.collect.sessions),
        )
    else:
        log = sessions.select_sessions(log, _longest(log, _USERS))
    index = np.stack([np.arange(log.num_sessions), log.offsets[:-1]], axis=1)
    length_shown = config.train.segment
    partitioner = Partitioner.local()
    size = -(-offline.BATCH // partitioner.num_devices) * partitioner.num_devices  # as in the offline evaluation
    batch = sessions.gather_segments(log, np.resize(index, (size, 2)), length_shown)
    # Sharded as in the offline evaluation, whose program serves here.
    scores = np.asarray(
        predictions.score_and_predict(state, partitioner.shard_inputs(batch), source.items, plan)["scores"]
    )
    duration = np.asarray(source.items.duration)
    users, signals = [], source.spec.signals
    at = _duration(signals)
    for n in range(log.num_sessions):
        rows = slice(int(log.offsets[n]), int(log.offsets[n + 1]))
        length = rows.stop - rows.start
        user = {
            "user": int(log.user_id[n]),
            "date": int(log.date[n]),
            "requests": length,
            "videos": int((log.slate[rows] >= 0).sum()),
            "seconds": None if at is None else _total(log, rows, at),
            "left": bool(log.terminated[n]),
            "shown": [_request(signals, batch, scores, duration, n, t) for t in range(min(length, length_shown))],
        }
        users.append(user)
    return {"served": source.sim is not None, "agents": list(method.signals(plan.agents)), "users": users}


def _longest(log: Sessions, number: int) -> np.ndarray:
    """Return the longest session of each of the users with the longest ones, in the log's order."""
    order = np.argsort(-np.diff(log.offsets), kind="stable")
    _, first = np.unique(log.user_id[order], return_index=True)
    return np.sort(order[np.sort(first)[:number]])


def _duration(signals: Signals) -> int | None:
    """Return the position of the first duration, the time that users watch; None if there is none."""
    return next(iter(signals.of_kind("duration")), None)


def _total(log: Sessions, rows: slice, signal: int) -> float:
    """Return the sum of a signal over the videos shown at some requests."""
    return float(np.where(log.slate[rows] >= 0, log.feedback[rows][..., signal], 0.0).sum())


def _request(
    signals: Signals, batch: types.SessionBatch, scores: np.ndarray, duration: np.ndarray, n: int, t: int
) -> list[dict]:
    """Return the notable candidates of a request: those shown, the main agent's best, and each agent's first."""
    said = scores[n, t]  # [N, C]
    order = np.argsort(-said, axis=-1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(said.shape[-1])[None], axis=-1)
    slots = {int(c): slot for slot, c in enumerate(batch.slate[n, t]) if batch.slate_mask[n, t, slot]}
    chosen = list(dict.fromkeys([*slots, *order[-1, :_BEST].tolist(), *order[:, 0].tolist()]))
    rows = []
    for c in chosen:
        video = int(batch.candidates[n, t, c])
        row = {
            "video": video,
            "duration": round(float(duration[video]), 1),
            "slot": slots.get(c),
            "scores": [round(float(x), 3) for x in said[:, c]],
            "ranks": (ranks[:, c] + 1).tolist(),
        }
        if c in slots:
            feedback = batch.feedback[n, t, slots[c]]
            at = _duration(signals)
            got = [name for i, name in zip(signals.binary, signals.binary_names, strict=True) if feedback[i] > 0.5]
            got += [f"{signals.names[i]} {feedback[i]:.4g}" for i in signals.numeric if i != at]
            row |= {"signals": got, "seconds": None if at is None else round(float(feedback[at]), 1)}
        rows.append(row)
    return rows


def missing_for_report() -> extras.MissingExtra | None:
    """Return why no report can be written; None if it can."""
    try:
        with extras.needed("report"):
            import bokeh  # noqa: F401
    except extras.MissingExtra as error:
        return error
    return None


def headline(config: configs.Run, results: Mapping[str, Any]) -> dict[str, float]:
    """Return the results as flat numbers for trackers: the run's own arm, and GAUC of the held-out log."""
    found: dict[str, Any] = {}
    for metric, entry in results.get("ab_test", {}).get(config.method, {}).items():
        found |= {f"ab_test/{metric}/{key}": entry[key] for key in ("mean", "diff_pct")}
    found |= {f"offline/{signal}/gauc": entry["gauc"] for signal, entry in results.get("offline", {}).items()}
    return {name: value for name, value in found.items() if value is not None}


def write_report(run: TrainedRun, workdir: Path, thorough: bool = True) -> Path:
    """Write WORKDIR/report.html of a run from its files and its state; return the path.

    Args:
      thorough: see `explain_run`.
    """
    with extras.needed("report"):
        from mmrf_jax.report import page, sections  # imported here: importing Bokeh takes half a second

    metrics, results = workdir / "metrics.jsonl", workdir / "results.json"
    shown = sections.Run(
        name=workdir.resolve().name,
        signals=run.signals,
        config=configs.as_dict(run.config),
        versions=_versions(),
        rows=[json.loads(line) for line in metrics.read_text().splitlines()],
        results=run_folder.read_json(results) if results.exists() else {},
        source=files.plain(run.source.report),
        explained=explain_run(run, thorough),
        measured={
            name: run_folder.read_json(path) for name in _MEASURED if (path := workdir / f"{name}.json").exists()
        },
        starts=provenance.read_starts(workdir),
    )
    path = workdir / "report.html"
    files.write_text(path, page.build(shown))
    return path


def _versions() -> dict[str, str]:
    device = jax.devices()[0]
    found = {"python": platform.python_version()} | {name: metadata.version(name) for name in _LIBRARIES}
    return found | {"devices": f"{jax.device_count()} × {device.device_kind}"}
