"""Where the metrics of evaluators stand in the results."""

import types
from typing import Any

from mmrf_jax.training import evaluate


def test_the_test_log_has_the_evaluator_s_name_and_other_logs_are_apart(monkeypatch):
    splits = [evaluate.Split(name, dict) for name in ("test", "test_random", "test_frozen")]
    monkeypatch.setattr(evaluate, "_scored_splits", lambda run, with_baselines: splits)

    def named(run, split):
        return {"from": f"{run.name} on {split.name}"}

    def only_the_test(run, split):
        return {"from": run.name} if split.name == "test" else None

    def nothing(run, split):
        return None

    monkeypatch.setattr(evaluate, "EVALUATORS", {"offline": named, "fidelity": only_the_test})
    monkeypatch.setattr(evaluate, "THOROUGH_EVALUATORS", {"off_policy": only_the_test, "excess_logloss": nothing})
    signals = types.SimpleNamespace(as_dict=lambda: {"main": "play"})
    run: Any = types.SimpleNamespace(
        name="run", source=types.SimpleNamespace(sim=None, spec=types.SimpleNamespace(signals=signals))
    )
    found = evaluate.evaluate(run, with_baselines=False)
    assert found == {
        "signals": {"main": "play"},
        "offline": {"from": "run on test"},
        "offline_other": {
            "test_random": {"from": "run on test_random"},
            "test_frozen": {"from": "run on test_frozen"},
        },
        "fidelity": {"from": "run"},
    }
    thorough = evaluate.evaluate(run, thorough=True, with_baselines=False)
    assert thorough == found | {"off_policy": {"test": {"from": "run"}}}
