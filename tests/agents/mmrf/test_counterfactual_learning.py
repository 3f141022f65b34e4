"""What the agents learn from slates that were not shown: every loss by hand, and what must not matter."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy.special import expit

from mmrf_jax import ops, types
from mmrf_jax.agents.mmrf import acting, encoding, losses, networks
from mmrf_jax.models import embeddings, encoders, heads
from mmrf_jax.models.optimization import make_optimizer
from mmrf_jax.signals import SHORT_VIDEO

SGD = dataclasses.replace(
    tiny.CONFIG, optimizer="sgd", learning_rate=0.05, counterfactual_weight=0.5, uncertainty_bonus=0.3, model_weight=0.4
)
S, WATCH, N, M, K = tiny.S, SHORT_VIDEO.index("watch_time"), 3, 2, 3
SCALE = np.append(np.linspace(0.1, 0.8, S - 1), 20.0).astype(np.float32)


def make_simulated(batch: types.SessionBatch, seed: int = 0, num_slates: int = M) -> types.CounterfactualSlates:
    rng = np.random.default_rng(seed)
    users, t, c = batch.candidates.shape
    shape = (users, t, num_slates, K)
    slates = rng.random((users, t, c)).argsort(axis=-1)[..., : num_slates * K].reshape(shape)
    expected = rng.uniform(0.02, 0.98, (*shape, S))
    expected[..., WATCH] = rng.gamma(1.0, 15.0, shape)
    return types.CounterfactualSlates(
        slates=slates.astype(np.int32),
        expected=expected.astype(np.float32),
        uncertainty=rng.gamma(1.0, 1.0, (*shape, S)).astype(np.float32),
        sampled=tiny.make_feedback(rng, shape).astype(np.float32),
        continue_prob=rng.random(shape[:3]).astype(np.float32),
        pool=types.FeedbackPrediction(
            feedback=rng.normal(size=(users, t, S, c)).astype(np.float32),
            continue_logit=rng.normal(size=(users, t)).astype(np.float32),
            continue_item_logit=rng.normal(size=(users, t, c)).astype(np.float32),
        ),
    )


@pytest.fixture(scope="module")
def items():
    return tiny.make_items()


@pytest.fixture(scope="module")
def before():
    state = tiny.make_state(SGD)  # with critics of some spread, so that every term of a value counts
    return state.replace(q_mean=jnp.array([0.3, -0.2, 0.1]), q_scale=jnp.array([0.8, 0.5, 2.0]))


@pytest.fixture(scope="module")
def step(items):
    """A jitted SGD update, compiled once for the module: (state, batch, simulated) -> state, metrics."""
    return lambda state, batch, simulated: tiny.step(state, batch, items, config=SGD, simulated=simulated)


@pytest.fixture(scope="module")
def critics(items, before):
    """critics(batch, simulated, config) -> the critics' outputs on the unseen videos [B, T+1, …, M K], those of the
    target critics on all candidates, 0.4 of them the model's, and the chance of staying after the main agent's slate
    [B, T+1], as float64."""

    @functools.partial(jax.jit, static_argnames="config")
    def answers(state, batch, simulated, unseen, config):
        r = encoding.encode_batch(config, state.params["encoder"], state.tables, batch, items, unseen)
        candidates = embeddings.encode_videos(config, state.params["encoder"], state.tables, items, batch.candidates)
        critic = networks.Critic(config)
        known = acting.critics_of(state, config)
        scores = acting.apply_actors(config, state.params["actor"], known, r.z, r.memory_mean, candidates).scores
        pool = critic.apply(state.target, r.z, r.memory_mean, candidates)
        for name in ("feedback", "continue_logit", "continue_item_logit"):
            mixed = 0.6 * getattr(pool, name) + 0.4 * getattr(simulated.pool, name)
            pool = pool.replace(**{name: mixed})
        stay = heads.continue_prob(pool, ops.relaxed_top_k(scores[..., -1, :], config.slate, 1.0))
        return critic.apply(state.params["critic"], r.z, r.memory_mean, r.unseen), pool, stay

    def run(batch, simulated, config=SGD):
        flat = simulated.slates.reshape(*simulated.slates.shape[:2], -1)
        unseen = np.take_along_axis(batch.candidates, flat, axis=-1)
        return jax.tree.map(np.float64, answers(before, batch, simulated, unseen, config))

    return run


def mean_over_requests(batch, terms):
    """Mean of terms [B, T] over the requests that are learned from."""
    return terms[batch.mask[:, :-1]].mean()


def agents_rewards(feedback, scale):
    """[..., S] -> [..., N] for click, hate and watch time."""
    hate = SHORT_VIDEO.index("hate")
    return np.stack(
        [feedback[..., 0] / scale[0], -feedback[..., hate] / scale[hate], feedback[..., WATCH] / scale[WATCH]], -1
    )


def test_simulated_rewards_by_hand():
    feedback, uncertainty = np.full((2, S), 0.2, np.float32), np.full((2, S), 9.0, np.float32)
    hate = SHORT_VIDEO.index("hate")
    feedback[:, WATCH] = [10.0, 40.0]
    uncertainty[:, [0, hate, WATCH]] = [[0.0, 1.0, 2.0], [4.0, 0.0, 0.4]]
    click, hated = 0.2 / SCALE[0], -0.2 / SCALE[hate]

    def rewarded(bonus):
        return losses.simulated_rewards(feedback, uncertainty, SCALE, tiny.CONFIG.reward_terms, bonus)

    expected = [[click, 0.5 * hated, 1.0], [3.0 * click, hated, 2.4]]
    np.testing.assert_allclose(rewarded(0.5), expected, rtol=1e-6)
    pessimist = [[click, 1.5 * hated, 0.0], [-click, hated, 1.6]]
    np.testing.assert_allclose(rewarded(-0.5), pessimist, rtol=1e-5, atol=1e-7)
    none = losses.rewards(feedback, SCALE, tiny.CONFIG.reward_terms)
    np.testing.assert_allclose(rewarded(0.0), none, rtol=1e-6)


def test_a_bonus_raises_negative_rewards_and_a_negative_one_lowers_them():
    """Widening moves every reward, a hate's as well, up by beta and down by -beta, the more the more uncertain."""
    rng = np.random.default_rng(0)
    feedback = rng.random((50, S)).astype(np.float32)
    u = np.broadcast_to(np.linspace(0.0, 2.0, 50)[:, None], (50, S))
    terms = tiny.CONFIG.reward_terms
    plain = np.asarray(losses.rewards(feedback, SCALE, terms))
    for beta in (0.4, -0.4):
        moved = np.asarray(losses.simulated_rewards(feedback, u, SCALE, terms, beta)) - plain
        np.testing.assert_allclose(moved, beta * u[:, :N] * np.abs(plain), rtol=1e-4, atol=1e-5)
        assert (np.sign(plain + moved) == np.sign(plain)).all()


def test_simulated_slates_are_a_share_of_the_unseen():
    for rho, candidates, slates in ((0.25, 60, 4), (0.25, 6, 0), (1.0, 18, 5), (0.0, 60, 0), (0.4, 18, 2)):
        config = dataclasses.replace(tiny.CONFIG, counterfactual_weight=rho)
        assert config.simulated_slates(candidates) == slates
        assert dataclasses.replace(config, ablation="no_augmentation").simulated_slates(candidates) == 0


@pytest.mark.parametrize(
    ("ablation", "bonus", "exists"),
    [
        ("none", 0.1, True),
        ("none", 0.0, False),
        ("no_collaboration", -0.1, True),
        ("no_augmentation", 0.1, False),
        ("constant_negative", 0.0, True),
    ],
)
def test_gaps_are_learned_only_where_rewards_differ_from_feedback(ablation, bonus, exists):
    config = dataclasses.replace(tiny.CONFIG, ablation=ablation, uncertainty_bonus=bonus)
    assert config.rewards_differ == exists
    z_size, dim = encoders.sizes(config, tiny.SPEC)
    inputs = (jnp.ones((1, z_size)), jnp.ones((1, 2, config.feedback_dim, dim)), jnp.ones((1, 5, dim)))
    out, params = jax.eval_shape(networks.Critic(config).init_with_output, jax.random.key(0), *inputs)
    assert ("extra_reward" in params["params"]) == exists
    assert (out.reward_residual.shape == (1, N, 5)) if exists else (out.reward_residual is None)


def test_next_context_by_hand():
    batch = tiny.make_batch(users=3)
    context = np.zeros((3, 5, 2), np.float32)
    context[..., 0] = 10.0 * np.arange(3)[:, None] + np.arange(5)
    context[..., 1] = np.log1p(7.0 + np.arange(5))
    mask = np.arange(5) < np.array([1, 3, 5])[:, None]
    got = batch.replace(context=np.where(mask[..., None], context, -50.0), mask=mask).next_context()
    assert got.shape == (3, 4, 2)
    np.testing.assert_allclose(got[0, 0], [0.0, np.log(9.0)], rtol=1e-5)  # nothing is logged: a position later
    np.testing.assert_array_equal(got[1, :2], context[1, 1:3])
    np.testing.assert_allclose(got[1, 2], [12.0, np.log(11.0)], rtol=1e-5)
    np.testing.assert_array_equal(got[2], context[2, 1:])


def test_values_of_all_candidates_are_also_the_models(step, before, critics):
    """With 0.4 of the model in feedback and staying; seen in the running spread of the main agent's values."""
    batch = tiny.make_batch()
    simulated = make_simulated(batch)
    _, pool, stay = critics(batch, simulated)
    value = pool.value.min(axis=-2)
    reward = np.exp(pool.feedback[..., WATCH, :]) + pool.reward_residual[..., -1, :]  # of watch time over its scale
    slope = SGD.discount * stay * (1.0 - stay) * value[..., -1]
    q = reward + slope[..., None] * pool.continue_item_logit
    centred = (q - q.mean(axis=-1, keepdims=True))[:, :-1][batch.mask[:, :-1]]
    spread = np.sqrt((centred**2).mean())
    after, _ = step(before, batch, simulated)
    assert spread > 0.1
    assert float(after.q_scale[-1]) == pytest.approx(spread, rel=1e-5)  # the first is taken whole
    other, _ = step(before, batch, simulated.replace(pool=make_simulated(batch, seed=1).pool))
    assert tiny.differences((after.q_scale, after.params), (other.q_scale, other.params))


def test_values_can_be_the_models_without_any_slates(items, before):
    """The model's view of the pool moves values, and through them base and actors; there are no terms of slates."""
    batch = tiny.make_batch()
    fn = functools.partial(tiny.step, config=SGD)
    ours, theirs = (make_simulated(batch, seed, num_slates=0) for seed in (0, 1))
    after, metrics = fn(before, batch, items, simulated=ours)
    assert not any("simulated" in name for name in metrics)
    other, _ = fn(before, batch, items, simulated=theirs)
    moved = tiny.differences(after.params, other.params)
    assert any("actor" in name for name in moved) and any("values" in name for name in moved)
    assert not any("signals" in name or "encoder" in name for name in moved)  # they are taught by feedback alone


@pytest.mark.slow
def test_without_weight_simulated_slates_change_nothing(items, before):
    config, batch = dataclasses.replace(SGD, counterfactual_weight=0.0, model_weight=0.0), tiny.make_batch()
    fn = functools.partial(tiny.step, config=config)
    plain, metrics = fn(before, batch, items)
    after, more = fn(before, batch, items, simulated=make_simulated(batch))
    for name in ("params", "target", "tables", "q_mean", "q_scale"):
        assert max(tiny.differences(getattr(plain, name), getattr(after, name)).values(), default=0.0) <= 1e-6
    assert set(more) - set(metrics) == {
        f"loss/simulated_{name}" for name in ("feedback", "continuation", "reward_residual", "slate_bias")
    }
    for name, value in metrics.items():
        np.testing.assert_allclose(value, more[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_feedback_staying_and_gap_by_hand(step, before, critics):
    batch = tiny.make_batch()
    simulated = make_simulated(batch)
    out, _, _ = critics(batch, simulated)
    _, metrics = step(before, batch, simulated)
    raw = np.moveaxis(out.feedback, -2, -1)[:, :-1].reshape(8, 4, M, K, S)
    label, scale = np.float64(simulated.expected)[:, :-1], np.float64(before.reward_scale)
    binary = np.logaddexp(0.0, raw) - label * raw  # also where a label is a probability
    watch = np.exp(raw[..., WATCH]) - label[..., WATCH] / scale[WATCH] * raw[..., WATCH]
    per_signal = np.concatenate([binary[..., :WATCH], watch[..., None]], axis=-1).mean(axis=(2, 3))
    expected = mean_over_requests(batch, per_signal @ np.array(SGD.loss_weights))
    assert float(metrics["loss/simulated_feedback"]) == pytest.approx(expected, rel=1e-4)

    logit = out.continue_logit[:, :-1, None] + out.continue_item_logit[:, :-1].reshape(8, 4, M, K).sum(axis=-1)
    stay = np.logaddexp(0.0, logit) - np.float64(simulated.continue_prob)[:, :-1] * logit
    assert float(metrics["loss/simulated_continuation"]) == pytest.approx(
        mean_over_requests(batch, stay.mean(-1)), rel=1e-4
    )

    reward = agents_rewards(label, scale)
    u = np.float64(simulated.uncertainty)[:, :-1, ..., [i for ((i, _),) in SGD.reward_terms]]
    gap = np.moveaxis(out.reward_residual, -2, -1)[:, :-1].reshape(8, 4, M, K, N)
    expected = ((gap - 0.3 * u * np.abs(reward)) ** 2).mean(axis=(2, 3)).sum(axis=-1)
    assert float(metrics["loss/simulated_reward_residual"]) == pytest.approx(
        mean_over_requests(batch, expected), rel=1e-4
    )


@pytest.fixture(scope="module")
def next_values(items, before):
    """V(s') [B, T, M, N] after each simulated slate: logs in which the slate was shown, through the batch encoder."""

    @jax.jit
    def values(batch):
        r = encoding.encode_batch(SGD, before.params["encoder"], before.tables, batch, items)
        nothing = jnp.zeros((*r.z.shape[:-1], 0, r.shown.shape[-1]))
        return networks.Critic(SGD).apply(before.target, r.z, r.memory_mean, nothing).value.min(axis=-2)

    def run(batch, simulated):
        out = np.zeros((*simulated.continue_prob[:, :-1].shape, N))
        follows = np.asarray(batch.next_context())
        for t in range(out.shape[1]):
            for m in range(out.shape[2]):

                def at(old, new, t=t):
                    return np.concatenate([old[:, :t], new[:, None], old[:, t + 1 :]], axis=1)

                b = batch.replace(
                    slate=at(batch.slate, simulated.slates[:, t, m]),
                    slate_mask=at(batch.slate_mask, np.ones_like(batch.slate_mask[:, t])),
                    feedback=at(batch.feedback, simulated.sampled[:, t, m]),
                    context=np.concatenate(
                        [batch.context[:, : t + 1], follows[:, t : t + 1], batch.context[:, t + 2 :]], 1
                    ),
                )
                out[:, t, m] = np.asarray(values(b))[:, t + 1]
        return out

    return run


@pytest.mark.parametrize("stays", [True, False])
def test_target_is_the_reward_and_the_value_of_the_next_state_if_there_is_one(
    step, before, critics, next_values, stays
):
    batch = tiny.make_batch()
    simulated = make_simulated(batch)
    simulated = simulated if stays else simulated.replace(continue_prob=np.zeros_like(simulated.continue_prob))
    out, pool, stay_main = critics(batch, simulated)
    _, metrics = step(before, batch, simulated)
    scale = np.float64(before.reward_scale)
    means = np.concatenate(
        [expit(pool.feedback[..., :WATCH, :]), scale[WATCH] * np.exp(pool.feedback[..., WATCH:, :])], -2
    )
    of_videos = agents_rewards(np.moveaxis(means, -2, -1), scale) + np.moveaxis(
        pool.reward_residual, -2, -1
    )  # [B, T+1, C, N]
    value = pool.value.min(axis=-2)  # [B, T+1, N]
    reward = agents_rewards(np.float64(simulated.expected), np.float64(before.reward_scale))
    u = np.float64(simulated.uncertainty)[..., [i for ((i, _),) in SGD.reward_terms]]
    target = (reward + 0.3 * u * np.abs(reward)).sum(axis=-2)[:, :-1]  # [B, T, M, N]
    if stays:
        target += SGD.discount * np.float64(simulated.continue_prob)[:, :-1, :, None] * next_values(batch, simulated)
    error = np.zeros((8, 4, M, 2, N))
    for m in range(M):
        slate = simulated.slates[:, :, m]
        stay = expit(pool.continue_logit + np.take_along_axis(pool.continue_item_logit, slate, axis=-1).sum(axis=-1))
        slate_q = np.take_along_axis(of_videos, slate[..., None], axis=2).sum(axis=2)
        slate_q += SGD.discount * (stay - stay_main)[..., None] * value
        error[:, :, m] = out.slate_bias[:, :-1] + (slate_q[:, :-1] - target[:, :, m])[:, :, None]
    expected = 0.1 * mean_over_requests(batch, (error**2).sum(axis=(-2, -1)).mean(axis=-1))
    assert float(metrics["loss/simulated_slate_bias"]) == pytest.approx(expected, rel=1e-4)


def test_requests_that_are_not_learned_from_have_no_simulated_slates(step, before):
    """Those that are masked, and the last of a segment: to the bit. Of the last the pool counts, to bootstrap from."""
    batch = tiny.make_batch()
    simulated, other = make_simulated(batch), make_simulated(batch, seed=1)
    learned = np.pad(batch.mask[:, :-1], ((0, 0), (0, 1)))
    assert (batch.mask & ~learned).any() and (~batch.mask).any()

    def put(where, x, y):
        return np.where(where.reshape(*where.shape, *[1] * (x.ndim - 2)), x, y)

    swapped = jax.tree.map(functools.partial(put, learned), simulated, other)
    swapped = swapped.replace(pool=jax.tree.map(functools.partial(put, batch.mask), simulated.pool, other.pool))
    reference, metrics = step(before, batch, simulated)
    after, other_metrics = step(before, batch, swapped)
    assert not tiny.differences(reference, after)
    assert not tiny.differences(metrics, other_metrics)
    whole = jax.tree.map(functools.partial(put, ~learned), simulated, other).replace(pool=simulated.pool)
    assert tiny.differences(reference.params, step(before, batch, whole)[0].params)


def test_order_of_users_and_slates_does_not_matter(step, before):
    batch = tiny.make_batch()
    simulated, order = make_simulated(batch), np.random.default_rng(3).permutation(8)
    ours, metrics = step(before, batch, simulated)
    for shuffle, other in ((lambda x: x[order], batch), (lambda x: x[:, :, ::-1], None)):
        pool = simulated.pool if other is None else jax.tree.map(shuffle, simulated.pool)
        permuted = jax.tree.map(shuffle, simulated.replace(pool=None)).replace(pool=pool)
        theirs, their_metrics = step(before, batch if other is None else jax.tree.map(shuffle, other), permuted)
        chex.assert_trees_all_close(ours.params, theirs.params, atol=1e-5)
        chex.assert_trees_all_close(ours.tables, theirs.tables, atol=1e-5)
        chex.assert_trees_all_close(metrics, their_metrics, atol=1e-4, rtol=1e-4)


def test_values_do_not_teach_the_encoder(step, before):
    """Drawn feedback and staying of simulated slates reach values and staying, not encoder, tables or actors."""
    batch = tiny.make_batch()
    simulated, other = make_simulated(batch), make_simulated(batch, seed=1)
    reference, _ = step(before, batch, simulated)
    after, _ = step(before, batch, simulated.replace(sampled=other.sampled, continue_prob=other.continue_prob))
    moved = tiny.differences((reference.params, reference.tables), (after.params, after.tables))
    assert all("critic" in name and ("value" in name or "stay" in name) for name in moved), moved
    assert any("value" in name for name in moved) and any("stay_items" in name for name in moved)


def test_constant_negative_rewards_have_no_feedback(items, before, critics):
    """With `constant_negative` only the slates are learned from; the gap makes every reward -1."""
    config, batch = dataclasses.replace(SGD, ablation="constant_negative"), tiny.make_batch()
    fn = functools.partial(tiny.step, config=config)
    simulated, other = make_simulated(batch), make_simulated(batch, seed=1)
    reference, metrics = fn(before, batch, items, simulated=simulated)
    assert {name for name in metrics if "simulated" in name} == {
        "loss/simulated_reward_residual",
        "loss/simulated_slate_bias",
    }
    answered = simulated.replace(expected=other.expected, uncertainty=other.uncertainty, pool=other.pool)
    assert not tiny.differences(reference, fn(before, batch, items, simulated=answered)[0])
    out, _, _ = critics(batch, simulated, config)
    scale = np.float64(before.reward_scale)
    means = np.concatenate(
        [expit(out.feedback[..., :WATCH, :]), scale[WATCH] * np.exp(out.feedback[..., WATCH:, :])], -2
    )
    reward = agents_rewards(np.moveaxis(means, -2, -1), scale) + np.moveaxis(out.reward_residual, -2, -1)
    expected = ((reward + 1.0) ** 2).mean(axis=2).sum(axis=-1)[:, :-1]
    assert float(metrics["loss/simulated_reward_residual"]) == pytest.approx(
        mean_over_requests(batch, expected), rel=1e-4
    )


@pytest.mark.slow
def test_predictions_of_unseen_videos_become_the_labels(items, before):
    """Half of the catalogue is never shown; its labels, staying and rewards are learned from simulated slates alone."""
    config = dataclasses.replace(SGD, optimizer="adamw", learning_rate=1e-2, counterfactual_weight=1.0)
    rng, batch = np.random.default_rng(0), tiny.make_batch(users=16)
    low, high = (rng.random((16, 5, 15)).argsort(axis=-1) + start for start in (0, 15))
    batch = batch.replace(
        candidates=np.concatenate([low[..., :3], high[..., :5]], axis=-1).astype(np.int32),
        slate=np.broadcast_to(np.arange(3), (16, 5, 3)).astype(np.int32),
    )
    simulated = make_simulated(batch, num_slates=1)
    slates = np.broadcast_to(np.array([3, 4, 5], np.int32), simulated.slates.shape)
    videos = np.take_along_axis(batch.candidates, slates[:, :, 0], axis=-1)[:, :, None]
    odd = videos % 2
    expected = np.full(simulated.expected.shape, 0.3, np.float32)
    expected[..., 0] = np.where(odd, 0.85, 0.1)
    expected[..., SHORT_VIDEO.index("hate")] = np.where(odd, 0.05, 0.4)
    expected[..., WATCH] = np.where(odd, 30.0, 5.0)
    continue_prob = expit(0.8 - 0.6 * odd.sum(axis=-1)).astype(np.float32)
    simulated = simulated.replace(
        slates=slates, expected=expected, uncertainty=np.ones_like(expected), continue_prob=continue_prob
    )
    fn = functools.partial(tiny.step, config=config)
    state = before.replace(optimizer=make_optimizer(config, config.actor_learning_rate).init(before.params))
    for _ in range(200):
        state, _ = fn(state, batch, items, simulated=simulated)

    @jax.jit
    def answers(state):
        r = encoding.encode_batch(config, state.params["encoder"], state.tables, batch, items, videos[:, :, 0])
        out = networks.Critic(config).apply(state.params["critic"], r.z, r.memory_mean, r.unseen)
        mean = heads.expected_feedback(SHORT_VIDEO, out.feedback, state.reward_scale)
        return (
            jnp.moveaxis(mean, -2, -1),
            jnp.moveaxis(out.reward_residual, -2, -1),
            heads.continue_prob(out, jnp.ones(3)),
        )

    mean, gap, stays = (np.asarray(x)[:, :-1][batch.mask[:, :-1]] for x in answers(state))
    wanted, wanted_stay = expected[:, :-1, 0][batch.mask[:, :-1]], continue_prob[:, :-1, 0][batch.mask[:, :-1]]
    assert np.abs(mean - wanted)[..., :WATCH].mean(axis=(0, 1)).max() < 0.05
    assert np.abs(mean / wanted - 1.0)[..., WATCH].mean() < 0.15
    assert np.abs(stays - wanted_stay).mean() < 0.1 < wanted_stay.std()
    reward = agents_rewards(wanted, np.asarray(state.reward_scale))
    assert np.abs(gap - 0.3 * np.abs(reward)).mean() < 0.3 * np.abs(0.3 * np.abs(reward)).mean()
