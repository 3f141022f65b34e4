"""What a config makes a run alternate between."""

import pytest

from experiments import world
from mmrf_jax.signals import SHORT_VIDEO
from mmrf_jax.training import configs, steps


@pytest.mark.parametrize(
    ("method", "ablation", "rho", "weight", "models", "slates"),
    [
        ("mmrf", "none", 0.25, 0.5, True, 3),
        ("mmrf", "none", 0.25, 0.0, True, 3),
        ("mmrf", "none", 0.0, 0.5, True, 0),
        ("mmrf", "none", 0.0, 0.0, False, 0),
        ("mmrf", "no_collaboration", 0.0, 0.5, True, 0),
        ("mmrf", "no_augmentation", 0.25, 0.5, False, 0),
        ("mmrf", "constant_negative", 0.25, 0.5, True, 3),
        ("mmrf", "constant_negative", 0.0, 0.5, False, 0),  # a constant reward for nothing
        ("myopic", "none", 0.25, 0.5, False, 0),
    ],
)
def test_a_feedback_model_is_fitted_where_values_or_labels_need_it(method, ablation, rho, weight, models, slates):
    config = world.get_config()
    config.method = method
    config.agents.update({"ablation": ablation, "counterfactual_weight": rho, "model_weight": weight})
    plan = steps.plan_of(configs.run_of(config.to_dict()), SHORT_VIDEO)
    assert (plan.use_feedback_model, plan.slates) == (models, slates)
    assert plan.agents.values_use_model == (
        method == "mmrf" and ablation in ("none", "no_collaboration") and weight > 0.0
    )
    assert ("model" in plan.predictors) == models and ("agents" in plan.predictors) == (method == "mmrf")


@pytest.mark.parametrize(("share", "exposures"), [(None, 1), (0.0, 1), (0.05, 2)])
def test_predictions_for_random_slates_need_random_slates_in_the_log(share, exposures):
    config = world.get_config()
    config.collect.random_share = share
    assert steps.plan_of(configs.run_of(config.to_dict()), SHORT_VIDEO).feedback.exposures == exposures
