"""Evaluation of a run on held-out logs: offline metrics, model quality, and more of `mmrf evaluate`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from mmrf_jax import types
from mmrf_jax.abtest import simulate
from mmrf_jax.agents import boosting, popularity, registry
from mmrf_jax.data import sessions
from mmrf_jax.data.session_log import Sessions
from mmrf_jax.envs import learned, rankers
from mmrf_jax.io import extras
from mmrf_jax.io.progress import counted, phase, say
from mmrf_jax.metrics import model_quality, offline, ranking
from mmrf_jax.parallel import multihost
from mmrf_jax.parallel.partitioner import Partitioner
from mmrf_jax.training import off_policy, predictions, simulated_tests, sources
from mmrf_jax.training.trained_run import TrainedRun

_FROZEN = "test_frozen_history"  # name of a split
_CHECKS = 32  # for a stop signal while a log is scored, whatever the share of a process


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


def evaluate_run(run: TrainedRun, thorough: bool = False, with_baselines: bool = True) -> dict[str, Any]:
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
      "off_policy": {log: `off_policy.estimate_ranker`}}. One of the other logs, `test_frozen_history`, is the test log
      again, each request scored without any feedback of the test days (`sessions.freeze_histories`).
    """
    evaluators = EVALUATORS | (THOROUGH_EVALUATORS if thorough else {})
    found: dict[str, dict[str, Any]] = {name: {} for name in evaluators}
    for split in _scored_splits(run, with_baselines and (thorough or run.source.sim is None)):
        for name, evaluator in evaluators.items():
            if (metrics := evaluator(run, split)) is not None:
                found[name][split.name] = metrics
    result: dict[str, Any] = {"signals": run.signals.as_dict()}
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
        rows, predicted = score_exposures(run, log, num_requests)
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
    duration = np.asarray(run.items.duration)[split.rows.video]
    signals, each = run.signals, multihost.share_out
    return offline.metrics(split.rows, signals, agents, split.before, duration, rankers, each=each)


def _model_quality(run: TrainedRun, split: ScoredSplit) -> dict[str, Any] | None:
    """Return `model_quality.metrics` of the run's predictors and the simple ones."""
    predicted, rows = split.predicted | dict(split.simple), split.rows
    if not predicted:
        return None
    signals, each = run.signals, multihost.share_out
    return model_quality.metrics(signals, rows.user_id, rows.feedback, predicted, each=each)


def _off_policy(run: TrainedRun, split: ScoredSplit) -> dict[str, Any] | None:
    """Return `off_policy.estimate_ranker`."""
    if split.frozen:
        return None
    return off_policy.estimate_ranker(run, split.log)


def _excess(run: TrainedRun, split: ScoredSplit) -> dict[str, Any] | None:
    """Return {binary signal: `model_quality.excess_logloss_by_decile` of the feedback model's exposures}."""
    if split.frozen or not run.plan.use_feedback_model:
        return None

    def one(batch):
        shown = predictions.exposed_videos(batch)
        return np.moveaxis(predictions.predict_uncertainty(run.state, batch, shown, run.items, run.plan), -1, -2)

    u = _scored(run, one, split.log, split.num_requests).scores
    found, feedback, signals = split.predicted["model"], split.rows.feedback, run.signals
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
    model = simulated_tests.feedback_simulator(run.source, run.plan, run.state, log)
    policy = rankers.PrivilegedPolicy(learned.logged_slates, 0.0)
    key = jax.random.fold_in(types.make_key(run.config.seed), 14)
    served = simulate.rollout_user_metrics(
        model, policy, key, run.partitioner, user_ids=np.arange(log.num_sessions), day=0
    )
    log = sessions.select_sessions(log, np.arange(int(model.default_params.pool.num_sessions)))  # its starts
    session, request, slot = sessions.exposure_index(log)
    main = run.signals.main
    total = np.bincount(session, log.feedback[request, slot, run.signals.index(main)], log.num_sessions)
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


def ranking_of_valid(run: TrainedRun) -> dict[str, Any]:
    """Return `offline.metrics` of a run on the validation days of its logs.

    Raises:
      ValueError: for a source without validation days.
    """
    if run.source.valid is None:
        raise ValueError(f"config.source={run.config.source!r} has no validation days here; keep some in its split")
    rows, _ = score_exposures(run, run.source.valid(), run.config.train.segment)
    agents = registry.get(run.config.method).signals(run.plan.agents)
    duration = np.asarray(run.items.duration)[rows.video]
    return offline.metrics(rows, run.signals, agents, offline.exposures(run.source.train()), duration, None)


def _history_rows(log: Sessions) -> offline.Rows:
    """Return the exposures in users' histories before the log, for their median watch time."""
    mask = log.history_mask
    user = np.broadcast_to(log.user_id[:, None], mask.shape)
    empty = np.zeros((int(mask.sum()), 0), np.float32)
    return offline.Rows(user[mask], log.history_videos[mask], log.history_feedback[mask], empty)


def score_exposures(
    run: TrainedRun, log: Sessions, num_requests: int
) -> tuple[offline.Rows, dict[str, dict[str, np.ndarray]]]:
    """Score every exposure of a log with a run, in segments of `num_requests`, and predict its feedback.

    Returns:
      The exposures with scores, and {predictor: {signal: [n]}} for each of `plan.predictors`.
    """
    plan = run.plan

    def one(batch):
        out = jax.device_get(predictions.score_and_predict(run.state, batch, run.items, plan))
        parts = [np.take_along_axis(out["scores"], np.asarray(batch.slate)[..., None, :], axis=-1)]
        return np.concatenate([*parts, *(np.moveaxis(out[name], -1, -2) for name in plan.predictors)], axis=-2)

    rows = _scored(run, one, log, num_requests)
    num_agents = len(registry.get(plan.method).signals(plan.agents))
    expected = np.split(rows.scores[:, num_agents:], max(len(plan.predictors), 1), axis=1)
    found = {
        name: dict(zip(run.signals.names, x.T, strict=True)) for name, x in zip(plan.predictors, expected, strict=False)
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
