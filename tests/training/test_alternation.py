"""What a config makes a run alternate between."""

import pytest

from experiments import world
from mmrf_jax.training import alternation


@pytest.mark.parametrize(
    ("method", "ablation", "rho", "weight", "models", "slates"),
    [
        ("mmrf", "none", 0.25, 0.5, True, 3),
        ("mmrf", "none", 0.25, 0.0, True, 3),
        ("mmrf", "none", 0.0, 0.5, True, 0),
        ("mmrf", "none", 0.0, 0.0, False, 0),
        ("mmrf", "co", 0.0, 0.5, True, 0),
        ("mmrf", "da", 0.25, 0.5, False, 0),
        ("mmrf", "ns", 0.25, 0.5, True, 3),
        ("mmrf", "ns", 0.0, 0.5, False, 0),  # a constant reward for nothing
        ("myopic", "none", 0.25, 0.5, False, 0),
    ],
)
def test_a_feedback_model_is_fitted_where_values_or_labels_need_it(method, ablation, rho, weight, models, slates):
    config = world.get_config()
    config.method = method
    config.agents.update({"ablation": ablation, "non_impressions": rho, "model_weight": weight})
    plan = alternation.plan_of(config)
    assert (plan.models, plan.slates) == (models, slates)
    assert plan.agents.uses_model == (method == "mmrf" and ablation in ("none", "co") and weight > 0.0)
    assert ("model" in plan.predictors) == models and ("agents" in plan.predictors) == (method == "mmrf")
