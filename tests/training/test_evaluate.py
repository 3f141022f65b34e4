"""Where the metrics of evaluators stand in the results."""

import types
from typing import Any

import numpy as np
import pytest

from mmrf_jax.metrics import offline
from mmrf_jax.signals import SHORT_VIDEO
from mmrf_jax.training import configs, evaluate
from mmrf_jax.training.trained_run import TrainedRun


def test_the_test_log_has_the_evaluator_s_name_and_other_logs_are_apart(monkeypatch):
    splits = [evaluate.Split(name, dict) for name in ("test", "test_random", "test_frozen_history")]
    monkeypatch.setattr(evaluate, "_scored_splits", lambda run, with_baselines: splits)

    def named(run, split):
        return {"from": f"{run.name} on {split.name}"}

    def only_the_test(run, split):
        return {"from": run.name} if split.name == "test" else None

    def nothing(run, split):
        return None

    monkeypatch.setattr(evaluate, "EVALUATORS", {"offline": named, "model_quality": only_the_test})
    monkeypatch.setattr(evaluate, "THOROUGH_EVALUATORS", {"off_policy": only_the_test, "excess_logloss": nothing})
    signals = types.SimpleNamespace(as_dict=lambda: {"main": "play"})
    run: Any = types.SimpleNamespace(name="run", signals=signals, source=types.SimpleNamespace(sim=None))
    found = evaluate.evaluate_run(run, with_baselines=False)
    assert found == {
        "signals": {"main": "play"},
        "offline": {"from": "run on test"},
        "offline/test_random": {"from": "run on test_random"},
        "offline/test_frozen_history": {"from": "run on test_frozen_history"},
        "model_quality": {"from": "run"},
    }
    thorough = evaluate.evaluate_run(run, thorough=True, with_baselines=False)
    assert thorough == found | {"off_policy": {"test": {"from": "run"}}}


def test_the_ranking_of_the_validation_days_scores_those_alone(monkeypatch):
    """200 users see two videos each and click one: 150 the one with the higher score, 50 the other: GAUC 3/4."""
    feedback = np.zeros((400, len(SHORT_VIDEO.names)), np.float32)
    feedback[::2, SHORT_VIDEO.index("click")] = 1.0
    scores = np.array([[2.0, 1.0]] * 150 + [[1.0, 2.0]] * 50, np.float32).reshape(400, 1)
    user, video = np.repeat(np.arange(200), 2), np.tile([0, 1], 200)
    rows = offline.Rows(user, video, feedback, np.repeat(scores, 7, axis=1))
    scored = []
    monkeypatch.setattr(evaluate, "score_exposures", lambda *args: scored.append(args) or (rows, {}))
    monkeypatch.setattr(evaluate.offline, "exposures", lambda log: rows if log == "train" else None)
    plan: Any = types.SimpleNamespace(agents=configs.Run().agents)
    source: Any = types.SimpleNamespace(
        config=configs.Run(),
        valid=lambda: "valid",
        train=lambda: "train",
        items=types.SimpleNamespace(duration=np.ones(2)),
        spec=types.SimpleNamespace(signals=SHORT_VIDEO),
    )
    run = TrainedRun(source, plan, "state", None)
    found = evaluate.ranking_of_valid(run)
    assert [args[1] for args in scored] == ["valid"]
    assert found["click"]["gauc"] == 0.75
    source.valid = None
    with pytest.raises(ValueError, match="has no validation days"):
        evaluate.ranking_of_valid(run)
