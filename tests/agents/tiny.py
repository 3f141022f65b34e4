"""The smallest agents, feedback models and batches that exercise every mask; tests here and subprocesses import it."""

import dataclasses
import functools
import zlib
from unittest import mock

import jax
import numpy as np

from mmrf_jax import testing
from mmrf_jax.agents import registry
from mmrf_jax.agents.mmrf import agent_state, losses, training_step
from mmrf_jax.agents.mmrf.config import AgentConfig
from mmrf_jax.data.session_log import InputSpec
from mmrf_jax.models.feedback_model import network
from mmrf_jax.models.feedback_model.network import FeedbackConfig, FeedbackState
from mmrf_jax.signals import SHORT_VIDEO
from mmrf_jax.testing import TINY as CONFIG
from mmrf_jax.testing import make_batch, make_feedback, make_items

__all__ = ["CONFIG", "make_batch", "make_feedback", "make_items"]

S = len(SHORT_VIDEO)
SPEC = dataclasses.replace(testing.SPEC, num_users=6)  # fewer than batches have: the others are unknown
_SIZES = ("slate", "dim", "id_dim", "author_dim", "tag_dim", "user_dim", "feedback_dim", "state_dim")
FEEDBACK = FeedbackConfig(**{name: getattr(CONFIG, name) for name in _SIZES}, dropout=0.2)

#: Compiler options for what runs for seconds.
HOT = {"xla_backend_optimization_level": 1}
#: The agents' state and their update; the tests of a worker share what is traced and compiled of them.
init = jax.jit(agent_state.init_agent_state, static_argnames=("config", "spec", "critic"))
step = jax.jit(training_step.update, static_argnames=("config", "algorithm"))


@functools.cache
def learner(method: str):
    """The update of a method, jitted; the tests of a worker share what is traced and compiled of it."""
    return jax.jit(registry.get(method).update, static_argnames="config")


#: The update by plain gradient descent of the next function.
SGD = dataclasses.replace(CONFIG, optimizer="sgd", learning_rate=0.05)


@jax.jit
def sgd_step(state, batch, items, projection=losses.PROJECTION_WEIGHT, signal_weights=SGD.loss_weights):
    """One program for all weights of the projection and of the S signals' losses, which are constants elsewhere."""
    with (
        mock.patch.object(losses, "PROJECTION_WEIGHT", projection),
        mock.patch.object(AgentConfig, "loss_weights", signal_weights),
    ):
        return training_step.update(state, batch, items, SGD)


#: Mean and standard deviation of feedback in the first log.
MEAN, STD = np.append(np.full(S - 1, 0.3), 15.0), np.append(np.full(S - 1, 0.46), 15.0)


def make_shapes(config: AgentConfig, spec: InputSpec = SPEC) -> agent_state.AgentState:
    """The shapes of a state, of which nothing is compiled."""

    def start(key):
        return agent_state.init_agent_state(key, config, spec, make_items(spec), np.ones(S), np.ones(S))

    return jax.eval_shape(start, jax.random.key(0))


#: Products of these layers start at 0.
_SMALL = {"extra_reward", "reads", "signals", "state_gate", "values"}


def draw_params(shapes, seed: int):
    """Weights of the size of initialised ones; those that start at 0 are random too, so that no path is silent.

    Drawn by NumPy for each name, so nothing is compiled, and weights of one name and shape are those of other configs.
    """

    def draw(path, x):
        *layers, name = (part.key for part in path)
        if name in ("ceiling", "scale"):  # of heads and of normalised layers
            return np.full(x.shape, 0.5 if name == "ceiling" else 1.0, x.dtype)
        scale = 0.01 if name == "out" else 0.1
        if name in ("hidden", "kernel", "mix_in") and not _SMALL & set(layers):
            scale = x.shape[-2] ** -0.5
        rng = np.random.default_rng([seed, zlib.crc32("/".join((*layers, name)).encode())])
        return (scale * rng.normal(size=x.shape)).astype(x.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def _draw_tables(shapes: dict, seed: int) -> dict:
    """Tables of random rows, users' too."""
    rng, tables = np.random.default_rng(seed), {}
    for name, table in shapes.items():
        rows = {"author": 0.1, "id": 0.02, "tag": 0.5, "user": 0.1}[name] * rng.normal(size=table.rows.shape)
        accumulator = np.full(table.accumulator.shape, 1e-7, np.float32)
        tables[name] = table.replace(rows=rows.astype(table.rows.dtype), accumulator=accumulator)
    return tables


def _zeros(tree):
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tree)


def _set_prior(heads: dict) -> None:
    """Heads predict the means of the signals, and those of a feedback model the logarithm of watch time."""
    prior = np.array([*[np.log(0.3 / 0.7)] * (S - 1), 0.0, np.log(16.0) - 0.5], np.float32)
    shape = heads["prior"].shape
    heads["prior"] = np.broadcast_to(prior[: shape[-2], None], shape).copy()


@functools.cache
def make_state(config: AgentConfig = CONFIG, spec: InputSpec = SPEC, seed: int = 0) -> agent_state.AgentState:
    """A fresh state whose zero-initialised weights are random, so that no path is silent; nothing is compiled."""
    shapes = make_shapes(config, spec)
    params = draw_params(shapes.params, seed)
    critic = params["critic"]["params"]
    _set_prior(critic.get("agents", {}).get("each", critic)["heads"])
    rng = np.random.default_rng(seed)
    state = shapes.replace(
        step=np.zeros((), np.int32),
        params=params,
        target=jax.tree.map(lambda x: x + (0.01 * rng.normal(size=x.shape)).astype(np.float32), params["critic"]),
        optimizer=_zeros(shapes.optimizer),
        tables=_draw_tables(shapes.tables, seed),
        reward_scale=STD.astype(np.float32),
        q_mean=np.zeros(shapes.q_mean.shape, np.float32),
        q_scale=np.ones(shapes.q_scale.shape, np.float32),
        key=jax.random.key(seed),
    )
    return jax.tree.map(jax.numpy.asarray, state)


@functools.cache
def make_feedback_model(config: FeedbackConfig = FEEDBACK, spec: InputSpec = SPEC, seed: int = 0) -> FeedbackState:
    """A fresh feedback model whose zero-initialised weights are random, with residuals as if measured."""

    def start(key):
        return network.init_feedback_state(key, config, spec, make_items(spec), MEAN, STD)

    shapes = jax.eval_shape(start, jax.random.key(0))
    params = draw_params(shapes.params, seed)
    _set_prior(params["heads"]["params"])
    rng = np.random.default_rng(seed)
    state = shapes.replace(
        step=np.zeros((), np.int32),
        params=params,
        optimizer=_zeros(shapes.optimizer),
        tables=_draw_tables(shapes.tables, seed),
        scale=STD.astype(np.float32),
        uncertainty_scale=rng.uniform(0.01, 0.1, S).astype(np.float32),
        calibration=np.broadcast_to(np.float32([[1.0], [0.0]]), shapes.calibration.shape),
        residual=np.full(1, 0.7, np.float32),
        edges=np.linspace(1.5, 3.0, network.BINS - 1, dtype=np.float32)[None],
        quantiles=np.sort(rng.normal(0.0, 0.7, (1, network.BINS, network.QUANTILES)), axis=2).astype(np.float32),
        key=jax.random.key(seed),
    )
    return jax.tree.map(jax.numpy.asarray, state)


def differences(a, b) -> dict[str, float]:
    """Largest absolute difference of each leaf that differs, by path."""
    out = {}
    for (path, x), (_, y) in zip(jax.tree.leaves_with_path(a), jax.tree.leaves_with_path(b), strict=True):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        x, y = np.asarray(x), np.asarray(y)
        assert x.shape == y.shape and np.isfinite(x).all() and np.isfinite(y).all(), jax.tree_util.keystr(path)
        if not np.array_equal(x, y):
            out[jax.tree_util.keystr(path)] = float(np.max(np.abs(x.astype(np.float64) - y.astype(np.float64))))
    return out
