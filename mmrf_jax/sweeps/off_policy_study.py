"""Errors of the off-policy estimators: estimates of many policies against true values from the world.

Production collects the logs. Truth (i) is the target of the per-video estimates: states and preceding videos follow
production, actions follow the policy. It is exact except for the states, which are those of all logs. Truth (ii) is the
on-policy value from separate sessions. Truth (iii) is the target of the estimates of slates: the sum over a slate whose
videos all follow the policy, in production's states; videos above a slot are sampled.

Estimators with a reward model use `RewardModel`, fitted to other users of production. Letters: P policies, R rankers, r
requests, s signals of `MEASURED`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from mmrf_jax import ops, types
from mmrf_jax.abtest import simulate
from mmrf_jax.data import sessions
from mmrf_jax.envs import collect, rollout
from mmrf_jax.envs.rankers import PrivilegedPolicy
from mmrf_jax.io import files, tables
from mmrf_jax.io.progress import counted, phase
from mmrf_jax.ope import estimators, policy_value
from mmrf_jax.parallel.partitioner import Partitioner
from mmrf_jax.signals import SHORT_VIDEO
from mmrf_jax.training import configs, restore, sources

MEASURED = ("click", "long_view", "like", "watch_time")
CLOSE = 0.05  # relative to production's watch time per video, truth (i): policies that differ by less count as close
_BATCH = 256  # sessions per batch
_DRAWS = 300  # bootstrap samples per log
_LOG_USERS, _SERVED_USERS, _MODEL_USERS = 300_000_000, 400_000_000, 500_000_000
_RIDGE = 100.0  # of the reward model, in exposures
#: Estimators of `ope.policy_value`, at its defaults: per video with a reward model, and of slates.
WITH_MODEL = ("dm", "dr", "sndr", "switch_dr", "dros")
OF_SLATES = ("sips", "rips", "snrips", "cascade_dr")
DEFAULT = "default"  # instead of a cap
_COLUMNS = np.array([SHORT_VIDEO.index(name) for name in MEASURED])

Score = Callable[[Any, Any], chex.Array]  # (parameters of the world, state) -> [B, C]


class RewardModel(NamedTuple):
    """Feedback as a bilinear function of a user's profile and a video's features, plus a term per slot."""

    bilinear: np.ndarray  # [1 + Du, 2 + Di, s]; the first of each side is constant, the last of a video its duration
    slot: np.ndarray  # [K, s]

    def of_candidates(self, profile: chex.Array, features: chex.Array) -> chex.Array:
        """Predict [B, C, s] for profiles [B, 1 + Du] and features [B, C, 2 + Di], without the slot's term."""
        return jnp.einsum("bu,ufs,bcf->bcs", profile, self.bilinear, features)


def seen_profile(profile):
    """Return the model's view [..., 1 + Du] of profiles [..., Du]."""
    return jnp.concatenate([jnp.ones((*profile.shape[:-1], 1)), profile], axis=-1)


def seen_features(items: types.Items) -> chex.Array:
    """Return the model's view [V, 2 + Di] of the videos."""
    duration = jnp.log(items.duration)[:, None]
    return jnp.concatenate([jnp.ones_like(duration), items.features, duration - duration.mean()], axis=-1)


def fit_reward_model(source: sources.Source, key: types.Key, number: int) -> RewardModel:
    """Fit a ridge regression to the log of `number` users of production."""
    assert source.sim is not None
    production = source.policies["production"]
    log = collect.collect(source.sim, production, key, first_user=_MODEL_USERS, num_sessions=number, day=0)
    session, request, slot = sessions.exposure_index(log)
    video = log.candidates[request, log.slate[request, slot]]
    user = np.asarray(seen_profile(jnp.asarray(log.profile)), np.float64)[session]
    item = np.asarray(seen_features(source.items), np.float64)[video]
    pairs = np.einsum("nu,nf->nuf", user, item).reshape(len(video), -1)
    inputs = np.concatenate([pairs, np.eye(source.spec.slate)[slot]], axis=1)
    reward = log.feedback[request, slot][:, _COLUMNS].astype(np.float64)
    gram = inputs.T @ inputs + _RIDGE * np.eye(inputs.shape[1])
    weight = np.linalg.solve(gram, inputs.T @ reward).astype(np.float32)
    return RewardModel(
        weight[: pairs.shape[1]].reshape(user.shape[1], item.shape[1], len(MEASURED)), weight[pairs.shape[1] :]
    )


def run_error_study(config, out: Path) -> dict[str, Any]:
    """Simulate logs and sessions, write OUT/table.json and OUT/table.md, and return the table.

    Args:
      config: see experiments/table_estimators.py.
      out: folder to write.

    Returns:
      {"policies": {name: {signal: {"truth": (i), "slate_truth": (iii), "on_policy": (ii), per session, "difference":
      relative difference of (i) to production's}}}, "close": names, "logs", "log_users", "log_requests", "sessions",
      "model_sessions", "estimators": {signal: {estimator: {cap: {policy: {"pooled": the estimate on all logs together,
      "coverage": among logs with an interval, the share whose interval contains the truth, None if no log has one,
      "mean": of the logs' estimates}}}}}, "summary": {signal: {estimator: {cap: `_summary`}}}}. The cap is "default"
      for estimators with their default parameters.

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
    model = fit_reward_model(source, jax.random.fold_in(key, 2), config.model_sessions)
    rows, truth, slate_truth = simulate_logs(source, scores, key, weights, users, config.log_requests, model)
    phase("sessions")
    earned = _serve(source, scores, jax.random.fold_in(key, 1), weights, config.sessions)
    phase("estimates")
    difference = truth / truth[names.index("production")] - 1.0
    by_estimator: dict[str, Any] = {signal: {} for signal in MEASURED}
    done = counted("estimates", len(names))
    for i, name in enumerate(names):
        for signal, estimator, cap, entry in _errors(rows, i, truth[i], slate_truth[i], config.logs, config.log_users):
            by_estimator[signal].setdefault(estimator, {}).setdefault(cap, {})[name] = entry
        done(i + 1)
    close = [name for name, x in zip(names, difference[:, MEASURED.index("watch_time")], strict=True) if abs(x) < CLOSE]
    policies = {
        name: {
            signal: {
                "truth": float(truth[i, j]),
                "slate_truth": float(slate_truth[i, j]),
                "on_policy": earned[i][signal],
                "difference": float(difference[i, j]),
            }
            for j, signal in enumerate(MEASURED)
        }
        for i, name in enumerate(names)
    }
    summary = {
        signal: {
            estimator: {
                cap: _summary(entries, policies, signal, close, "slate_truth" if estimator in OF_SLATES else "truth")
                for cap, entries in caps.items()
            }
            for estimator, caps in of_signal.items()
        }
        for signal, of_signal in by_estimator.items()
    }
    table = {"policies": policies, "close": close, "estimators": by_estimator, "summary": summary}
    table |= {name: config[name] for name in ("logs", "log_users", "log_requests", "sessions", "model_sessions")}
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


def _request_step(
    source: sources.Source, rankers: dict[str, Score], key: types.Key, weights: np.ndarray, model: RewardModel
):
    """Return a compiled function that serves one request by production to `_BATCH` users.

    It maps (state, request, user ids [B], live [B], number of the request, parameters of the world) to the next state,
    request and live [B], the columns [B, K, ...] of `simulate_logs`, and the two truths [P, s], summed over live users.
    """
    assert source.sim is not None and source.truth is not None
    sim, expected_feedback, k = source.sim, source.truth, source.spec.slate
    production = source.policies["production"]
    policies, features, noise_key = jnp.asarray(weights), seen_features(source.items), jax.random.fold_in(key, 3)

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
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(noise_key, t), i))(ids)
        gumbel = jax.vmap(lambda one: jax.random.gumbel(one, mixed.shape[-1:]))(keys)
        own = jax.lax.top_k(mixed + gumbel, k)[1]  # [P, B, K], slates of the policies
        q = model.of_candidates(seen_profile(request.profile), features[request.candidates])

        def add(odds, slot):  # lower slots are watched less, and videos already shown are removed
            below_logged, below_own = odds
            expected = expected_feedback(params, state, slot)[0][..., _COLUMNS]
            predicted = q + jnp.asarray(model.slot)[slot]

            def mean(odds, values):
                return jnp.einsum("pbc,bcs->pbs", odds / odds.sum(axis=-1, keepdims=True), values)

            logged = (mean(below_logged, expected), mean(below_logged, predicted))
            followed = (mean(below_own, expected), mean(below_own, predicted))
            policy = jnp.arange(len(policies))[:, None]
            odds = (
                below_logged.at[:, user, slate[:, slot]].set(0.0),
                below_own.at[policy, user, own[..., slot]].set(0.0),
            )
            return odds, (*logged, *followed, predicted[user, slate[:, slot]])

        start = jnp.exp(mixed)
        _, (would, direct, own_would, own_direct, predicted) = jax.lax.scan(add, (start, start), jnp.arange(k))
        rest = own_direct[::-1].cumsum(axis=0)[::-1] - own_direct  # [K, P, B, s], of the slots below
        result, state = sim.step_env(key, state, slate, params)
        going = live & ~(result.terminated | result.truncated)
        columns = {
            "log_propensity": log_propensity,
            "log_weight": jnp.moveaxis(log_weight, 0, -1),
            "reward": result.exposure.feedback[..., _COLUMNS],
            "predicted": jnp.moveaxis(predicted, 0, 1),
            "direct": jnp.moveaxis(direct, (2, 0), (0, 1)),
            "rest": jnp.moveaxis(rest, (2, 0), (0, 1)),
        }  # [B, K, ...]
        sums = [jnp.where(live[:, None], x.sum(axis=0), 0.0).sum(axis=1) for x in (would, own_would)]
        return state, result.request, going, columns, sums

    return step


def simulate_logs(
    source: sources.Source,
    rankers: dict[str, Score],
    key: types.Key,
    weights: np.ndarray,
    users: int,
    requests: int,
    model: RewardModel,
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Simulate the first requests of `users` sessions of production, and compute truths (i) and (iii).

    Returns:
      Columns of the exposed videos, by request and slot: "user" [n] and "request" [n] from 0, "log_propensity" [n],
      "log_weight" [n, P], "reward" [n, s], the model's "predicted" [n, s] and, under each policy, "direct" [n, P, s] of
      the slot and "rest" [n, P, s] of the slots below it. Truth (i) [P, s], the mean over them of the reward that each
      policy would expect in the same slot, and truth (iii) [P, s], the mean over requests.
    """
    assert source.sim is not None
    sim, k, step = source.sim, source.spec.slate, _request_step(source, rankers, key, weights, model)
    parts: list[dict[str, np.ndarray]] = []
    totals, number = np.zeros((2, len(weights), len(MEASURED))), 0
    done, reset = counted("logs", users), jax.jit(sim.reset_env)
    for first in range(0, users, _BATCH):
        ids = jnp.arange(_LOG_USERS + first, _LOG_USERS + first + _BATCH, dtype=jnp.int32)
        request, _, state = reset(key, sim.default_params, ids, jnp.int32(0))
        live = jnp.arange(first, first + _BATCH) < users
        for t in range(requests):
            now = np.flatnonzero(live)
            state, request, live, columns, sums = step(state, request, ids, live, t, sim.default_params)
            totals += np.asarray(sums, np.float64)
            part = {name: np.asarray(x)[now] for name, x in columns.items()}
            part["user"] = np.broadcast_to((first + now)[:, None], (len(now), k))
            part["request"] = np.broadcast_to((number + np.arange(len(now)))[:, None], (len(now), k))
            number += len(now)
            parts.append({name: x.reshape(-1, *x.shape[2:]) for name, x in part.items()})
        done(min(first + _BATCH, users))
    rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.argsort(rows["user"], kind="stable")
    return {name: x[order] for name, x in rows.items()}, totals[0] / len(order), totals[1] / number


def _errors(
    rows: dict[str, np.ndarray], policy: int, truth: np.ndarray, slate_truth: np.ndarray, logs: int, log_users: int
):
    """Yield (signal, estimator, cap, entry) of a policy, from all logs together and from each (`run_error_study`)."""
    edges = np.searchsorted(rows["user"], log_users * np.arange(logs + 1))
    pooled = _estimates(rows, policy, slice(None), draws=1, seed=0)
    each = [_estimates(rows, policy, slice(*edges[i : i + 2]), _DRAWS, seed=i) for i in range(logs)]
    for (signal, estimator, cap), (value, _) in pooled.items():
        true = (slate_truth if estimator in OF_SLATES else truth)[MEASURED.index(signal)]
        found = [x[signal, estimator, cap] for x in each]
        inside = [ci[0] <= true <= ci[1] for _, ci in found if ci is not None]
        mean = float(np.mean([x for x, _ in found]))
        yield signal, estimator, cap, {"pooled": value, "coverage": _mean(inside), "mean": mean}


_Found = dict[tuple[str, str, str], tuple[float, Sequence[float] | None]]  # {(signal, estimator, cap): value, interval}


def _estimates(rows: dict[str, np.ndarray], policy: int, part: slice, draws: int, seed: int) -> _Found:
    """Return all estimates of a policy from a part of the rows."""
    user, reward = rows["user"][part], rows["reward"][part]
    log_propensity, log_weight = rows["log_propensity"][part], rows["log_weight"][part, policy]
    decisions = estimators.LoggedDecisions(user, log_weight, reward)
    capped = estimators.estimate(decisions, MEASURED, draws=draws, seed=seed)["signals"]
    found: _Found = {
        (signal, estimator, cap): (entry["value"], entry["ci95"])
        for signal in MEASURED
        for estimator in ("ips", "ncis")
        for cap, entry in capped[signal][estimator].items()
    }
    log = {
        "pscore": np.exp(np.minimum(log_propensity, 0.0)),
        "target_pscore": np.exp(np.minimum(log_propensity + log_weight, 0.0)),
        "group": user,
        "draws": draws,
        "seed": seed,
    }
    predicted, direct, rest = rows["predicted"][part], rows["direct"][part, policy], rows["rest"][part, policy]
    for j, signal in enumerate(MEASURED):
        estimate = functools.partial(policy_value.estimate, reward[:, j], **log)
        q, v, below = predicted[:, j], direct[:, j], rest[:, j]
        made = estimate(estimators=WITH_MODEL, reward_model=(q, v))
        made |= estimate(estimators=OF_SLATES, reward_model=(q + below, v + below), slate_id=rows["request"][part])
        for name, x in made.items():
            found[signal, name, DEFAULT] = (x.value, None if np.isnan(x.low) else (x.low, x.high))
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of the values that are not None; None if there are none."""
    there = [x for x in values if x is not None]
    return float(np.mean(there)) if there else None


def _summary(
    entries: dict[str, Any], policies: dict[str, Any], signal: str, close: list[str], target: str = "truth"
) -> dict[str, Any]:
    """Summarise the entries of an estimator and cap over all policies and over the close ones.

    Args:
      target: of the estimator, "truth" (i) or "slate_truth" (iii).

    Returns:
      {"all" | "close": {"error": mean |pooled / target − 1|, "coverage": of the target, and rank correlations of the
      pooled estimates with the target, "rank", and with truth (ii), "rank_on_policy"}}; correlations are None for fewer
      than 3 policies.
    """
    result = {}
    for group, names in (("all", list(entries)), ("close", close)):
        pooled = np.array([entries[name]["pooled"] for name in names])
        truth, earned = (np.array([policies[n][signal][key] for n in names]) for key in (target, "on_policy"))

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


#: Estimators whose names are no abbreviations in capitals.
_LABELS = {"switch_dr": "Switch-DR", "dros": "DRos", "cascade_dr": "Cascade-DR"}


def label(estimator: str, cap: str) -> str:
    """Return the name of an estimator in tables."""
    return "SNIPS" if (estimator, cap) == ("ncis", "inf") else _LABELS.get(estimator, estimator.upper())


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
        header += [f"{name}, {group}" for name in ("relative error, %", "coverage", "rank", "rank (ii)")]
    lines = []
    for signal, of_signal in table["summary"].items():
        for estimator, caps in of_signal.items():
            for cap, groups in caps.items():
                cells = [signal, label(estimator, cap), "–" if cap == DEFAULT else cap]
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
