"""What actors take of their critics: against float64 by hand, and what follows for actors without a residual."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mmrf_jax import ops
from mmrf_jax.agents.mmrf import acting, encoding, losses, networks
from mmrf_jax.agents.mmrf.config import AgentConfig
from mmrf_jax.models import embeddings, heads

CONFIG = dataclasses.replace(tiny.CONFIG, residual_actor=True)
N, C = CONFIG.num_agents, 8


def make_inputs(seed: int, config: AgentConfig = CONFIG):
    """A state, and user states, memories and encodings of five requests."""
    state = tiny.make_state(config)
    state = state.replace(q_mean=jnp.array([0.3, -0.2, 0.1])[:N], q_scale=jnp.array([0.1, 0.5, 2.0])[:N])
    rng = np.random.default_rng(seed)
    z_size = state.params["actor"]["params"]["agent_states"]["kernel"].shape[0]
    dim = state.params["critic"]["params"]["heads"]["stay_items"].shape[0]
    arrays = (
        rng.normal(size=(5, z_size)),
        rng.normal(size=(5, 2, config.feedback_dim, dim)),
        rng.normal(size=(5, C, dim)),
    )
    return state, tuple(x.astype(np.float32) for x in arrays)


@functools.partial(jax.jit, static_argnames="config")
def critic_scores(state, inputs, config=CONFIG):
    """The target critics' output, and the scores that actors take of it."""
    out = networks.Critic(config).apply(state.target, *inputs)
    return out, acting.critic_scores(config, acting.critics_of(state, config), out)


@functools.partial(jax.jit, static_argnames="config")
def act(state, inputs, config=CONFIG):
    """The scores of the state's actors."""
    return acting.apply_actors(config, state.params["actor"], acting.critics_of(state, config), *inputs).scores


def test_critic_scores_by_hand():
    state, inputs = make_inputs(0)
    out, got = critic_scores(state, inputs)
    raw, scale = np.float64(out.feedback), np.float64(state.reward_scale)

    def chance(i):
        return 1.0 / (1.0 + np.exp(-raw[:, i]))

    reward = np.stack([chance(0) / scale[0], -chance(6) / scale[6], np.exp(np.clip(raw[:, 8], -8, 5))], axis=1)
    shown = np.float64(out.continue_logit) + CONFIG.slate / C * np.float64(out.continue_item_logit).sum(axis=-1)
    stay = 1.0 / (1.0 + np.exp(-shown))
    value = np.float64(out.value).min(axis=-2)
    slope = CONFIG.discount * (stay * (1 - stay))[:, None] * value
    q = reward + slope[..., None] * np.float64(out.continue_item_logit)[:, None]
    centred = (q - np.float64(state.q_mean)[:, None]) / (np.float64(state.q_scale)[:, None] * CONFIG.temperature)
    np.testing.assert_allclose(got, np.clip(centred, -20, 20), rtol=1e-4, atol=1e-5)


def silenced(state):
    """The state with actors whose residual is 0."""
    actor = dict(state.params["actor"]["params"])
    for name in ("main", "auxiliary", "mix_out", "state_gate"):
        actor[name] = jax.tree.map(np.zeros_like, actor[name])
    return state.replace(params=state.params | {"actor": {"params": actor}})


def test_without_a_residual_actors_are_their_critics():
    state, inputs = make_inputs(1)
    np.testing.assert_allclose(act(silenced(state), inputs), critic_scores(state, inputs)[1], rtol=1e-5, atol=1e-5)


def test_critics_enter_as_the_only_thing_that_the_flag_changes():
    state, inputs = make_inputs(2)
    free = dataclasses.replace(CONFIG, residual_actor=False)
    assert acting.critics_of(state, free) is None
    alone = act(state, inputs, free)
    actor = jax.jit(lambda params: networks.Actor(free).apply(params, *inputs).scores)
    np.testing.assert_array_equal(alone, actor(state.params["actor"]))
    added = np.asarray(act(state, inputs) - alone)
    np.testing.assert_allclose(added[:, :-1], critic_scores(state, inputs)[1][:, :-1], rtol=1e-4, atol=1e-4)


def test_one_actor_takes_the_main_critic():
    config = dataclasses.replace(CONFIG, one_actor=True)
    state, inputs = make_inputs(3)
    _, one = critic_scores(state, inputs, config)
    assert one.shape == (5, 1, C)
    np.testing.assert_array_equal(one[:, 0], critic_scores(state, inputs)[1][:, -1])


def test_candidates_of_the_mean_encoding_change_nothing():
    """Services pad requests with them."""
    state, (z, memory, items) = make_inputs(4)
    padded = np.concatenate([items, np.repeat(items.mean(axis=1, keepdims=True), 3, axis=1)], axis=1)
    wanted = act(state, (z, memory, items))
    np.testing.assert_allclose(act(state, (z, memory, padded))[..., :C], wanted, rtol=1e-4, atol=1e-4)


def test_no_gradient_reaches_the_critics():
    state, inputs = make_inputs(5)

    def total(target):
        critics = dataclasses.replace(acting.critics_of(state, CONFIG), params=target)
        scores = acting.apply_actors(CONFIG, state.params["actor"], critics, *inputs).scores
        return jnp.sum(ops.relaxed_top_k(scores, CONFIG.slate, 1.0) ** 2)

    gradient = jax.jit(jax.grad(total))(state.target)
    assert all(not np.asarray(g).any() for g in jax.tree.leaves(gradient))


@pytest.mark.parametrize("value, score", [(1e6, 20.0), (-1e6, -20.0)])
def test_scores_of_critics_are_bounded(value, score):
    got = losses.optimal_scores(np.full((2, N, 3), value, np.float32), np.zeros(N), np.ones(N), CONFIG.temperature)
    np.testing.assert_array_equal(got, np.full((2, N, 3), score))


def test_updates_and_policies_score_alike():
    """The update draws to its targets the very scores that are served."""
    config = dataclasses.replace(CONFIG, optimizer="sgd")
    state, batch, items = tiny.make_state(config), tiny.make_batch(), tiny.make_items()
    state = state.replace(q_mean=jnp.array([0.3, -0.2, 0.1]), q_scale=jnp.array([0.1, 0.5, 2.0]))

    @jax.jit
    def answers(state):
        r = encoding.encode_batch(config, state.params["encoder"], state.tables, batch, items)
        candidates = embeddings.encode_videos(config, state.params["encoder"], state.tables, items, batch.candidates)
        critics = acting.critics_of(state, config)
        scores = acting.apply_actors(config, state.params["actor"], critics, r.z, r.memory_mean, candidates).scores
        pool = networks.Critic(config).apply(state.target, r.z, r.memory_mean, candidates)
        w = ops.relaxed_top_k(scores[..., -1, :], config.slate, 1.0)
        reward = losses.video_rewards(config.all_signals, pool, state.reward_scale, config.reward_terms)
        value, stay = pool.value.min(axis=-2), heads.continue_prob(pool, w)
        q = losses.video_values(reward, pool.continue_item_logit, value, stay, config.discount)
        return scores, losses.optimal_scores(q, state.q_mean, state.q_scale, config.temperature)

    scores, wanted = (np.asarray(x, np.float64)[:, :-1] for x in answers(state))
    distance = ((scores - wanted) ** 2).mean(axis=-1).sum(axis=-1)[batch.mask[:, :-1]].mean()
    _, metrics = tiny.step(state, batch, items, config=config)
    assert float(metrics["loss/projection"]) == pytest.approx(distance, rel=1e-4)
