"""Errors of the off-policy estimators: estimates of many policies against two true values from the world.

Production collects the logs. Truth (i) is the target of the per-video estimates: states and preceding videos follow
production, actions follow the policy. It is exact except for the states, which are those of all logs. Truth (ii) is the
on-policy value from separate sessions. Letters: P policies, R rankers, r requests, s signals of `MEASURED`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from mmrf_jax import ops, types
from mmrf_jax.abtest import simulate
from mmrf_jax.envs import rollout
from mmrf_jax.envs.rankers import PrivilegedPolicy
from mmrf_jax.io import files, tables
from mmrf_jax.io.progress import counted, phase
from mmrf_jax.ope import estimators
from mmrf_jax.parallel.partitioner import Partitioner
from mmrf_jax.signals import SHORT_VIDEO
from mmrf_jax.training import configs, restore, sources

MEASURED = ("click", "long_view", "like", "watch_time")
CLOSE = 0.05  # relative to production's watch time per video, truth (i): policies that differ by less count as close
_BATCH = 256  # sessions per batch
_DRAWS = 300  # bootstrap samples per log
_LOG_USERS, _SERVED_USERS = 300_000_000, 400_000_000
_COLUMNS = np.array([SHORT_VIDEO.index(name) for name in MEASURED])

Score = Callable[[Any, Any], chex.Array]  # (parameters of the world, state) -> [B, C]


def run_error_study(config, out: Path) -> dict[str, Any]:
    """Simulate logs and sessions, write OUT/table.json and OUT/table.md, and return the table.

    Args:
      config: see experiments/table_estimators.py.
      out: folder to write.

    Returns:
      {"policies": {name: {signal: {"truth", "on_policy": per session, "difference": relative difference of the truth to
      production's}}}, "close": names, "logs", "log_users", "log_requests", "sessions", "estimators": {signal:
      {estimator: {cap: {policy: {"pooled": the estimate on all logs together, "coverage": among logs with an interval,
      the share whose interval contains the truth, None if no log has one, "mean": of the logs' estimates}}}}},
      "summary": {signal: {estimator: {cap: `_summary`}}}}.

    Raises:
      ValueError: for an unknown ranker, no policy named production, or numbers that are too small.
    """
    configs.validate_config(config.to_dict())
    source = restore.open_source(configs.run_of(config.run.to_dict()), counted)
    scores = rankers_of(source)
    weights, names = mixes(config.policies, list(scores)), list(config.policies)
    users = config.logs * config.log_users
    key = jax.random.fold_in(types.make_key(config.run.seed), 15)
    phase("logs")
    rows, truth = simulate_logs(source, scores, key, weights, users, config.log_requests)
    phase("sessions")
    earned = _serve(source, scores, jax.random.fold_in(key, 1), weights, config.sessions)
    phase("estimates")
    difference = truth / truth[names.index("production")] - 1.0
    by_estimator: dict[str, Any] = {signal: {} for signal in MEASURED}
    done = counted("estimates", len(names))
    for i, name in enumerate(names):
        for signal, estimator, cap, entry in _errors(rows, i, truth[i], config.logs, config.log_users):
            by_estimator[signal].setdefault(estimator, {}).setdefault(cap, {})[name] = entry
        done(i + 1)
    close = [name for name, x in zip(names, difference[:, MEASURED.index("watch_time")], strict=True) if abs(x) < CLOSE]
    policies = {
        name: {
            signal: {"truth": float(truth[i, j]), "on_policy": earned[i][signal], "difference": float(difference[i, j])}
            for j, signal in enumerate(MEASURED)
        }
        for i, name in enumerate(names)
    }
    summary = {
        signal: {
            estimator: {cap: _summary(entries, policies, signal, close) for cap, entries in caps.items()}
            for estimator, caps in of_signal.items()
        }
        for signal, of_signal in by_estimator.items()
    }
    table = {"policies": policies, "close": close, "estimators": by_estimator, "summary": summary}
    table |= {name: config[name] for name in ("logs", "log_users", "log_requests", "sessions")}
    files.write_json(out / "table.json", table)
    files.write_text(out / "table.md", format_errors(table))
    return table


def rankers_of(source: sources.Source) -> dict[str, Score]:
    """Return the components of the mixed policies: arms that rank by the world's state, and a video's duration."""
    duration = jnp.log(source.items.duration)
    by_state = {name: arm.score for name, arm in source.policies.items() if isinstance(arm, PrivilegedPolicy)}
    return by_state | {"duration": lambda params, state: duration[state.candidates]}


def mixes(policies, rankers: Sequence[str]) -> np.ndarray:
    """Return the rankers' weights [P, R].

    Raises:
      ValueError: for an unknown ranker, or no policy named production.
    """
    if "production" not in policies:
        raise ValueError(f"no policy is named production, which others are close to; {', '.join(policies)} are")
    weights = np.zeros((len(policies), len(rankers)), np.float32)
    for row, (name, (ranker, share)) in zip(weights, policies.items(), strict=True):
        if ranker not in rankers:
            raise ValueError(f"policy {name} has an unknown ranker {ranker!r}; choose among {', '.join(rankers)}")
        row[rankers.index("production")] += 1.0 - share
        row[rankers.index(ranker)] += share
    return weights


def mixed_scores(weights: chex.Array, scores: dict[str, Score], params, state) -> chex.Array:
    """Return the scores [B, C] of a policy with weights [R], for a Plackett–Luce ranker at T = 1."""
    each = jnp.stack([ops.standardised(score(params, state)) for score in scores.values()])
    return ops.standardised(jnp.einsum("r,rbc->bc", weights, each))


def simulate_logs(
    source: sources.Source,
    rankers: dict[str, Score],
    key: types.Key,
    weights: np.ndarray,
    users: int,
    requests: int,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Simulate the first requests of `users` sessions of production, and compute truth (i).

    Returns:
      {"user": [n] from 0, "log_weight": [n, P], "reward": [n, s]} of the exposed videos, by request and slot, and the
      truth [P, s]: the mean over them of the reward that each policy would expect in the same slot.
    """
    assert source.sim is not None and source.truth is not None
    sim, expected_feedback, k = source.sim, source.truth, source.spec.slate
    production = source.policies["production"]
    policies = jnp.asarray(weights)

    @jax.jit
    def step(state, request, ids, live, t, params):
        user = jnp.arange(_BATCH)
        scores, slate, _ = rollout.select_slate(
            production, params, state, (), request, ids, jnp.full(user.shape, t), key, k
        )
        log_propensity = ops.plackett_luce_log_prob(scores, slate)
        mixed = jax.lax.map(lambda w: mixed_scores(w, rankers, params, state), policies)  # [P, B, C]
        chosen = jnp.broadcast_to(slate, (len(policies), *slate.shape))
        log_weight = ops.plackett_luce_log_prob(mixed, chosen) - log_propensity

        def add(carry, slot):  # lower slots are watched less, and videos already shown are removed
            total, odds = carry
            expected = expected_feedback(params, state, slot)[0][..., _COLUMNS]
            total += jnp.einsum("pbc,bcs->pbs", odds / odds.sum(axis=-1, keepdims=True), expected)
            return (total, odds.at[:, user, slate[:, slot]].set(0.0)), None

        start = jnp.zeros((*mixed.shape[:2], len(MEASURED))), jnp.exp(mixed)
        (total, _), _ = jax.lax.scan(add, start, jnp.arange(k))
        result, state = sim.step_env(key, state, slate, params)
        reward = result.exposure.feedback[..., _COLUMNS]
        going = live & ~(result.terminated | result.truncated)
        would = jnp.where(live[:, None], total, 0.0).sum(axis=1)
        return state, result.request, going, log_weight, reward, would

    parts: list[dict[str, np.ndarray]] = []
    total = np.zeros((len(weights), len(MEASURED)))
    done, reset = counted("logs", users), jax.jit(sim.reset_env)
    for first in range(0, users, _BATCH):
        ids = jnp.arange(_LOG_USERS + first, _LOG_USERS + first + _BATCH, dtype=jnp.int32)
        request, _, state = reset(key, sim.default_params, ids, jnp.int32(0))
        live = jnp.arange(first, first + _BATCH) < users
        for t in range(requests):
            now = np.flatnonzero(live)
            state, request, live, log_weight, reward, would = step(state, request, ids, live, t, sim.default_params)
            total += np.asarray(would, np.float64)
            part = {"log_weight": np.moveaxis(np.asarray(log_weight), 0, -1)[now], "reward": np.asarray(reward)[now]}
            part["user"] = np.broadcast_to((first + now)[:, None], part["reward"].shape[:2])
            parts.append({name: x.reshape(-1, *x.shape[2:]) for name, x in part.items()})
        done(min(first + _BATCH, users))
    rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.argsort(rows["user"], kind="stable")
    return {name: x[order] for name, x in rows.items()}, total / len(order)


def _errors(rows: dict[str, np.ndarray], policy: int, truth: np.ndarray, logs: int, log_users: int):
    """Yield (signal, estimator, cap, entry) of a policy, from all logs together and from each (`run_error_study`)."""
    log_weight, reward = rows["log_weight"][:, policy], rows["reward"]
    edges = np.searchsorted(rows["user"], log_users * np.arange(logs + 1))
    estimate = functools.partial(estimators.estimate, signals=MEASURED, draws=_DRAWS)

    def of(part, seed):
        return estimate(estimators.LoggedDecisions(rows["user"][part], log_weight[part], reward[part]), seed=seed)

    pooled = estimators.estimate(estimators.LoggedDecisions(rows["user"], log_weight, reward), MEASURED, draws=1)[
        "signals"
    ]
    each = [of(slice(*edges[i : i + 2]), i)["signals"] for i in range(logs)]
    for j, signal in enumerate(MEASURED):
        for estimator in ("ips", "ncis"):
            for cap, entry in pooled[signal][estimator].items():
                found = [x[signal][estimator][cap] for x in each]
                inside = [x["ci95"][0] <= truth[j] <= x["ci95"][1] for x in found if x["ci95"] is not None]
                mean = float(np.mean([x["value"] for x in found]))
                yield (
                    signal,
                    estimator,
                    cap,
                    {"pooled": entry["value"], "coverage": _mean(inside), "mean": mean},
                )


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of the values that are not None; None if there are none."""
    there = [x for x in values if x is not None]
    return float(np.mean(there)) if there else None


def _summary(entries: dict[str, Any], policies: dict[str, Any], signal: str, close: list[str]) -> dict[str, Any]:
    """Summarise the entries of an estimator and cap over all policies and over the close ones.

    Returns:
      {"all" | "close": {"error": mean |pooled / truth − 1|, "coverage": of truth (i), and rank correlations of the
      pooled estimates with truth (i), "rank", and with (ii), "rank_on_policy"}}; correlations are None for fewer than 3
      policies.
    """
    result = {}
    for group, names in (("all", list(entries)), ("close", close)):
        pooled = np.array([entries[name]["pooled"] for name in names])
        truth, earned = (np.array([policies[n][signal][key] for n in names]) for key in ("truth", "on_policy"))

        def ranks(x, pooled=pooled):
            return float(stats.spearmanr(pooled, x).statistic) if len(x) > 2 else None

        result[group] = {
            "error": float(np.mean(np.abs(pooled / truth - 1.0))),
            "coverage": _mean([entries[name]["coverage"] for name in names]),
            "rank": ranks(truth),
            "rank_on_policy": ranks(earned),
        }
    return result


def _serve(
    source: sources.Source, rankers: dict[str, Score], key: types.Key, weights: np.ndarray, sessions: int
) -> list[dict[str, float]]:
    """Compute truth (ii) of each policy: {signal: mean per session, a count or seconds}."""
    assert source.sim is not None
    sim = source.sim

    def score(params: Any, state: Any, weights: chex.Array) -> chex.Array:
        return mixed_scores(weights, rankers, params, state)

    partitioner, result, done = Partitioner(), [], counted("sessions", sessions * len(weights))
    for i, row in enumerate(weights):
        policy = PrivilegedPolicy(score, 1.0, (jnp.asarray(row),))  # all policies share one program
        served = simulate.rollout_user_metrics(
            sim, policy, key, partitioner, user_ids=np.arange(_SERVED_USERS, _SERVED_USERS + sessions), day=0
        )
        result.append({signal: float(served[signal].mean()) for signal in MEASURED})
        done(sessions * (i + 1))
    return result


def format_errors(table: dict[str, Any]) -> str:
    """Format the study's tables as Markdown: estimators, then policies by watch time."""

    def number(x, spec):
        return "–" if x is None else format(x, spec)

    head = (
        f"{table['logs']} logs of {table['log_users']} users, the first {table['log_requests']} requests of each; "
        f"{table['sessions']:,} sessions of each of {len(table['policies'])} policies, {len(table['close'])} of them "
        f"within {100 * CLOSE:.0f} % of production."
    )
    header = ["signal", "estimator", "cap"]
    for group in ("all", "close"):
        header += [f"{name}, {group}" for name in ("relative error, %", "coverage", "rank (i)", "rank (ii)")]
    lines = []
    for signal, of_signal in table["summary"].items():
        for estimator, caps in of_signal.items():
            for cap, groups in caps.items():
                cells = [signal, "SNIPS" if (estimator, cap) == ("ncis", "inf") else estimator.upper(), cap]
                for x in groups.values():
                    cells += [f"{100 * x['error']:.2f}", number(x["coverage"], ".3f")]
                    cells += [number(x["rank"], ".3f"), number(x["rank_on_policy"], ".3f")]
                lines.append(cells)
    columns = ["policy", "watch time a video, s, truth (i)", "difference, %", "watch time a session, s, truth (ii)"]
    columns += ["SNIPS", "NCIS, cap 10", "coverage of SNIPS", "coverage of NCIS, cap 10"]
    policies = []
    ncis = table["estimators"]["watch_time"]["ncis"]
    for name, signals in table["policies"].items():
        x = signals["watch_time"]
        cells = [name, f"{x['truth']:.2f}", f"{100 * x['difference']:+.1f}", f"{x['on_policy']:,.0f}"]
        cells += [f"{ncis[cap][name]['pooled']:.2f}" for cap in ("inf", "10")]
        policies.append(cells + [number(ncis[cap][name]["coverage"], ".3f") for cap in ("inf", "10")])
    return "\n\n".join((head, tables.markdown(header, lines), tables.markdown(columns, policies))) + "\n"
