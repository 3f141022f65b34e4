"""Evaluation of a run: A/B tests, offline metrics, model quality, and the model exploitation gap."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from mmrf_jax import types
from mmrf_jax.abtest import aa, simulate, simulate_days
from mmrf_jax.agents import boosting, popularity, registry
from mmrf_jax.data import sessions
from mmrf_jax.data.session_log import Sessions
from mmrf_jax.envs import learned, rankers
from mmrf_jax.envs.environment import Environment
from mmrf_jax.io import extras
from mmrf_jax.io.progress import counted, phase, say
from mmrf_jax.metrics import model_quality, offline, ranking
from mmrf_jax.parallel import multihost
from mmrf_jax.parallel.partitioner import Partitioner
from mmrf_jax.training import configs, off_policy, predictions, sources, steps, train_state
from mmrf_jax.training.train_state import TrainState

#: Upper limits on the requests that sessions of the model exploitation gap start from: in total, and per session.
_GAP_POOL, _GAP_POOL_A_SESSION = 8_192, 4
_FROZEN = "test_frozen_history"  # name of a split
_CHECKS = 32  # for a stop signal while a log is scored, whatever the share of a process
_MAX_SESSION = 64  # requests, if a config sets no maximum session length


def ab_key(seed: int) -> types.Key:
    """Return the PRNG key of a seed's A/B test, whose users are 0, 1, …"""
    return jax.random.fold_in(types.make_key(seed), 12)


def run_ab_test(
    config: configs.Run,
    source: sources.Source,
    policies: dict[str, Any],
    partitioner: Partitioner,
    *,
    days: int = 1,
    hashed: bool = False,
    cuped: bool = False,
    always_valid: bool = False,
    observe: Callable[[Mapping[str, Mapping[str, np.ndarray]]], object] = lambda sums: None,
) -> dict[str, Any]:
    """Run an A/B test in the source's simulator, with progress; the first arm is the control.

    Args:
      days: simulated days; above 1, users return (`simulate_days.simulate_ab_test_by_day`).
      hashed: whether each user is in one arm, by hash, instead of in all of them.
      cuped: as in `simulate.Design`.
      always_valid: as in `simulate.Design`.
      observe: as in `simulate.simulate_ab_test`, for tests of one day.

    Raises:
      ValueError: without a simulator, or for days outside the simulator's range.
    """
    names = list(policies)
    sim, key = _simulator(config, source)
    salt = f"A/B test of seed {config.seed}" if hashed else None
    design = simulate.Design(names[0], config.ab_test.sessions, salt, cuped, always_valid)
    test, first_day = (sim, policies, key, partitioner, design), config.ab_test.day
    progress = counted("ab_test", design.num_users * len(names) * days)
    if days == 1:
        return simulate.simulate_ab_test(*test, day=first_day, progress=progress, observe=observe)
    sources.check_days(config, days)
    return simulate_days.simulate_ab_test_by_day(*test, first_day=first_day, days=days, progress=progress)


def aa_tests(
    config: configs.Run, source: sources.Source, policy, partitioner: Partitioner, tests: int, cuped: bool = False
) -> dict[str, Any]:
    """Return `abtest.aa.coverage` of 2 × config.ab_test.sessions sessions served by one policy."""
    number = 2 * config.ab_test.sessions
    (sim, key), day = _simulator(config, source), config.ab_test.day
    phase("serve")
    sums = simulate.rollout_user_metrics(sim, policy, key, partitioner, user_ids=np.arange(number), day=day)
    means = simulate.history_means(sim, key, sums["user_id"], day, min(simulate.BLOCK, number)) if cuped else None
    phase("aa_tests")
    return aa.coverage(
        sim.signals, {name: x for name, x in sums.items() if name not in simulate.NOT_TESTED}, tests, means
    )


def _simulator(config: configs.Run, source: sources.Source) -> tuple[Environment, types.Key]:
    """Return the simulator of a config's A/B tests and its PRNG key.

    Raises:
      ValueError: for a source without a simulator.
    """
    if source.sim is None:
        raise ValueError(
            f"A/B tests need a simulator, but config.source is {config.source!r}; use the config `world`, or "
            "config.simulator=feedback with config.simulator_checkpoint=RUN"
        )
    return source.sim.with_items(source.items), ab_key(config.seed)


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A run as evaluators see it.

    Attributes:
      source: its items are on the devices of `state`.
      state: what the run has learned.
      partitioner: of the devices that `state` is on.
      arms: the policies of the run's A/B test in addition to its own.
      begin: (name, program) -> None; announces a phase of evaluation, and waits until a program of that name, which is
        compiled in the background, is ready.
    """

    config: configs.Run
    plan: steps.TrainConfig
    source: sources.Source
    state: TrainState
    partitioner: Partitioner
    arms: Mapping[str, rankers.AnyRanker] = dataclasses.field(default_factory=dict)
    begin: Callable[..., None] = lambda name, program=None: phase(name)

    def local(self) -> TrainedRun:
        """Return the run on this process's devices only; all processes must call it."""
        partitioner, state = Partitioner.local(), multihost.to_local(self.state)
        return dataclasses.replace(self, source=self.source.local(), state=state, partitioner=partitioner)


@dataclasses.dataclass
class Split:
    """Sessions that a run is evaluated on.

    Attributes:
      name: such as "test".
      read: makes their log.
    """

    name: str
    read: Callable[[], Sessions]

    @functools.cached_property
    def log(self) -> Sessions:
        """Return the log; made once."""
        return self.read()


@dataclasses.dataclass
class ScoredSplit(Split):
    """A held-out log with every exposure scored.

    Attributes:
      rows: the exposures, scored by the run.
      predicted: {predictor of the run: {signal: [n]}}.
      before: exposures before the log, for users' median watch time.
      num_requests: T of the segments in which it was scored.
      simple: {simple predictor: {signal: [n]}}; {} without them.
      rankers: {simple ranker: {signal: [n]}}; None without them.
    """

    rows: offline.Rows
    predicted: dict[str, dict[str, np.ndarray]]
    before: offline.Rows
    num_requests: int
    simple: Mapping[str, Any]
    rankers: Mapping[str, Any] | None

    @property
    def frozen(self) -> bool:
        """Return whether this is the test log without any feedback of the test days."""
        return self.name == _FROZEN


#: (run, split) -> metrics; None if there is nothing to measure.
Evaluator = Callable[[TrainedRun, Any], dict[str, Any] | None]


def evaluate(run: TrainedRun, thorough: bool = False, with_baselines: bool = True) -> dict[str, Any]:
    """Call the evaluators on the held-out logs; on KuaiRand popularity and boosting are compared too.

    Several processes share the work: each scores a part of every log, and measures some of the signals.

    Args:
      run: on this process's devices.
      thorough: whether to call `THOROUGH_EVALUATORS` too, and compare model quality with the simple predictors in the
        world too (which needs the training log).
      with_baselines: whether simple predictors and rankers (no trained agents) also score real logs.

    Returns:
      {"offline": metrics of the test log, "model_quality": of its predictions; "offline/LOG" and "model_quality/LOG":
      the same of other logs; "excess_logloss": {log: {signal: by decile of uncertainty}}, "simulated_sessions": {log:
      {"requests" | main signal per session: {"ks": distance to the log's, "simulated", "actual": means}}},
      "off_policy": {log: `off_policy.evaluate`}}. Among the other logs, `test_frozen_history` is the test log again,
      with every request scored without any feedback of the test days (`sessions.freeze_histories`).
    """
    evaluators = EVALUATORS | (THOROUGH_EVALUATORS if thorough else {})
    found: dict[str, dict[str, Any]] = {name: {} for name in evaluators}
    for split in _scored_splits(run, with_baselines and (thorough or run.source.sim is None)):
        for name, evaluator in evaluators.items():
            if (metrics := evaluator(run, split)) is not None:
                found[name][split.name] = metrics
    result: dict[str, Any] = {"signals": run.source.spec.signals.as_dict()}
    for name, by_log in found.items():
        if name in EVALUATORS:
            result |= {offline.key(name, log): metrics for log, metrics in by_log.items()}
        elif by_log:
            result[name] = by_log
    return result


def _scored_splits(run: TrainedRun, with_baselines: bool) -> Iterator[ScoredSplit]:
    """Yield the held-out logs, each scored when it is its turn."""
    source, tests = run.source, run.source.test()
    simple: dict[str, Any] = {}
    rankers: dict[str, Any] = {}
    if with_baselines:
        try:
            simple, rankers = _simple(source, tests)
        except extras.MissingExtra as missing:
            say(f"no simple predictors and rankers to compare with: {missing}")
    train: offline.Rows | None = None
    if source.sim is None:
        train = offline.exposures(source.train())
        tests[_FROZEN] = sessions.freeze_histories(tests["test"])
        for scores in (simple, rankers):  # these use no feedback of the test days
            scores |= {_FROZEN: scores["test"]} if scores else {}
    for name, log in tests.items():
        num_requests = 1 if name == _FROZEN else run.config.train.segment
        rows, predicted = score(run, log, num_requests)
        yield ScoredSplit(
            name,
            functools.partial(tests.__getitem__, name),
            rows=rows,
            predicted=predicted,
            before=_history_rows(log) if train is None else train,
            num_requests=num_requests,
            simple=simple.get(name, {}),
            rankers=rankers.get(name),
        )


def _ranking(run: TrainedRun, split: ScoredSplit) -> dict[str, Any]:
    """Return `offline.metrics`; on real logs also of simple rankers, logistic regression, and the run's predictors."""
    rankers = split.rankers
    if rankers is not None:
        own = {"critics" if name == "agents" else "feedback_model": x for name, x in split.predicted.items()}
        rankers = {**rankers, "logistic": split.simple["logistic"], **own}
    agents = registry.get(run.config.method).signals(run.plan.agents)
    duration = np.asarray(run.source.items.duration)[split.rows.video]
    signals, each = run.source.spec.signals, multihost.share_out
    return offline.metrics(split.rows, signals, agents, split.before, duration, rankers, each=each)


def _model_quality(run: TrainedRun, split: ScoredSplit) -> dict[str, Any] | None:
    """Return `model_quality.metrics` of the run's predictors and the simple ones."""
    predicted, rows = split.predicted | dict(split.simple), split.rows
    if not predicted:
        return None
    signals, each = run.source.spec.signals, multihost.share_out
    return model_quality.metrics(signals, rows.user_id, rows.feedback, predicted, each=each)


def _off_policy(run: TrainedRun, split: ScoredSplit) -> dict[str, Any] | None:
    """Return `off_policy.evaluate`."""
    if split.frozen:
        return None
    return off_policy.evaluate(run.config, run.source, run.plan, run.state, split.log)


def _excess(run: TrainedRun, split: ScoredSplit) -> dict[str, Any] | None:
    """Return {binary signal: `model_quality.excess_logloss_by_decile` of the feedback model's exposures}."""
    if split.frozen or not run.plan.use_feedback_model:
        return None

    def one(batch):
        shown = predictions.shown(batch)
        return np.moveaxis(predictions.uncertainty(run.state, batch, shown, run.source.items, run.plan), -1, -2)

    u = _scored(run, one, split.log, split.num_requests).scores
    found, feedback, signals = split.predicted["model"], split.rows.feedback, run.source.spec.signals
    return {
        signal: model_quality.excess_logloss_by_decile(u[:, i], found[signal], feedback[:, i])
        for i, signal in zip(signals.binary, signals.binary_names, strict=True)
    }


def _simulated_sessions(run: TrainedRun, split: ScoredSplit) -> dict[str, Any] | None:
    """Compare sessions simulated by the feedback model on the log's slates with the log's: length and main signal.

    Past the end of a logged session the model draws other logged requests (`envs.learned`).
    """
    if split.frozen or not run.plan.use_feedback_model:
        return None
    log = split.log
    model = feedback_simulator(run.source, run.plan, run.state, log)
    policy = rankers.PrivilegedPolicy(learned.logged_slates, 0.0)
    key = jax.random.fold_in(types.make_key(run.config.seed), 14)
    served = simulate.rollout_user_metrics(
        model, policy, key, run.partitioner, user_ids=np.arange(log.num_sessions), day=0
    )
    log = sessions.select_sessions(log, np.arange(int(model.default_params.pool.num_sessions)))  # its starts
    session, request, slot = sessions.exposure_index(log)
    main = run.source.spec.signals.main
    total = np.bincount(session, log.feedback[request, slot, run.source.spec.signals.index(main)], log.num_sessions)
    result = {}
    for name, actual in (("requests", np.diff(log.offsets)), (main, total)):
        ks = model_quality.ks_distance(served[name], actual)
        result[name] = {"ks": ks, "simulated": float(served[name].mean()), "actual": float(actual.mean())}
    return result


#: Evaluators of a held-out log, by their keys in results.json.
EVALUATORS: dict[str, Evaluator] = {"offline": _ranking, "model_quality": _model_quality}
#: More of them in `mmrf evaluate`.
THOROUGH_EVALUATORS: dict[str, Evaluator] = {
    "off_policy": _off_policy,
    "excess_logloss": _excess,
    "simulated_sessions": _simulated_sessions,
}


def _simple(source: sources.Source, tests: dict[str, Sessions]) -> tuple[dict[str, Any], dict[str, Any]]:
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
    each = multihost.share_out
    linear = model_quality.logistic(signals, at_train.features, at_train.feedback, features, each=each)
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
    boosted = boosting.scores(signals, at_train, at_valid, features, measure, each=each)
    means = popularity.smoothed_means(signals, known.video, known.feedback, items.num_videos)
    popular = {name: dict(zip(signals.names, means[rows.video].T, strict=True)) for name, rows in at_tests.items()}
    return simple, {name: {"popularity": popular[name], "boosting": boosted[name]} for name in tests}


def feedback_simulator(source: sources.Source, plan: steps.TrainConfig, state: TrainState, log: Sessions, **options):
    """Return the run's feedback model as a simulator over the session starts of a log."""
    longest = source.config.world.max_requests if source.config.source == "world" else _MAX_SESSION
    return learned.make_learned_env(train_state.model_of(state), source.items, plan.feedback, log, longest, **options)


def model_exploitation_gap(run: TrainedRun, split: Split) -> dict[str, float]:
    """Compute the newest policy's return in the feedback model and in the source's simulator: main signal per session.

    Args:
      run: its `arms` are those of its A/B test; sharing that test's compiled program avoids a new compilation.
      split: the log whose session starts the feedback model simulates.

    Returns:
      {"model", "world", "gap"}; "gap" is model − world, the model exploitation gap: how far the policy profits from
      errors of the model.
    """
    config, source, partitioner = run.config, run.source, run.partitioner
    policy = registry.get(run.plan.method).make_policy(run.state.agents, source.items, run.plan.agents)
    pool = min(_GAP_POOL, _GAP_POOL_A_SESSION * config.collect.sessions)  # the same size for the log of every round
    model = feedback_simulator(source, run.plan, run.state, split.log, pool_requests=pool)
    number = config.alternation.gap_sessions
    key = jax.random.fold_in(types.make_key(config.seed), 13)
    chosen = rankers.choices({**run.arms, config.method: policy})[config.method]
    world, capacity = _simulator(config, source)[0], simulate.block_users(config.ab_test.sessions, partitioner)
    serving: dict[str, tuple[Environment, Any, int]] = {
        "model": (model, policy, number),
        "world": (world, chosen, capacity),
    }
    earned, done = {}, counted("model_exploitation_gap", 2)
    for name, (sim, ranker, most) in serving.items():
        served = simulate.rollout_user_metrics(
            sim, ranker, key, partitioner, user_ids=np.arange(number), day=0, capacity=most
        )
        earned[name] = float(served[source.spec.signals.main].mean())
        done(len(earned))
    return earned | {"gap": earned["model"] - earned["world"]}


def ranking_of_valid(
    config: configs.Run, source: sources.Source, plan: steps.TrainConfig, state: TrainState
) -> dict[str, Any]:
    """Return `offline.metrics` of a run on the validation days of its logs.

    Raises:
      ValueError: for a source without validation days.
    """
    if source.valid is None:
        raise ValueError(f"config.source={config.source!r} has no validation days here; keep some in its split")
    run = TrainedRun(config, plan, source, state, Partitioner())
    rows, _ = score(run, source.valid(), config.train.segment)
    agents = registry.get(config.method).signals(plan.agents)
    duration = np.asarray(source.items.duration)[rows.video]
    return offline.metrics(rows, source.spec.signals, agents, offline.exposures(source.train()), duration, None)


def _history_rows(log: Sessions) -> offline.Rows:
    """Return the exposures in users' histories before the log, for their median watch time."""
    mask = log.history_mask
    user = np.broadcast_to(log.user_id[:, None], mask.shape)
    empty = np.zeros((int(mask.sum()), 0), np.float32)
    return offline.Rows(user[mask], log.history_videos[mask], log.history_feedback[mask], empty)


def score(run: TrainedRun, log: Sessions, num_requests: int) -> tuple[offline.Rows, dict[str, dict[str, np.ndarray]]]:
    """Score every exposure of a log with a run, in segments of `num_requests`, and predict its feedback.

    Returns:
      The exposures with scores, and {predictor: {signal: [n]}} for each of `plan.predictors`.
    """
    plan = run.plan

    def one(batch):
        out = jax.device_get(predictions.evaluate(run.state, batch, run.source.items, plan))
        parts = [np.take_along_axis(out["scores"], np.asarray(batch.slate)[..., None, :], axis=-1)]
        return np.concatenate([*parts, *(np.moveaxis(out[name], -1, -2) for name in plan.predictors)], axis=-2)

    rows = _scored(run, one, log, num_requests)
    num_agents = len(registry.get(plan.method).signals(plan.agents))
    expected = np.split(rows.scores[:, num_agents:], max(len(plan.predictors), 1), axis=1)
    found = {
        name: dict(zip(run.source.spec.signals.names, x.T, strict=True))
        for name, x in zip(plan.predictors, expected, strict=False)
    }
    return dataclasses.replace(rows, scores=rows.scores[:, :num_agents]), found


def scored_at_once(partitioner: Partitioner) -> int:
    """Return the number of segments that each process scores in one call: `offline.BATCH` of all processes."""
    devices = partitioner.num_devices
    return -(-offline.BATCH // (multihost.num_processes() * devices)) * devices


def _scored(run: TrainedRun, one: Callable[[Any], Any], log: Sessions, num_requests: int) -> offline.Rows:
    """Return `offline.score_log`, each process scoring a part of the segments on its devices; all get all rows."""
    first, number = multihost.share(len(sessions.segment_index(log, num_requests)))
    rows = offline.score_log(
        lambda batch: one(run.partitioner.shard_inputs(batch)),
        log,
        num_requests=num_requests,
        batch=scored_at_once(run.partitioner),
        part=slice(first, first + number),
        progress=counted("offline", number, checks=_CHECKS),
    )
    names = [field.name for field in dataclasses.fields(rows)]
    return offline.Rows(*multihost.gather_rows([getattr(rows, name) for name in names]))
