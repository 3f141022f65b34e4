"""Agents and feedback models of signals that are not those of short videos: shapes, rewards, refusals."""

import dataclasses
import functools
import itertools

import any_signals
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mmrf_jax.agents import registry
from mmrf_jax.agents.mmrf import agent_state, losses
from mmrf_jax.models.feedback_model import counterfactuals, fitting, network
from mmrf_jax.signals import SHORT_VIDEO
from mmrf_jax.training import configs, steps


def config_of(signals, **fields):
    return dataclasses.replace(tiny.CONFIG, signals=(), all_signals=signals, **fields)


METHODS = ("mmrf", "pareto", "tscac", "td3_bc", "ltr", "wide_deep", "deepfm", "myopic")
#: One signal is the edge of every method; what of a method has the number of signals shows there too.
FAST = {*(("one", method) for method in METHODS[1:]), ("twelve", "mmrf"), ("twelve", "deepfm")}


@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param(*case, marks=[] if case in FAST else [pytest.mark.slow], id="-".join(case))
        for case in itertools.product(("one", "three", "twelve"), METHODS)
    ],
)
def test_a_state_and_its_update_have_the_same_shapes(name, method):
    """Traced, not compiled."""
    signals = any_signals.ALL[name]
    config, spec = registry.configured(method, config_of(signals)), any_signals.make_spec(signals, tiny.SPEC)
    items, number = tiny.make_items(), len(signals)
    model_config = dataclasses.replace(tiny.FEEDBACK, all_signals=signals)
    batch = tiny.make_batch()
    rng = np.random.default_rng(0)
    batch = batch.replace(
        feedback=any_signals.make_feedback(rng, batch.slate.shape, signals),
        history=batch.history.replace(feedback=any_signals.make_feedback(rng, batch.history.mask.shape, signals)),
    )

    def run(batch):
        ones = jnp.ones(number)
        critic = registry.get(method).critic
        state = agent_state.init_agent_state(jax.random.key(0), config, spec, items, 0.3 * ones, ones, critic, ones)
        if not registry.get(method).uses_model:
            return state, registry.get(method).update(state, batch, items, config)
        model = network.init_feedback_state(jax.random.key(1), model_config, spec, items, 0.3 * ones, ones)
        fitted, _ = fitting.update(model, batch, items, model_config)
        simulated = counterfactuals.simulate_counterfactual_slates(
            fitted, batch, items, model_config, jax.random.key(2), 1
        )
        return state, registry.get(method).update(state, batch, items, config, simulated=simulated), model, fitted

    state, (after, metrics), *models = jax.eval_shape(run, batch)
    assert jax.tree.map(lambda x: x.shape, state) == jax.tree.map(lambda x: x.shape, after)
    assert not models or jax.tree.map(lambda x: x.shape, models[0]) == jax.tree.map(lambda x: x.shape, models[1])
    wanted = signals.names if method != "myopic" else (signals.main,)
    assert {f"loss/{signal}" for signal in wanted} <= set(metrics)
    assert config.num_agents == (1 if method in ("td3_bc", "myopic") else len(signals.agents))


def test_a_config_of_other_signals_than_the_log_is_refused():
    spec = any_signals.make_spec(any_signals.ONE, tiny.SPEC)
    start = functools.partial(agent_state.init_agent_state, jax.random.key(0), tiny.CONFIG, spec, tiny.make_items())
    with pytest.raises(ValueError, match=r"signals click .*watch_time \(duration\), the spec purchase \(binary\)"):
        start(np.ones(9), np.ones(9))


def rewards(signals, feedback, scale, **fields):
    terms = config_of(signals, **fields).reward_terms
    return np.asarray(losses.rewards(jnp.asarray(feedback), jnp.asarray(scale), terms))


def test_rewards_are_signals_with_their_sign():
    feedback, scale = np.array([4.0, 1.0, 30.0], np.float32), np.array([2.0, 0.5, 15.0], np.float32)
    np.testing.assert_allclose(rewards(any_signals.THREE, feedback, scale), [-2.0, 2.0, 2.0])  # report, rating, dwell


def test_rewards_are_expressions():
    feedback, scale = np.array([4.0, 1.0, 30.0], np.float32), np.array([2.0, 0.5, 15.0], np.float32)
    main = rewards(any_signals.THREE, feedback, scale, reward="dwell + 0.5*rating - 3*report")
    np.testing.assert_allclose(main, [-2.0, 2.0, 2.0 + 0.5 * 2.0 - 3 * 2.0])
    each = rewards(any_signals.THREE, feedback, scale, reward="report: -2*report; dwell: dwell - rating")
    np.testing.assert_allclose(each, [-4.0, 2.0, 0.0])
    total = rewards(any_signals.THREE, feedback, scale, reward="sum_of_signals")
    np.testing.assert_allclose(total, [-2.0, 2.0, 2.0 + 2.0 - 2.0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reward": "dwell + likes"}, r"agents.reward='dwell \+ likes': unknown signal 'likes'; choose among rating"),
        ({"reward": "dwell *"}, "agents.reward='dwell \\*': its end is missing; write it as in 'watch_time"),
        ({"reward": "like: dwell"}, "names the agent 'like'; choose among report, rating, dwell"),
        ({"signals": ("dwell", "like")}, "unknown agents.signals='like'; choose among rating, report, dwell"),
        ({"signal_weights": (1.0, 2.0)}, "agents.signal_weights has 2 numbers; give 3, one for each of rating, report"),
    ],
)
def test_what_the_log_does_not_have_is_refused(fields, message):
    run = configs.Run(agents=dataclasses.replace(configs.Run().agents, **fields))
    with pytest.raises(ValueError, match=message):
        steps.plan_of(run, any_signals.THREE)


def test_the_nine_have_the_weights_of_the_paper():
    plan = steps.plan_of(configs.Run(), SHORT_VIDEO)
    assert plan.agents.loss_weights == plan.feedback.loss_weights == (1.0, 1.0, 3.0, 3.0, 3.0, 3.0, 3.0, 2.0, 1.0)
    assert plan.agents.agent_signals == ("click", "like", "follow", "comment", "forward", "hate", "watch_time")
    assert plan.agents.reward_terms == tuple(
        ((SHORT_VIDEO.index(name), -1.0 if name == "hate" else 1.0),) for name in plan.agents.agent_signals
    )
