"""Evaluation of a run: A/B tests, offline metrics, model quality, and the model exploitation gap."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from mmrf_jax import types
from mmrf_jax.abtest import aa, simulate, simulate_days, summary
from mmrf_jax.agents import boosting, popularity, registry
from mmrf_jax.data import sessions
from mmrf_jax.data.session_log import SessionLog
from mmrf_jax.envs import base, learned
from mmrf_jax.io import extras
from mmrf_jax.io.progress import counted, phase, say
from mmrf_jax.metrics import model_quality, offline, ranking
from mmrf_jax.ope import behavior_policy, estimators
from mmrf_jax.training import configs, off_policy, predictions, sources, steps

#: Upper limits on the requests that sessions of the model exploitation gap start from: in total, and per session.
_GAP_POOL, _GAP_POOL_A_SESSION = 8_192, 4
_MAX_SESSION = 64  # requests, if a config sets no maximum session length


def ab_key(seed: int) -> types.Key:
    """Return the PRNG key of a seed's A/B test, whose users are 0, 1, …"""
    return jax.random.fold_in(types.make_key(seed), 12)


def compare(
    config: configs.Run,
    source: sources.Source,
    policies: dict[str, Any],
    mesh,
    *,
    days: int = 1,
    hashed: bool = False,
    cuped: bool = False,
    always_valid: bool = False,
    observe: Callable[[Mapping[str, Mapping[str, np.ndarray]]], object] = lambda sums: None,
) -> dict[str, Any]:
    """Run an A/B test in the source's simulator, with progress; the first arm is the control.

    Args:
      days: simulated days; above 1, users return (`simulate_days.compare`).
      hashed: whether each user is in one arm, by hash, instead of in all of them.
      cuped: as in `simulate.compare`.
      always_valid: as in `simulate.compare`.
      observe: as in `simulate.compare`, for tests of one day.

    Raises:
      ValueError: without a simulator, or for days outside the simulator's range.
    """
    names = list(policies)
    sim, key = _simulator(config, source)
    options: dict[str, Any] = {
        "control": names[0],
        "num_users": config.ab_test.sessions,
        "k": source.spec.slate,
        "cuped": cuped,
        "always_valid": always_valid,
        "salt": f"A/B test of seed {config.seed}" if hashed else None,
        "progress": counted("ab_test", config.ab_test.sessions * len(names) * days),
    }
    if days == 1:
        return simulate.compare(sim, policies, key, mesh, day=config.ab_test.day, observe=observe, **options)
    sources.check_days(config, days)
    return simulate_days.compare(sim, policies, key, mesh, first_day=config.ab_test.day, days=days, **options)


def aa_tests(
    config: configs.Run, source: sources.Source, policy, mesh, tests: int, cuped: bool = False
) -> dict[str, Any]:
    """Return `abtest.aa.coverage` of 2 × config.ab_test.sessions sessions served by one policy."""
    number = 2 * config.ab_test.sessions
    (sim, key), day = _simulator(config, source), config.ab_test.day
    phase("serve")
    sums = simulate.rollout_user_metrics(
        sim, policy, key, mesh, first_user=0, num_users=number, day=day, k=source.spec.slate
    )
    means = simulate.history_means(sim, key, sums["user_id"], day, min(simulate.BLOCK, number)) if cuped else None
    phase("aa_tests")
    return aa.coverage(
        sim.signals, {name: x for name, x in sums.items() if name not in simulate.NOT_TESTED}, tests, means
    )


def _simulator(config: configs.Run, source: sources.Source) -> tuple[base.Simulator, types.Key]:
    """Return the simulator of a config's A/B tests and its PRNG key.

    Raises:
      ValueError: for a source without a simulator.
    """
    if source.sim is None:
        raise ValueError(
            f"A/B tests need a simulator, but config.source is {config.source!r}; use the config `world`, or "
            "config.simulator=feedback with config.simulator_checkpoint=RUN"
        )
    return source.sim._replace(items=source.items), ab_key(config.seed)


def evaluate(
    config, source: sources.Source, state: steps.TrainState, mesh, thorough: bool = False, with_baselines: bool = True
) -> dict[str, Any]:
    """Compute offline metrics and model quality on the held-out logs; on KuaiRand also for popularity and boosting.

    Args:
      thorough: whether to compare model quality with the simple predictors in the world too (which needs the training
        log), estimate the ranker's off-policy value, evaluate the feedback model's uncertainty, and simulate sessions
        with the model.
      with_baselines: whether simple predictors and rankers (no trained agents) also score real logs.

    Returns:
      {"offline": metrics of the test log, "fidelity": model quality on it, "offline_other", "fidelity_other":
      {log: the same}, "excess_logloss": {log: {signal: by decile of uncertainty}}, "simulated_sessions": {log:
      {"requests" | main signal per session: {"ks": distance to the log's, "simulated", "actual": means}}},
      "off_policy": {log: `off_policy.evaluate`}}. Among the other logs, `test_frozen` is the test log again, with every
      request scored without any feedback of the test days (`sessions.freeze_histories`).
    """
    plan, signals = steps.plan_of(config, source.spec.signals), source.spec.signals
    agents = registry.get(config.method).signals(plan.agents)
    tests = source.test()
    train: offline.Rows | None = None
    baselines: dict[str, Any] = {}
    simple: dict[str, Any] = {}
    if (source.sim is None or thorough) and with_baselines:
        try:
            simple, baselines = _simple(source, tests)
        except extras.MissingExtra as missing:
            say(f"no simple predictors and rankers to compare with: {missing}")
            with_baselines = False
    if source.sim is None:
        train = offline.exposures(source.train())
        tests["test_frozen"] = sessions.freeze_histories(tests["test"])
        for scores in (baselines, simple):  # these use no feedback of the test days
            scores |= {"test_frozen": scores["test"]} if with_baselines else {}
    offlines, fidelities, certainties, distances, off_policies = {}, {}, {}, {}, {}
    for name, log in tests.items():
        per_segment = 1 if name == "test_frozen" else config.train.segment
        rows, found = score(source, plan, state, log, per_segment)
        duration = np.asarray(source.items.duration)[rows.video]
        before = _history_rows(log) if train is None else train
        rankers = baselines.get(name)
        if rankers is not None:  # on real logs, also compare with the run's own predictors and the logistic regression
            mine = {"critics" if predictor == "agents" else "feedback_model": x for predictor, x in found.items()}
            rankers = rankers | {"logistic": simple[name]["logistic"]} | mine
        offlines[name] = offline.metrics(rows, signals, agents, before, duration, rankers)
        if found or name in simple:
            predicted = found | simple.get(name, {})
            fidelities[name] = model_quality.metrics(signals, rows.user_id, rows.feedback, predicted)
        if thorough and name != "test_frozen":
            off_policies[name] = off_policy.evaluate(config, source, plan, state, log)
        if thorough and plan.use_feedback_model and name != "test_frozen":
            certainties[name] = _excess(rows.feedback, found["model"], source, plan, state, log, per_segment)
            distances[name] = _session_distances(config, source, plan, state, log, mesh)
    result: dict[str, Any] = {"offline": offlines.pop("test"), "signals": signals.as_dict()}
    result |= {"excess_logloss": certainties, "simulated_sessions": distances} if distances else {}
    result |= {"off_policy": off_policies} if off_policies else {}
    result |= {"offline_other": offlines} if offlines else {}
    result |= {"fidelity": fidelities.pop("test")} if fidelities else {}
    return result | ({"fidelity_other": fidelities} if fidelities else {})


def _excess(feedback, found, source, plan, state, log, num_requests) -> dict[str, Any]:
    """Return {binary signal: `model_quality.excess_logloss_by_decile` of the feedback model's exposures}."""

    def one(batch):
        return np.moveaxis(predictions.uncertainty(state, batch, predictions.shown(batch), source.items, plan), -1, -2)

    u = offline.score_log(one, log, num_requests=num_requests).scores
    return {
        signal: model_quality.excess_logloss_by_decile(u[:, i], found[signal], feedback[:, i])
        for i, signal in zip(source.spec.signals.binary, source.spec.signals.binary_names, strict=True)
    }


def _session_distances(config: configs.Run, source, plan, state, log: SessionLog, mesh) -> dict[str, Any]:
    """Compare sessions simulated by the feedback model on the log's slates with the log's: length and main signal.

    Past the end of a logged session the model draws other logged requests (`envs.learned`).
    """
    model = feedback_simulator(source, plan, state, log)
    policy = base.privileged_policy(learned.logged_slates, 0.0)
    key = jax.random.fold_in(types.make_key(config.seed), 14)
    served = simulate.rollout_user_metrics(
        model, policy, key, mesh, first_user=0, num_users=log.num_sessions, day=0, k=source.spec.slate
    )
    log = sessions.select_sessions(log, np.arange(int(model.params.pool.num_sessions)))  # its starts
    session, request, slot = sessions.exposure_index(log)
    main = source.spec.signals.main
    total = np.bincount(session, log.feedback[request, slot, source.spec.signals.index(main)], log.num_sessions)
    result = {}
    for name, actual in (("requests", np.diff(log.offsets)), (main, total)):
        ks = model_quality.ks_distance(served[name], actual)
        result[name] = {"ks": ks, "simulated": float(served[name].mean()), "actual": float(actual.mean())}
    return result


def _simple(source: sources.Source, tests: dict[str, SessionLog]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Predict with the simple predictors and rankers, which need no trained agents.

    Returns:
      {log: {predictor: {signal: [n]}}} of the per-video mean and a logistic regression on plain features; and on real
      logs {log: {ranker: {signal: [n]}}} of popularity and boosting.
    """
    phase("logistic")
    train, valid, items = source.train(), None if source.valid is None else source.valid(), source.items
    signals = source.spec.signals
    past = [train] if valid is None else [train, valid]
    at_train = boosting.table(train, items, signals, [train], seed=0)
    at_tests = {name: boosting.table(log, items, signals, past) for name, log in tests.items()}
    features = {name: rows.features for name, rows in at_tests.items()}
    linear = model_quality.logistic(signals, at_train.features, at_train.feedback, features)
    known = offline.exposures(train)
    simple = {
        name: {
            "per_video_mean": model_quality.per_video_mean(
                signals, known.video, known.feedback, rows.video, items.num_videos
            ),
            "logistic": linear[name],
        }
        for name, rows in at_tests.items()
    }
    if source.sim is not None:
        return simple, {}
    phase("boosting")

    def measure(users, scores, labels):
        return ranking.grouped_auc(users, scores, {"label": labels})["label"].value

    at_valid = None if valid is None else boosting.table(valid, items, signals, past)
    boosted = boosting.scores(signals, at_train, at_valid, features, measure)
    means = popularity.smoothed_means(signals, known.video, known.feedback, items.num_videos)
    popular = {name: dict(zip(signals.names, means[rows.video].T, strict=True)) for name, rows in at_tests.items()}
    return simple, {name: {"popularity": popular[name], "boosting": boosted[name]} for name in tests}


def feedback_simulator(
    source: sources.Source, plan: steps.TrainConfig, state: steps.TrainState, log: SessionLog, **options
):
    """Return the run's feedback model as a simulator over the session starts of a log."""
    longest = source.config.world.max_requests if source.config.source == "world" else _MAX_SESSION
    return learned.make(steps.model_of(state), source.items, plan.feedback, log, longest, **options)


def model_exploitation_gap(
    config: configs.Run,
    source: sources.Source,
    plan: steps.TrainConfig,
    state: steps.TrainState,
    log: SessionLog,
    mesh,
    arms_beside: Mapping[str, base.Policy],
) -> dict[str, float]:
    """Compute the newest policy's return in the feedback model and in the source's simulator: main signal per session.

    Args:
      arms_beside: the other arms of the run's A/B test; sharing its compiled program avoids a new compilation.

    Returns:
      {"model", "world", "gap"}; "gap" is model − world, the model exploitation gap: how far the policy profits from
      errors of the model.
    """
    assert source.sim is not None
    policy = registry.get(plan.method).make_policy(state.agents, source.items, plan.agents)
    pool = min(_GAP_POOL, _GAP_POOL_A_SESSION * config.collect.sessions)  # the same size for the log of every round
    model = feedback_simulator(source, plan, state, log, pool_requests=pool)
    number = config.alternation.gap_sessions
    key = jax.random.fold_in(types.make_key(config.seed), 13)
    chosen = base.choices({**arms_beside, config.method: policy})[config.method]
    world, capacity = _simulator(config, source)[0], simulate.block_users(config.ab_test.sessions, mesh)
    serving: dict[str, tuple[base.Simulator, Any, int]] = {
        "model": (model, policy, number),
        "world": (world, chosen, capacity),
    }
    earned, done = {}, counted("model_exploitation_gap", 2)
    for name, (sim, ranker, most) in serving.items():
        served = simulate.rollout_user_metrics(
            sim, ranker, key, mesh, first_user=0, num_users=number, day=0, k=source.spec.slate, capacity=most
        )
        earned[name] = float(served[source.spec.signals.main].mean())
        done(len(earned))
    return earned | {"gap": earned["model"] - earned["world"]}


def _history_rows(log: SessionLog) -> offline.Rows:
    """Return the exposures in users' histories before the log, for their median watch time."""
    mask = log.history_mask
    user = np.broadcast_to(log.user_id[:, None], mask.shape)
    empty = np.zeros((int(mask.sum()), 0), np.float32)
    return offline.Rows(user[mask], log.history_videos[mask], log.history_feedback[mask], empty)


def score(
    source: sources.Source, plan: steps.TrainConfig, state: steps.TrainState, log: SessionLog, num_requests: int
) -> tuple[offline.Rows, dict[str, dict[str, np.ndarray]]]:
    """Score every exposure of a log with a run, in segments of `num_requests`, and predict its feedback.

    Returns:
      The exposures with scores, and {predictor: {signal: [n]}} for each of `plan.predictors`.
    """

    def one(batch):
        out = jax.device_get(predictions.evaluate(state, batch, source.items, plan))
        parts = [np.take_along_axis(out["scores"], batch.slate[..., None, :], axis=-1)]
        return np.concatenate([*parts, *(np.moveaxis(out[name], -1, -2) for name in plan.predictors)], axis=-2)

    total = len(sessions.segment_index(log, num_requests))
    rows = offline.score_log(one, log, num_requests=num_requests, progress=counted("offline", total))
    num_agents = len(registry.get(plan.method).signals(plan.agents))
    expected = np.split(rows.scores[:, num_agents:], max(len(plan.predictors), 1), axis=1)
    found = {
        name: dict(zip(source.spec.signals.names, x.T, strict=True))
        for name, x in zip(plan.predictors, expected, strict=False)
    }
    return dataclasses.replace(rows, scores=rows.scores[:, :num_agents]), found


def print_results(result: dict[str, Any]) -> None:
    """Print the result tables to stdout."""
    if "ab_test" in result or "aa" in result:
        print(summary.describe(result))
    if "offline" in result:
        print(offline.format_table(result["offline"]))
    for name, entries in result.get("offline_other", {}).items():
        print(f"\n{name}:")
        print(offline.format_table(entries))
    fidelities = {"test": result["fidelity"]} if "fidelity" in result else {}
    for name, entries in (fidelities | result.get("fidelity_other", {})).items():
        print(f"\nfidelity, {name}:")
        print(model_quality.format_table(entries))
    for name, entries in result.get("off_policy", {}).items():
        print(f"\noff-policy estimates of the stochastic ranker, {name}, {entries['propensities']} propensities:")
        print(estimators.format_table(entries["units"]))
        if "behaviour" in entries:
            print(f"\npropensities of the behaviour model, {name}:")
            print(behavior_policy.format_table(entries["behaviour"]))
    for name, entries in result.get("simulated_sessions", {}).items():
        print(f"\nsessions of the feedback model and of the log, {name}:")
        print(_table({"model": entries}, ("ks", "simulated", "actual")))
    for name, entries in result.get("excess_logloss", {}).items():
        print(f"\nlog-loss beyond what was expected, by decile of uncertainty, {name}:")
        for signal, deciles in entries.items():
            print(f"{signal:<14}" + " ".join(f"{decile['excess']:+.4f}" for decile in deciles))
    if "selection_bias" in result:
        print("\nmean |predicted − true| on impressions and on non-impressions, and their ratio:")
        print(_table(result["selection_bias"], ("impressions", "non_impressions", "ratio")))
    if "uncertainty" in result:
        print("\nrank correlation of uncertainty with |predicted − true|:")
        print(_table({"model": result["uncertainty"]}, ("spearman", "within_deciles", "spearman_of_prediction")))
    if "sample_auc" in result:
        print(f"\nAUC of sampled non-impressions against the pool: {result['sample_auc']:.4f}")


def _table(entries: dict[str, dict[str, dict[str, Any]]], columns: tuple[str, ...]) -> str:
    lines = ["| signal | predictor | " + " | ".join(columns) + " |", "|---" * (2 + len(columns)) + "|"]

    def number(x):
        return "–" if x is None else f"{x:.4g}"

    for predictor, signals in entries.items():
        for signal, entry in signals.items():
            lines.append(f"| {signal} | {predictor} | " + " | ".join(number(entry[c]) for c in columns) + " |")
    return "\n".join(lines)
