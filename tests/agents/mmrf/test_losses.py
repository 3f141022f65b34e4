"""Every loss against scikit-learn, finite differences or hand-computed numbers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from scipy.special import expit
from sklearn.metrics import log_loss

from mmrf_jax import ops
from mmrf_jax.agents.mmrf import losses
from mmrf_jax.agents.mmrf.networks import CriticOutput
from mmrf_jax.models import heads
from mmrf_jax.signals import SHORT_VIDEO

rewards = jax.jit(losses.rewards, static_argnums=0)
simulated_rewards = jax.jit(losses.simulated_rewards, static_argnums=0)
video_values = jax.jit(losses.video_values, static_argnums=0)
feedback_loss = jax.jit(functools.partial(heads.feedback_loss, SHORT_VIDEO))
expected_feedback = jax.jit(functools.partial(heads.expected_feedback, SHORT_VIDEO))
continue_probability, policy_objective = jax.jit(heads.continue_probability), jax.jit(losses.policy_objective)

S, WATCH = tiny.S, SHORT_VIDEO.index("watch_time")
SCALE = np.append(np.linspace(0.1, 0.8, S - 1), 20.0).astype(np.float32)


def critic_output(rng, m, n=3):
    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return CriticOutput(
        feedback=normal(S, m),
        extra=normal(0, m),
        continue_logit=normal(),
        continue_item_logit=normal(m),
        gap=None,
        base=normal(2, n),
        value=3.0 + normal(2, n),
    )


def test_feedback_loss_is_log_loss_for_binary_signals():
    rng = np.random.default_rng(0)
    raw, feedback = rng.normal(size=(S, 40)).astype(np.float32) * 2, tiny.make_feedback(rng, (40,))
    loss = np.asarray(feedback_loss(raw, feedback, SCALE))
    assert loss.shape == (40, S)
    for s in range(S - 1):
        assert loss[:, s].mean() == pytest.approx(log_loss(feedback[:, s], expit(np.float64(raw[s]))), rel=1e-5)


def test_feedback_loss_of_watch_time_by_hand():
    raw = np.zeros((S, 3), np.float32)
    raw[WATCH] = [0.0, np.log(2.0), -1.0]
    feedback = np.zeros((3, S), np.float32)
    feedback[:, WATCH] = [20.0, 40.0, 0.0]  # 1, 2 and 0 in units of the scale
    loss = feedback_loss(raw, feedback, SCALE)[:, WATCH]
    np.testing.assert_allclose(loss, [1.0, 2.0 - 2.0 * np.log(2.0), np.exp(-1.0)], rtol=1e-6)
    # Least where the mean is predicted, 40 s here, whatever the spread.
    some = np.zeros((4, S), np.float32)
    some[:, WATCH] = [0.0, 10.0, 30.0, 120.0]

    def mean_loss(eta):
        return feedback_loss(jnp.full((S, 4), eta), some, SCALE)[:, WATCH].mean()

    assert float(jax.grad(mean_loss)(jnp.log(2.0))) == pytest.approx(0.0, abs=1e-6)


def test_feedback_loss_is_finite_for_wild_predictions():
    feedback = np.full((2, S), 1.0, np.float32)
    for wild in (-1e4, 1e4):
        loss, gradient = jax.jit(jax.value_and_grad(lambda raw: feedback_loss(raw, feedback, SCALE).sum()))(
            jnp.full((S, 2), wild)
        )
        assert np.isfinite(loss) and np.isfinite(gradient).all()


def test_watch_time_can_be_rewarded_by_long_views():
    feedback = np.arange(1.0, S + 1)
    config = dataclasses.replace(tiny.CONFIG, reward="long_view")
    index = [SHORT_VIDEO.index(s) for s in ("click", "hate", "long_view")]
    np.testing.assert_allclose(rewards(config, feedback, SCALE), feedback[index] * [1, -1, 1] / SCALE[index])


def test_a_single_agent_can_stand_for_all():
    config = dataclasses.replace(tiny.CONFIG, signals=("watch_time",), reward="sum_of_signals", uncertainty_bonus=0.5)
    feedback = np.arange(1.0, S + 1)
    by_hand = {name: feedback[SHORT_VIDEO.index(name)] / SCALE[SHORT_VIDEO.index(name)] for name in SHORT_VIDEO.names}
    click, like, follow, comment, forward = (by_hand[n] for n in ("click", "like", "follow", "comment", "forward"))
    total = click + like + follow + comment + forward - by_hand["hate"] + by_hand["watch_time"]
    np.testing.assert_allclose(rewards(config, feedback, SCALE), [total], rtol=1e-6)
    # Widened by each signal's own size, whatever its sign.
    u = np.linspace(0.1, 0.9, S)
    width = sum(u[SHORT_VIDEO.index(n)] * by_hand[n] for n in SHORT_VIDEO.agents)
    wide = simulated_rewards(config, feedback, u, SCALE)
    np.testing.assert_allclose(wide, [total + 0.5 * width], rtol=1e-6)


@pytest.mark.parametrize("field", ["reward", "sampling"])
def test_unknown_choices_are_refused(field):
    with pytest.raises(ValueError, match=f"unknown agents.{field}='x'; choose among"):
        dataclasses.replace(tiny.CONFIG, **{field: "x"})


def test_expected_feedback_is_in_the_units_of_the_signals():
    raw = np.zeros((2, S, 4), np.float32)
    raw[:, :WATCH] = np.log(0.25 / 0.75)
    raw[:, WATCH] = np.log(1.5)
    expected = np.asarray(expected_feedback(raw, SCALE))
    np.testing.assert_allclose(expected[:, :WATCH], 0.25, rtol=1e-6)  # one sigmoid, not two
    np.testing.assert_allclose(expected[:, WATCH], 30.0, rtol=1e-6)
    rng = np.random.default_rng(1)
    raw = rng.normal(size=(S, 5)).astype(np.float32)
    np.testing.assert_allclose(expected_feedback(raw, SCALE)[:WATCH], expit(raw[:WATCH]), rtol=1e-5)
    np.testing.assert_allclose(expected_feedback(raw, SCALE)[WATCH], 20.0 * np.exp(raw[WATCH]), rtol=1e-5)


def test_rewards_by_name_and_a_hate_counts_negative():
    config = dataclasses.replace(tiny.CONFIG, signals=("hate", "like", "click", "watch_time"))
    feedback = np.zeros((2, S), np.float32)
    for name in ("hate", "like"):
        feedback[0, SHORT_VIDEO.index(name)] = 1.0
    feedback[1, SHORT_VIDEO.index("click")] = 1.0
    feedback[1, WATCH] = 50.0
    per = {name: 1.0 / SCALE[SHORT_VIDEO.index(name)] for name in ("hate", "like", "click")}
    expected = [[-per["hate"], per["like"], 0.0, 0.0], [0.0, 0.0, per["click"], 2.5]]
    np.testing.assert_allclose(rewards(config, feedback, SCALE), expected, rtol=1e-6)


def test_td_targets_do_not_bootstrap_from_the_end():
    reward = jnp.array([[1.0, 10.0], [2.0, 20.0]])
    value = jnp.array([[100.0, 200.0], [100.0, 200.0]])
    got = losses.td_targets(reward, value, jnp.array([False, True]), 0.9)
    np.testing.assert_allclose(got, [[91.0, 190.0], [2.0, 20.0]], rtol=1e-6)


def test_stay_probability_adds_effects_of_what_is_exposed():
    out = critic_output(np.random.default_rng(2), 4).replace(
        continue_logit=jnp.array(-1.0), continue_item_logit=jnp.array([0.5, 2.0, -3.0, 1.0])
    )
    got = continue_probability(out, jnp.array([1.0, 0.5, 0.0, 1.0]))
    assert float(got) == pytest.approx(expit(-1.0 + 0.5 + 1.0 + 1.0), rel=1e-6)


def test_video_values_are_the_slope_of_reward_and_staying():
    """q_c = d/dw_c of sum(w r) + gamma p_stay(w) V, here by finite differences in float64."""
    config, rng = tiny.CONFIG, np.random.default_rng(3)
    out = critic_output(rng, 6)
    w = rng.random(6)
    value = np.float64(out.value.min(axis=0))
    q = video_values(config, out, jnp.asarray(value, jnp.float32), continue_probability(out, jnp.float32(w)), SCALE)
    assert q.shape == (3, 6)
    expected = np.float64(expected_feedback(out.feedback, SCALE)) / SCALE[:, None]
    reward = np.stack([sign * expected[i] for ((i, sign),) in config.reward_terms])

    def worth(w):
        stay = expit(float(out.continue_logit) + w @ np.float64(out.continue_item_logit))
        return reward @ w + config.discount * stay * value

    for c in range(6):
        step = 1e-5 * np.eye(6)[c]
        np.testing.assert_allclose(q[:, c], (worth(w + step) - worth(w - step)) / 2e-5, rtol=2e-4, atol=1e-5)


def test_video_values_with_batch_axes():
    rng = np.random.default_rng(4)
    outs = [critic_output(rng, 4) for _ in range(6)]
    batched = jax.tree.map(lambda *x: jnp.stack(x).reshape(2, 3, *x[0].shape), *outs)
    values, stay = rng.random((2, 3, 3)).astype(np.float32), rng.random((2, 3)).astype(np.float32)
    got = video_values(tiny.CONFIG, batched, values, stay, SCALE)
    assert got.shape == (2, 3, 3, 4)
    for i, out in enumerate(outs):
        one = video_values(tiny.CONFIG, out, values[i // 3, i % 3], stay[i // 3, i % 3], SCALE)
        np.testing.assert_allclose(got[i // 3, i % 3], one, rtol=1e-5, atol=1e-6)


def test_slate_values_by_hand():
    base, q = jnp.array([1.0, -1.0]), jnp.array([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]])
    got = losses.slate_values(base, q, jnp.array([1.0, 0.0, 0.5]))
    np.testing.assert_allclose(got, [1.0 + 2.5, -1.0 + 25.0], rtol=1e-6)


@pytest.mark.parametrize("tau", [0.25, 1.0])
def test_policy_objective_teaches_the_order_of_all_candidates(tau):
    rng = np.random.default_rng(5)
    q = jnp.asarray(rng.permutation(7) * 0.3 * tau, jnp.float32)
    start = jnp.asarray(-q + rng.normal(size=7), jnp.float32)  # nearly the wrong way round
    adam = optax.adam(optax.cosine_decay_schedule(0.05, 1500))

    def body(carry, _):
        scores, moments = carry
        gradient = jax.grad(lambda a: -losses.policy_objective(a, q, 3, tau))(scores)
        updates, moments = adam.update(gradient, moments)
        return (scores + updates, moments), None

    (scores, _), _ = jax.jit(lambda a: jax.lax.scan(body, (a, adam.init(a)), length=1500))(start)
    np.testing.assert_array_equal(np.argsort(scores), np.argsort(q))
    difference = np.asarray(scores - q / tau)
    np.testing.assert_allclose(difference - difference.mean(), 0.0, atol=0.02)
    # and at that point, the objective is above that of the start and flat
    flat = jax.jit(jax.grad(lambda a: losses.policy_objective(a, q, 3, tau)))(q / tau)
    np.testing.assert_allclose(flat, 0.0, atol=2e-5)
    assert float(policy_objective(q / tau, q, 3, tau)) > float(policy_objective(start, q, 3, tau))


def test_policy_objective_by_hand():
    scores, q = jnp.array([3.0, 0.0, -1.0, 0.5]), jnp.array([1.0, 2.0, 3.0, 4.0])
    w = ops.soft_top_k(scores, 2, 1.0)
    expected = (np.sum(np.asarray(w) * np.asarray(q)) + 0.5 * float(ops.entropy(w))) / 2
    assert float(policy_objective(scores, q, 2, 0.5)) == pytest.approx(expected, rel=1e-6)
    # A video of more value: its score should rise, and the others' fall.
    gradient = jax.jit(jax.grad(losses.policy_objective))(jnp.zeros(4), jnp.array([1.0, 0.0, 0.0, 0.0]), 2, 0.5)
    assert gradient[0] > 0 and (gradient[1:] < 0).all()
