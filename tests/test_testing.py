"""The contract test of methods: it passes what keeps the contract, and names what does not."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import pytest

from mmrf_jax import testing
from mmrf_jax.agents import registry
from mmrf_jax.agents.mmrf import policy

EXAMPLE = "examples/own_method.py"


def update(state, batch, items, config, lr_scale=1.0, simulated=None, *, change=None):
    """Shrink all parameters, by a metric of the batch: nothing has to be differentiated or compiled for long."""
    shown = batch.loss_masks().exposure
    loss = jnp.sum(shown[..., None] * batch.feedback[:, :-1]) / shown.sum()
    params = jax.tree.map(lambda x: x * (1.0 - 1e-3 * lr_scale * jnp.tanh(loss)), state.params)
    state, metrics = dataclasses.replace(state, step=state.step + 1, params=params), {"loss": loss}
    return (state, metrics) if change is None else change(state, metrics, batch)


COUNT = itertools.count()


def forgets_the_step(state, metrics, batch):
    return dataclasses.replace(state, step=state.step - 1), metrics


def returns_a_vector(state, metrics, batch):
    return state, {"loss": batch.feedback.sum(axis=(1, 2, 3))}


def divides_by_zero(state, metrics, batch):
    return state, {"loss": metrics["loss"] / jnp.float32(0.0)}


def changes_a_dtype(state, metrics, batch):
    return dataclasses.replace(state, q_mean=state.q_mean.astype(jnp.bfloat16)), metrics


def learns_from_padding(state, metrics, batch):
    return dataclasses.replace(state, q_mean=state.q_mean + batch.feedback.mean()), metrics


def depends_on_a_counter(state, metrics, batch):
    number = jax.pure_callback(lambda: jnp.float32(next(COUNT)), jax.ShapeDtypeStruct((), jnp.float32))
    return dataclasses.replace(state, q_mean=state.q_mean + number), metrics


def reads_a_value(state, metrics, batch):
    return state, {"loss": metrics["loss"] if float(metrics["loss"]) > 0 else jnp.zeros(())}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (forgets_the_step, "update leaves step at 0 after one call"),
        (returns_a_vector, r"metric 'loss' has shape \(8,\); metrics are scalars"),
        (divides_by_zero, r"metric 'loss' is inf after an update"),
        (changes_a_dtype, r"the state changes its form: q_mean .*'float32'.*'bfloat16'"),
        (learns_from_padding, r"what is in the padding of a batch changes 0/q_mean; weigh"),
        (depends_on_a_counter, r"update gives another q_mean for the same key|after a checkpoint q_mean is another"),
        (reads_a_value, "update fails: .*"),
    ],
)
def test_an_update_that_breaks_the_contract_is_named(change, message):
    with pytest.raises(AssertionError, match=message):
        testing.check_method(registry.Method(functools.partial(update, change=change)))


def alike(config, state, encoded, items):
    return jnp.zeros((*items.shape[:-2], config.num_actors, items.shape[-2]))


def by_place(config, state, encoded, items):
    """Scores by the number of candidates, as a normalisation over them does."""
    scores = jnp.arange(items.shape[-2]) / items.shape[-2] + 0.0 * items[..., 0]
    return jnp.broadcast_to(scores[..., None, :], (*items.shape[:-2], config.num_actors, items.shape[-2]))


def backwards(config, state, encoded, items):
    return -registry._actor_scores(config, state, encoded, items)


def anew(state, items, config, temperature=0.0):
    made = policy.make_actor_ranker(state, items, config, temperature)
    return dataclasses.replace(made, score=lambda *args: made.score(*args))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"score": alike}, "score ranks all candidates of some request alike"),
        ({"score": by_place}, "score depends on padding"),
        ({"signals": lambda config: ("watch_time",)}, r"score returns shape \(8, 5, 3, 8\); 1 signals"),
        ({"score": backwards}, "the policy ranks otherwise than the last column of score"),
        ({"make_policy": anew}, "make_policy makes a new function `score` each time"),
    ],
)
def test_scores_and_policies_that_break_the_contract_are_named(fields, message):
    with pytest.raises(AssertionError, match=message):
        testing.check_method(registry.Method(update, **fields))


def test_what_is_no_method_is_named():
    with pytest.raises(AssertionError, match=r"is no mmrf_jax\.agents\.registry\.Method"):
        testing.check_method(update)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mmrf", "iql", "bc", "wide_deep", "ltr", "pareto"])
def test_the_package_s_methods_keep_the_contract(name):
    testing.check_method(registry.METHODS[name])
