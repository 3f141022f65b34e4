"""Agents with their own critics: what each of them can see, and that it is all of what one alone would see."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny

from mmrf_jax import types
from mmrf_jax.agents import registry
from mmrf_jax.agents.mmrf import acting, encoding, policy
from mmrf_jax.agents.mmrf.config import AgentConfig
from mmrf_jax.signals import SHORT_VIDEO
from mmrf_jax.training import configs

MODEL_FREE = {"counterfactual_weight": 0.0, "model_weight": 0.0}
OWN = dataclasses.replace(tiny.CONFIG, critics="own", optimizer="sgd", learning_rate=0.05, **MODEL_FREE)
APART = dataclasses.replace(OWN, ablation="no_collaboration")
SINGLE = dataclasses.replace(OWN, signals=("watch_time",))
MASSA = dataclasses.replace(OWN, communication="shared_latent")
WATCH_TIME, CLICK = SHORT_VIDEO.index("watch_time"), SHORT_VIDEO.index("click")


@pytest.fixture(scope="module")
def items():
    return tiny.make_items()


@functools.partial(jax.jit, static_argnames="config")
def predict(state, batch, items, config):
    """The critics' output [B, T+1, ...] for all candidates."""
    encoder = state.params["encoder"]
    encoded = encoding.encode_batch(config, encoder, state.tables, batch, items)
    videos = encoding.encode_videos(config, encoder, state.tables, items, batch.candidates)
    return acting.apply_critics(config, state.params["critic"], state.params["actor"], encoded.user, videos)


def with_other_feedback(batch, signal):
    """The batch with another signal's feedback, in histories and in the session."""
    rng = np.random.default_rng(5)

    def other(feedback, mask):
        feedback = np.array(feedback)
        feedback[..., signal] = (rng.random(feedback.shape[:-1]) < 0.5) * mask
        return feedback

    history = dataclasses.replace(batch.history, feedback=other(batch.history.feedback, batch.history.mask))
    return dataclasses.replace(batch, history=history, feedback=other(batch.feedback, batch.slate_mask))


@pytest.mark.parametrize("config", [OWN, APART, MASSA], ids=["attention", "apart", "massa"])
def test_only_communication_brings_what_other_agents_see(config, items):
    """Clicks change the click agent's predictions; the main agent's only if agents communicate. Likes are of none."""
    state, batch = tiny.make_state(config), tiny.make_batch()
    before = predict(state, batch, items, config)
    live = batch.mask & (batch.history.mask.any(axis=1)[:, None] | (np.arange(5) > 0))
    for signal, expected in ((CLICK, [True, False, False]), (SHORT_VIDEO.index("like"), [False] * 3)):
        after = predict(state, with_other_feedback(batch, signal), items, config)
        talks = config is not APART and signal == CLICK
        for name in ("continue_logit", "value"):
            x, y = (np.asarray(getattr(out, name))[live] for out in (before, after))
            changed = [not np.array_equal(x[..., i], y[..., i]) for i in range(3)]
            assert changed == ([True] * 3 if talks else expected), name
        x, y = (np.asarray(out.feedback[..., WATCH_TIME, :])[live] for out in (before, after))
        assert np.array_equal(x, y) != talks


def test_each_critic_is_that_of_a_single_agent(items):
    """Of the same parameters, embedding rows and, for the main agent, no communication."""
    state, batch = tiny.make_state(APART), tiny.make_batch()
    together = predict(state, batch, items, APART)

    def own(x):
        return x[-1:]

    rows = {name: table.replace(rows=encoding.own_rows(APART, table.rows)[-1]) for name, table in state.tables.items()}
    params = {name: jax.tree.map(own, state.params[name]) for name in ("encoder", "critic")}
    single = state.replace(params=params | {"actor": state.params["actor"]}, tables=rows)
    alone = predict(single, batch, items, SINGLE)
    for name in ("continue_logit", "value", "slate_bias"):
        np.testing.assert_allclose(getattr(together, name)[..., -1:], getattr(alone, name), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(together.continue_item_logit[..., -1:, :], alone.continue_item_logit, atol=1e-5)
    for out in (together, alone):  # signals without an agent
        assert len(np.unique(out.feedback[..., SHORT_VIDEO.index("like"), :])) == 1
    np.testing.assert_allclose(
        together.feedback[..., WATCH_TIME, :], alone.feedback[..., WATCH_TIME, :], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("config", [APART, OWN], ids=["apart", "attention"])
def test_an_agent_learns_from_its_own_reward(config, items):
    """Other clicks change one update of the click agent's encoder and critic; of others only what they communicate."""
    state, batch = tiny.make_state(config), tiny.make_batch()
    (one, metrics), (two, _) = (
        tiny.step(state, b, items, config=config) for b in (batch, with_other_feedback(batch, CLICK))
    )
    assert all(np.isfinite(x) for x in metrics.values()) and tiny.differences(one.params, state.params)
    for name in ("encoder", "critic"):
        x, y = (after.params[name]["params"] for after in (one, two))
        x, y = (tree["agents"]["each"] if name == "critic" else tree for tree in (x, y))
        changed = jax.tree.map(lambda a, b: ~np.isclose(a, b, atol=1e-7).reshape(len(a), -1).all(axis=1), x, y)
        agents = np.any(jax.tree.leaves(changed), axis=0)
        assert agents.tolist() == ([True, False, False] if config is APART else [True] * 3), name


def test_policies_score_as_batches_do(items):
    state, batch = tiny.make_state(OWN), tiny.make_batch()
    scores = registry.score_candidates(state, batch, items, OWN, "mmrf")
    served = policy.make_actor_ranker(state, items, OWN)

    def request(t):
        values = (batch.user_id, batch.profile, batch.context[:, t], batch.candidates[:, t])
        return types.Request(*values)

    score = jax.jit(functools.partial(served.scores, None, None))
    carry = jax.jit(served.initial_carry)(request(0), batch.history)
    for t in range(2):
        np.testing.assert_allclose(score(carry, request(t)), scores[:, t, -1], rtol=1e-3, atol=1e-4)
        videos = np.take_along_axis(batch.candidates[:, t], batch.slate[:, t], axis=-1)
        shown = types.Exposure(videos=videos, feedback=batch.feedback[:, t], mask=batch.slate_mask[:, t])
        carry = jax.jit(served.next_carry)(carry, request(t), shown)


def test_configs_that_cannot_be():
    with pytest.raises(ValueError, match=r"agents\.critics=own cannot use the feedback model, .* set agents\.abl"):
        AgentConfig(critics="own")
    assert not AgentConfig(critics="own", ablation="no_augmentation").values_use_model
    for fields in ({"residual_actor": True}, {"score_hidden": 4}):
        with pytest.raises(ValueError, match=f"agents.critics=own needs agents.{next(iter(fields))}="):
            AgentConfig(critics="own", **MODEL_FREE, **fields)
    both = dataclasses.replace(OWN, reward="watch_time + click")
    with pytest.raises(ValueError, match="several agents are rewarded by 'click'"):
        both.check_signals()
    with pytest.raises(ValueError, match=r"agents\.critics='own' is for mmrf and massa, not for method 'iql'"):
        registry.configured("iql", OWN)
    run = configs.override(configs.Run(), agents={"critics": "own", **MODEL_FREE})
    assert configs.run_of(configs.as_dict(run)).agents.critics == "own"
