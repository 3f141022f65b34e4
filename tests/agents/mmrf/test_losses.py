"""Every loss against scikit-learn, finite differences or hand-computed numbers."""

import dataclasses
import functools
import re
from pathlib import Path

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

rewards = jax.jit(losses.rewards, static_argnums=2)
simulated_rewards = jax.jit(losses.simulated_rewards, static_argnums=3)
video_rewards = jax.jit(functools.partial(losses.video_rewards, SHORT_VIDEO), static_argnums=2)
video_values = jax.jit(losses.video_values)
feedback_loss = jax.jit(functools.partial(heads.feedback_loss, SHORT_VIDEO))
expected_feedback = jax.jit(functools.partial(heads.expected_feedback, SHORT_VIDEO))
continue_prob, policy_objective = jax.jit(heads.continue_prob), jax.jit(losses.policy_objective)

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
        reward_residual=None,
        slate_bias=normal(2, n),
        value=3.0 + normal(2, n),
    )


def test_the_page_of_equations_names_functions():
    page = (Path(__file__).resolve().parents[3] / "docs" / "update.md").read_text()
    named = set(re.findall(r"`(losses|heads)\.(\w+)`", page))
    assert len(named) == 11
    for module, name in named:
        assert callable(getattr({"losses": losses, "heads": heads}[module], name))


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
    np.testing.assert_allclose(
        rewards(feedback, SCALE, config.reward_terms), feedback[index] * [1, -1, 1] / SCALE[index]
    )


def test_a_single_agent_can_stand_for_all():
    config = dataclasses.replace(tiny.CONFIG, signals=("watch_time",), reward="sum_of_signals")
    feedback = np.arange(1.0, S + 1)
    by_hand = {name: feedback[SHORT_VIDEO.index(name)] / SCALE[SHORT_VIDEO.index(name)] for name in SHORT_VIDEO.names}
    click, like, follow, comment, forward = (by_hand[n] for n in ("click", "like", "follow", "comment", "forward"))
    total = click + like + follow + comment + forward - by_hand["hate"] + by_hand["watch_time"]
    np.testing.assert_allclose(rewards(feedback, SCALE, config.reward_terms), [total], rtol=1e-6)
    # Widened by each signal's own size, whatever its sign.
    u = np.linspace(0.1, 0.9, S)
    width = sum(u[SHORT_VIDEO.index(n)] * by_hand[n] for n in SHORT_VIDEO.agents)
    wide = simulated_rewards(feedback, u, SCALE, config.reward_terms, 0.5)
    np.testing.assert_allclose(wide, [total + 0.5 * width], rtol=1e-6)


def test_unknown_choices_are_refused():
    with pytest.raises(ValueError, match=r"unknown agents.sampling='x'; choose among"):
        dataclasses.replace(tiny.CONFIG, sampling="x")


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
    np.testing.assert_allclose(rewards(feedback, SCALE, config.reward_terms), expected, rtol=1e-6)


def test_td_targets_do_not_bootstrap_from_the_end():
    reward = jnp.array([[1.0, 10.0], [2.0, 20.0]])
    value = jnp.array([[100.0, 200.0], [100.0, 200.0]])
    got = losses.td_targets(reward, value, jnp.array([False, True]), 0.9)
    np.testing.assert_allclose(got, [[91.0, 190.0], [2.0, 20.0]], rtol=1e-6)


def test_stay_probability_adds_effects_of_what_is_exposed():
    out = critic_output(np.random.default_rng(2), 4).replace(
        continue_logit=jnp.array(-1.0), continue_item_logit=jnp.array([0.5, 2.0, -3.0, 1.0])
    )
    got = continue_prob(out, jnp.array([1.0, 0.5, 0.0, 1.0]))
    assert float(got) == pytest.approx(expit(-1.0 + 0.5 + 1.0 + 1.0), rel=1e-6)


def test_video_values_are_the_slope_of_reward_and_staying():
    """q_c = d/dw_c of sum(w r) + gamma p_stay(w) V, here by finite differences in float64."""
    config, rng = tiny.CONFIG, np.random.default_rng(3)
    out = critic_output(rng, 6)
    w = rng.random(6)
    value = np.float64(out.value.min(axis=0))
    p = continue_prob(out, jnp.float32(w))
    reward = video_rewards(out, SCALE, config.reward_terms)
    q = video_values(reward, out.continue_item_logit, jnp.float32(value), p, config.discount)
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
    terms, discount = tiny.CONFIG.reward_terms, tiny.CONFIG.discount

    def value(out, value, stay):
        return video_values(video_rewards(out, SCALE, terms), out.continue_item_logit, value, stay, discount)

    got = value(batched, values, stay)
    assert got.shape == (2, 3, 3, 4)
    for i, out in enumerate(outs):
        one = value(out, values[i // 3, i % 3], stay[i // 3, i % 3])
        np.testing.assert_allclose(got[i // 3, i % 3], one, rtol=1e-5, atol=1e-6)


def test_slate_values_by_hand():
    slate_bias, q = jnp.array([1.0, -1.0]), jnp.array([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]])
    got = losses.slate_values(slate_bias, q, jnp.array([1.0, 0.0, 0.5]))
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
    w = ops.relaxed_top_k(scores, 2, 1.0)
    expected = (np.sum(np.asarray(w) * np.asarray(q)) + 0.5 * float(ops.entropy(w))) / 2
    assert float(policy_objective(scores, q, 2, 0.5)) == pytest.approx(expected, rel=1e-6)
    # A video of more value: its score should rise, and the others' fall.
    gradient = jax.jit(jax.grad(losses.policy_objective))(jnp.zeros(4), jnp.array([1.0, 0.0, 0.0, 0.0]), 2, 0.5)
    assert gradient[0] > 0 and (gradient[1:] < 0).all()


def test_slate_bias_loss_by_hand():
    """(b + q - target)^2 of each twin; the bases alone have a gradient."""
    slate_bias = jnp.array([[1.0, 2.0], [0.0, -1.0]])  # two twins, two agents
    slate_q, target = jnp.array([3.0, 4.0]), jnp.array([5.0, 1.0])
    np.testing.assert_allclose(losses.slate_bias_loss(slate_bias, slate_q, target), [[1.0, 25.0], [4.0, 4.0]])
    gradients = jax.grad(lambda *x: losses.slate_bias_loss(*x).sum(), (0, 1, 2))(slate_bias, slate_q, target)
    np.testing.assert_allclose(gradients[0], [[-2.0, 10.0], [-4.0, 4.0]])
    assert not np.any(gradients[1]) and not np.any(gradients[2])


def test_value_loss_by_hand():
    """A shortfall of 2 and an excess of 1; with an expectile of 0.7 the shortfall weighs 0.7 and the excess 0.3."""
    value, target = jnp.array([[1.0], [4.0]]), jnp.array([3.0])
    np.testing.assert_allclose(losses.value_loss(value, target), [[4.0], [1.0]])
    np.testing.assert_allclose(losses.value_loss(value, target, 0.7), [[2.8], [0.3]], rtol=1e-6)
    assert not np.any(jax.grad(lambda t: losses.value_loss(value, t, 0.7).sum())(target))


def test_continuation_loss_by_hand():
    """Log-odds -1 + 0.5 + 2 of the two shown videos."""
    out = critic_output(np.random.default_rng(6), 3).replace(
        continue_logit=jnp.array(-1.0), continue_item_logit=jnp.array([0.5, 7.0, 2.0])
    )
    w, p = jnp.array([1.0, 0.0, 1.0]), expit(1.5)
    assert float(heads.continuation_loss(out, w, jnp.array(1.0))) == pytest.approx(-np.log(p), rel=1e-6)
    assert float(heads.continuation_loss(out, w, jnp.array(0.0))) == pytest.approx(-np.log1p(-p), rel=1e-6)
    mixed = -0.3 * np.log(p) - 0.7 * np.log1p(-p)
    assert float(heads.continuation_loss(out, w, jnp.array(0.3))) == pytest.approx(mixed, rel=1e-6)


def test_actor_loss_by_hand():
    """Minus the sum of the agents' objectives, plus 0.1 of the distance to their maximisers; two requests, weighted."""
    rng = np.random.default_rng(7)
    scores, q = rng.normal(size=(1, 2, 2, 4)), rng.normal(size=(1, 2, 2, 4))
    q_mean, q_scale, tau, k = np.array([0.1, -0.2]), np.array([0.5, 2.0]), 0.25, 2
    b = losses.ActorBatch(
        scores=jnp.float32(scores),
        q=jnp.float32(q),
        slate_bias=jnp.zeros((1, 2, 2)),
        value=jnp.zeros((1, 2, 2)),
        q_mean=jnp.float32(q_mean),
        q_scale=jnp.float32(q_scale),
        slate=jnp.zeros((1, 2, k), jnp.int32),
        slate_mask=jnp.ones((1, 2, k), bool),
        weight=None,
        mean=lambda x: jnp.einsum("bt,bt...->...", jnp.array([[0.75, 0.25]]), x),
        jacobian=jax.jacrev,
    )
    loss, metrics = losses.actor_loss(b, tau)
    w = np.float64(ops.relaxed_top_k(jnp.float32(scores), k, 1.0))
    entropy = -(w * np.log(w) + (1 - w) * np.log1p(-w)).sum(axis=-1)
    value = ((w * q / q_scale[:, None]).sum(axis=-1) + tau * entropy) / k  # [1, 2, N]
    wanted = np.clip((q - q_mean[:, None]) / (q_scale[:, None] * tau), -20, 20)
    distance = ((scores - wanted) ** 2).mean(axis=-1).sum(axis=-1)
    over_requests = np.array([0.75, 0.25])
    np.testing.assert_allclose(metrics["objective"], over_requests @ value[0], rtol=1e-5)
    projected = over_requests @ distance[0]
    assert float(metrics["loss/projection"]) == pytest.approx(projected, rel=1e-5)
    assert float(loss) == pytest.approx(0.1 * projected - (over_requests @ value[0]).sum(), rel=1e-5)


def test_counterfactual_losses_of_one_slate_by_hand():
    """Two videos, two agents; whole slates and the model's probability of staying."""
    rng, gamma = np.random.default_rng(8), 0.9
    out = critic_output(rng, 2, n=2).replace(reward_residual=jnp.array([[0.5, 0.0], [1.0, -1.0]]))
    feedback = np.full((2, S), 0.25, np.float32)
    feedback[:, WATCH] = [10.0, 40.0]
    slate = losses.CounterfactualStep(
        feedback=jnp.asarray(feedback),
        reward=jnp.array([[1.0, 2.0], [3.0, -1.0]]),
        reward_residual=jnp.array([[0.5, 1.0], [0.0, 0.0]]),
        continue_prob=jnp.array(0.5),
        next_value=jnp.array([4.0, 8.0]),
        video_reward=jnp.array([[0.5, 0.5], [1.0, 2.0]]),
        continue_logit=jnp.array(-0.5),
        continue_item_logit=jnp.array([0.25, 1.25]),
        value=jnp.array([10.0, 20.0]),
        policy_continue_prob=jnp.array(0.6),
    )
    got = losses.counterfactual_losses(SHORT_VIDEO, out, slate, SCALE, gamma)
    assert {name: x.shape for name, x in got.items()} == {
        "feedback": (2, S),
        "continuation": (),
        "slate_bias": (2, 2),
        "reward_residual": (2, 2),
    }
    np.testing.assert_allclose(got["reward_residual"], [[0.0, 1.0], [1.0, 1.0]], rtol=1e-6)
    for s in range(S - 1):
        p = expit(np.float64(out.feedback[s]))
        np.testing.assert_allclose(got["feedback"][:, s], -0.25 * np.log(p) - 0.75 * np.log1p(-p), rtol=1e-5)
    eta = np.float64(out.feedback[WATCH])
    np.testing.assert_allclose(got["feedback"][:, WATCH], np.exp(eta) - np.array([0.5, 2.0]) * eta, rtol=1e-5)
    logit = float(out.continue_logit) + np.float64(out.continue_item_logit).sum()
    assert float(got["continuation"]) == pytest.approx(np.logaddexp(0.0, logit) - 0.5 * logit, rel=1e-5)
    change = gamma * (expit(1.0) - 0.6)  # of staying, from the policy's slate to this one
    error = np.array([1.0 + change * 10.0 - (3.0 + gamma * 0.5 * 4.0), 3.0 + change * 20.0 - (2.0 + gamma * 0.5 * 8.0)])
    np.testing.assert_allclose(got["slate_bias"], (np.float64(out.slate_bias) + error) ** 2, rtol=1e-5)
