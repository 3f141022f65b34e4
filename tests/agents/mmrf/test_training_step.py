"""One update: what it learns from, what it must not touch, and the same numbers however the batch is split."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mmrf_jax import ops, types
from mmrf_jax.agents.mmrf import acting, encoding, losses, networks, training_step
from mmrf_jax.models import embeddings, encoders, heads
from mmrf_jax.signals import SHORT_VIDEO

SGD = tiny.SGD
ADAM = dataclasses.replace(tiny.CONFIG, learning_rate=1e-2, dropout=0.1)


@pytest.fixture(scope="module")
def items():
    return tiny.make_items()


@pytest.fixture(scope="module")
def step(items):
    """A jitted SGD update, compiled once: (state, batch, weights of some losses) -> state, metrics."""
    return lambda state, batch, **weights: tiny.sgd_step(state, batch, items, **weights)


@pytest.fixture(scope="module")
def learn(items):
    """A jitted update with Adam and dropout, traced once: (state, batch) -> state, metrics."""
    chex.clear_trace_counter()
    fn = jax.jit(chex.assert_max_traces(training_step.update, n=1), static_argnames="config")
    return lambda state, batch: fn(state, batch, items, config=ADAM)


@pytest.fixture(scope="module")
def before():
    return tiny.make_state(SGD)


def test_shapes_and_metrics(step, before):
    after, metrics = step(before, tiny.make_batch())
    chex.assert_trees_all_equal_shapes_and_dtypes(before, after)
    assert int(after.step) == 1
    expected = {f"loss/{s}" for s in SHORT_VIDEO.names} | {
        "loss/continuation",
        "loss/slate_bias",
        "loss/value",
        "grad_norm",
    }
    expected |= {f"objective/{s}" for s in SGD.signals} | {"value/main"}
    assert expected <= set(metrics)
    assert all(np.shape(x) == () and np.isfinite(x) for x in metrics.values())
    tiny.differences(before, after)  # checks that all is finite


def test_values_start_from_the_returns_of_the_first_log(items):
    """Two requests of three videos a session, undiscounted: a slate's reward now and one later, or none."""
    mean, std = np.append(np.full(tiny.S - 1, 0.3), 15.0), np.append(np.full(tiny.S - 1, 0.5), 20.0)
    state = tiny.init(jax.random.key(0), SGD, tiny.SPEC, items, mean, std, mean_return=1.5 * 3 * mean)
    z_size, dim = encoders.sizes(SGD, tiny.SPEC)
    memory = np.zeros((1, len(SGD.decays), SGD.feedback_dim, dim), np.float32)
    out = jax.jit(networks.Critic(SGD).apply)(
        state.target, np.ones((1, z_size), np.float32), memory, np.zeros((1, 3, dim), np.float32)
    )
    slate = 3 * np.array([0.3 / 0.5, -0.3 / 0.5, 15.0 / 20.0])  # of click, hate and watch time
    for value, expected in ((out.value, 1.5 * slate), (out.slate_bias, 0.5 * slate)):
        np.testing.assert_allclose(value[0], [expected, expected], rtol=1e-5)


def test_traces_once_over_batches_and_loss_decreases(learn):
    state, batch = tiny.make_state(ADAM), tiny.make_batch()
    names = [f"loss/{s}" for s in SHORT_VIDEO.names] + ["loss/continuation"]
    history = []
    for i in range(100):
        state, metrics = learn(state, batch if i % 20 else tiny.make_batch(seed=i))
        if i % 20:
            history.append([float(metrics[name]) for name in names])
    history = np.array(history)
    first, last = history[:5].mean(axis=0), history[-5:].mean(axis=0)
    assert (last < first).all(), dict(zip(names, last - first, strict=True))
    assert last.sum() < 0.8 * first.sum()


def test_targets_move_by_polyak(step, before):
    after, _ = step(before, tiny.make_batch())
    rate, new, old = SGD.polyak, *jax.device_get((after.params["critic"], before.target))
    expected = jax.tree.map(lambda new, old: rate * new + (1 - rate) * old, new, old)
    chex.assert_trees_all_close(after.target, expected, atol=1e-7)
    assert tiny.differences(after.target, before.target)


def test_last_request_of_a_segment_is_not_learned_from(step, before):
    batch = tiny.make_batch()
    reference, metrics = step(before, batch)
    full = batch.mask[:, -1]
    assert full.any()
    rng = np.random.default_rng(1)
    feedback, slate, slate_mask = batch.feedback.copy(), batch.slate.copy(), batch.slate_mask.copy()
    feedback[:, -1] = tiny.make_feedback(rng, feedback[:, -1].shape[:2])
    slate[:, -1], slate_mask[:, -1] = slate[:, -1, ::-1] * 0 + np.arange(3), True
    terminated, truncated = batch.terminated.copy(), batch.truncated.copy()
    terminated[:, -1], truncated[:, -1] = ~terminated[:, -1], ~truncated[:, -1]
    other = batch.replace(
        feedback=feedback, slate=slate, slate_mask=slate_mask, terminated=terminated, truncated=truncated
    )
    after, other_metrics = step(before, other)
    assert not tiny.differences(reference, after)
    assert not tiny.differences(metrics, other_metrics)
    # But its candidates and context give the value to bootstrap from.
    moved, _ = step(before, batch.replace(candidates=_reversed_last(batch.candidates)))
    changed = tiny.differences(reference.params, moved.params)
    assert changed and all("critic" in name for name in changed)  # neither encoder nor actors
    moved, _ = step(before, batch.replace(context=_reversed_last(batch.context)))
    assert tiny.differences(reference.params["critic"], moved.params["critic"])


def _reversed_last(x):
    x = x.copy()
    x[:, -1] = x[::-1, -1]  # of other users
    return x


def test_masked_values_have_no_effect_to_the_bit(step, before):
    batch = tiny.make_batch()
    reference, metrics = step(before, batch)
    rng = np.random.default_rng(2)
    gone, dark = ~batch.mask, ~batch.slate_mask

    def noise(x):
        return (100.0 * rng.normal(size=x.shape)).astype(x.dtype)

    def put(x, where, new):
        return np.where(where.reshape(*where.shape, *[1] * (x.ndim - where.ndim)), new, x)

    seconds = np.abs(noise(batch.feedback))
    other = batch.replace(
        context=put(batch.context, gone, noise(batch.context)),
        candidates=put(batch.candidates, gone, rng.integers(0, 30, batch.candidates.shape, dtype=np.int32)),
        slate=put(batch.slate, dark, rng.integers(0, 8, batch.slate.shape, dtype=np.int32)),
        slate_mask=batch.slate_mask | gone[..., None],  # slates of requests that are not there
        feedback=put(batch.feedback, dark, seconds),
        log_propensity=put(batch.log_propensity, gone, noise(batch.log_propensity)),
        terminated=batch.terminated | gone,
        truncated=batch.truncated | gone,
        history=types.Exposure(
            videos=put(batch.history.videos, ~batch.history.mask, 7),
            feedback=put(batch.history.feedback, ~batch.history.mask, np.abs(noise(batch.history.feedback))),
            mask=batch.history.mask,
        ),
    )
    after, other_metrics = step(before, other)
    assert not tiny.differences(reference, after)
    assert not tiny.differences(metrics, other_metrics)


def test_users_without_requests_have_no_effect(step, before):
    """Users of whom nothing is known only pad a batch: who they are does not matter."""
    batch = tiny.make_batch()
    known = np.arange(8) < 5
    padded = batch.replace(mask=batch.mask & known[:, None])
    other = tiny.make_batch(seed=9)
    swapped = jax.tree.map(lambda x, y: np.concatenate([x[:5], y[5:]]), padded, other)
    swapped = swapped.replace(mask=padded.mask)
    assert not tiny.differences(step(before, padded)[0], step(before, swapped)[0])


def test_rows_of_videos_not_in_the_batch_keep_their_bits(step, before):
    batch = tiny.make_batch()
    few = np.arange(8) < 3
    batch = batch.replace(
        mask=batch.mask & few[:, None],
        slate_mask=batch.slate_mask & few[:, None, None],
        history=batch.history.replace(mask=batch.history.mask & few[:, None]),
    )
    after, _ = step(before, batch)
    learned = np.asarray(batch.loss_masks().exposure) > 0
    shown = np.take_along_axis(batch.candidates, batch.slate, axis=-1)
    seen = set(shown[:, :-1][learned]) | set(shown[batch.slate_mask]) | set(batch.history.videos[batch.history.mask])
    old, new = before.tables["id"], after.tables["id"]
    moved = np.any(np.asarray(old.rows != new.rows), axis=1)
    np.testing.assert_array_equal(moved, np.asarray(old.accumulator != new.accumulator))
    assert set(np.flatnonzero(moved) - 1) <= seen  # video v has row v + 1
    assert set(shown[:, :-1][learned]) <= set(np.flatnonzero(moved) - 1)
    assert not moved[0] and len(seen) < 30  # neither the out-of-vocabulary row, nor all


def test_update_does_not_depend_on_the_order_of_users(step, before):
    batch = tiny.make_batch()
    order = np.random.default_rng(3).permutation(8)
    ours, theirs = before, before
    for _ in range(3):
        ours, metrics = step(ours, batch)
        theirs, their_metrics = step(theirs, jax.tree.map(lambda x: x[order], batch))
    chex.assert_trees_all_close(ours.params, theirs.params, atol=1e-5)
    chex.assert_trees_all_close(ours.tables, theirs.tables, atol=1e-5)
    chex.assert_trees_all_close(metrics, their_metrics, atol=1e-4, rtol=1e-4)


def test_dropout_draws_anew_each_step_and_repeats_with_its_key(learn):
    state, batch = tiny.make_state(ADAM), tiny.make_batch()
    _, first = learn(state, batch)
    _, again = learn(state, batch)
    _, second = learn(state.replace(step=state.step + 1), batch)
    assert not tiny.differences(first, again)
    assert tiny.differences(first, second)


def test_terminated_is_not_bootstrapped_from_and_truncated_not_judged(step, before):
    """A session that ends and one that is cut at the same request: the first is learned from, the second is not."""
    batch = tiny.make_batch()
    user = int(np.flatnonzero(batch.mask.sum(axis=1) == 2)[0])
    fields = {name: np.zeros_like(batch.mask) for name in ("terminated", "truncated")}
    fields["mask"] = np.arange(8)[:, None] == user
    fields["mask"] = fields["mask"] & batch.mask
    left = batch.replace(**fields | {"terminated": fields["mask"] & (np.arange(5) == 1)})
    cut = batch.replace(**fields | {"truncated": fields["mask"] & (np.arange(5) == 1)})

    def known(b):
        return np.asarray(b.loss_masks().next_known)[user]

    np.testing.assert_array_equal(known(left), [1, 1, 0, 0])
    np.testing.assert_array_equal(known(cut), [1, 0, 0, 0])
    exposed = np.asarray(cut.loss_masks().exposure)[user]
    np.testing.assert_array_equal(exposed[:2], batch.slate_mask[user, :2])  # its feedback is known all the same
    assert float(step(before, left)[1]["loss/continuation"]) != float(step(before, cut)[1]["loss/continuation"])


def inputs(config, users=5):
    rng = np.random.default_rng(4)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    z_size, dim = encoders.sizes(config, tiny.SPEC)
    memory = normal(users, len(config.decays), config.feedback_dim, dim)
    items = normal(users, tiny.SPEC.candidates, dim)
    return normal(users, z_size), memory, items


@functools.partial(jax.jit, static_argnames="config")
def act(config, params):
    return networks.Actor(config).apply(params, *inputs(config))


@functools.partial(jax.jit, static_argnames="config")
def gradient_of_main_scores(config, params):
    """Gradient of a functional of the main agent's scores with respect to the actors."""

    def value(p):
        return jnp.sum(jnp.sin(networks.Actor(config).apply(p, *inputs(config)).scores[:, -1]))

    return jax.grad(value)(params)["params"]


def actors(config):
    """Weights of the actors; those of both ablations are drawn once."""
    return tiny.make_state(dataclasses.replace(SGD, ablation=config.ablation, signals=config.signals)).params["actor"]


def main_gradient(config):
    return gradient_of_main_scores(config, actors(config))


def test_auxiliary_actors_feel_the_main_agent_by_lambda():
    def with_weight(weight):
        return main_gradient(dataclasses.replace(SGD, main_objective_weight=weight))["auxiliary"]

    none, some, full = with_weight(0.0), with_weight(0.3), with_weight(1.0)
    for leaf in jax.tree.leaves(none):
        np.testing.assert_array_equal(leaf, 0.0)
    assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(full))
    chex.assert_trees_all_close(some, jax.tree.map(lambda x: 0.3 * np.asarray(x), full), rtol=1e-4, atol=1e-6)


def test_scores_have_an_agent_each_and_do_not_depend_on_lambda():
    scores = []
    for weight in (0.0, 1.0):
        config = dataclasses.replace(SGD, main_objective_weight=weight)
        out = act(config, actors(config))
        assert out.scores.shape == (5, 3, 8) and out.attention.shape == (5, 2, 3, 3)
        np.testing.assert_allclose(out.attention.sum(-1), 1.0, atol=1e-5)
        scores.append(out.scores)
    np.testing.assert_allclose(*scores, atol=1e-5)


def scale_auxiliary(params, factor):
    """The actors with everything that belongs to auxiliary agents alone scaled: their vectors and their states."""
    params = jax.tree.map(np.array, params)
    auxiliary = SGD.agent_dim * (SGD.num_agents - 1)
    params["params"]["agent_states"]["kernel"][:, :auxiliary] *= factor
    params["params"]["auxiliary"] = jax.tree.map(lambda x: x * factor, params["params"]["auxiliary"])
    return params


@pytest.mark.parametrize("ablation", ["none", "no_collaboration"])
def test_main_agent_listens_to_the_others_unless_ablated(ablation):
    config = dataclasses.replace(SGD, ablation=ablation, main_objective_weight=1.0)
    params = actors(config)
    assert ("collaboration" in params["params"]) == (ablation == "none")
    before, after = act(config, params), act(config, scale_auxiliary(params, 3.0))
    moved = np.abs(np.asarray(after.scores - before.scores)).max(axis=(0, 2))  # [N]
    assert (moved[:-1] > 0.1).all()
    gradient = main_gradient(config)
    auxiliary = [gradient["auxiliary"], gradient["agent_states"]["kernel"][:, : 2 * SGD.agent_dim]]
    if ablation == "none":
        assert moved[-1] > 1e-2
        assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(auxiliary))
    else:
        assert moved[-1] == 0.0
        np.testing.assert_array_equal(before.attention, 0.0)
        for leaf in jax.tree.leaves(auxiliary):
            np.testing.assert_array_equal(leaf, 0.0)


def test_a_single_agent_needs_no_others(items):
    config = dataclasses.replace(SGD, signals=("watch_time",))
    state = tiny.make_state(config)
    after, _ = jax.eval_shape(functools.partial(training_step.update, config=config), state, tiny.make_batch(), items)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
    assert "collaboration" not in state.params["actor"]["params"]
    out = act(config, state.params["actor"])
    assert out.scores.shape == (5, 1, 8) and out.attention.shape == (5, 2, 1, 1)
    assert np.isfinite(out.scores).all()


def test_actors_do_not_teach_the_encoder_or_the_critics(step, before):
    """The encoder learns from feedback; staying and values leave it alone, and so do the actors."""
    after, _ = step(before, tiny.make_batch(), signal_weights=(0.0,) * tiny.S)
    assert not tiny.differences(before.params["encoder"], after.params["encoder"])
    assert not tiny.differences(before.tables, after.tables)
    assert tiny.differences(before.params["actor"], after.params["actor"])
    moved = tiny.differences(before.params["critic"], after.params["critic"])
    assert moved and all(any(part in name for part in ("value", "stay", "extra_reward")) for name in moved)


@pytest.fixture(scope="module")
def drawn(items, before):
    """A state whose maximisers are partly clipped, a batch, and a function of the actors' weights: scores and q.

    The scores [B, T, N, C] are the actors', q [B, T, N, C] the target critics'.
    """
    state = before.replace(q_mean=jnp.array([0.3, -0.2, 0.1]), q_scale=jnp.array([0.01, 0.5, 2.0]))
    batch = tiny.make_batch()

    def answers(params):
        r = encoding.encode_batch(SGD, state.params["encoder"], state.tables, batch, items)
        candidates = embeddings.encode_videos(SGD, state.params["encoder"], state.tables, items, batch.candidates)
        scores = acting.apply_actors(SGD, params, acting.critics_of(state, SGD), r.z, r.memory_mean, candidates).scores
        pool = networks.Critic(SGD).apply(state.target, r.z, r.memory_mean, candidates)
        continue_prob = heads.continue_prob(pool, ops.relaxed_top_k(scores[..., -1, :], SGD.slate, 1.0))
        reward = losses.video_rewards(SHORT_VIDEO, pool, state.reward_scale, SGD.reward_terms)
        q = losses.video_values(reward, pool.continue_item_logit, pool.value.min(axis=-2), continue_prob, SGD.discount)
        return scores[:, :-1], jax.lax.stop_gradient(q[:, :-1])

    return state, batch, answers


def test_projection_is_the_distance_to_the_maximiser(step, drawn):
    state, batch, answers = drawn
    scores, q = (np.asarray(x, np.float64) for x in jax.jit(answers)(state.params["actor"]))
    mean, scale = (np.asarray(x, np.float64)[:, None] for x in (state.q_mean, state.q_scale))
    maximiser = (q - mean) / (scale * SGD.temperature)
    assert 0 < (np.abs(maximiser) > 20).mean() < 1
    distance = ((scores - np.clip(maximiser, -20, 20)) ** 2).mean(axis=-1).sum(axis=-1)  # [B, T]
    expected = distance[batch.mask[:, :-1]].mean()
    _, metrics = step(state, batch)
    assert float(metrics["loss/projection"]) == pytest.approx(expected, rel=1e-4)


def test_projection_draws_the_actors_and_nothing_else(step, drawn):
    state, batch, answers = drawn
    learned_with, _ = step(state, batch)
    learned_without, _ = step(state, batch, projection=0.0)

    def distance(params):
        scores, q = answers(params)
        maximiser = (q - state.q_mean[:, None]) / (state.q_scale[:, None] * SGD.temperature)
        each = jnp.mean((scores - jnp.clip(maximiser, -20, 20)) ** 2, axis=-1).sum(axis=-1)
        return jnp.sum(each * batch.mask[:, :-1]) / batch.mask[:, :-1].sum()

    distance = jax.jit(jax.value_and_grad(distance))
    before, gradient = distance(state.params["actor"])
    learned_with, learned_without, gradient = jax.device_get((learned_with.params, learned_without.params, gradient))
    drawn_by = jax.tree.map(lambda a, b: a - b, learned_with["actor"], learned_without["actor"])
    expected = jax.tree.map(lambda g: -SGD.learning_rate * 0.1 * g, gradient)
    assert max(np.abs(x).max() for x in jax.tree.leaves(expected)) > 1e-2
    chex.assert_trees_all_close(drawn_by, expected, rtol=1e-3, atol=1e-5)
    for part in ("encoder", "critic"):
        chex.assert_trees_all_close(learned_with[part], learned_without[part], atol=1e-6)
    small = jax.tree.map(lambda x, g: np.asarray(x) - np.float32(1e-4) * g, state.params["actor"], gradient)
    assert distance(small)[0] < before


def test_every_parameter_is_learned(step, before):
    after, _ = step(before, tiny.make_batch())
    moved = tiny.differences(before.params, after.params)
    assert len(moved) == len(jax.tree.leaves(before.params))


SPLIT = """
import dataclasses, functools, sys
import jax, numpy as np
sys.path.insert(0, "tests/agents")
import tiny
from mmrf_jax.agents.mmrf import training_step
from mmrf_jax.parallel.partitioner import Partitioner

assert jax.device_count() == 4
SGD = dataclasses.replace(tiny.CONFIG, optimizer="sgd", learning_rate=0.05)
items = tiny.make_items()
steps = int(sys.argv[1])
batches = [tiny.make_batch(seed=i, users=16) for i in range(min(steps, 10))]
single = jax.jit(functools.partial(training_step.update, config=SGD))

def run(fn, state, put=lambda batch: batch):
    for i in range(steps):
        state, metrics = fn(state, put(batches[i % len(batches)]), items)
    return jax.device_get(state), jax.device_get(metrics)

def same(ours, theirs):
    state, metrics = ours
    other, other_metrics = theirs
    for name in ("params", "target", "tables", "q_mean", "q_scale"):
        difference = tiny.differences(getattr(state, name), getattr(other, name))
        assert max(difference.values(), default=0.0) <= 1e-5, difference
    for name, value in metrics.items():
        np.testing.assert_allclose(value, other_metrics[name], rtol=1e-3, atol=1e-4, err_msg=name)
    assert int(state.step) == int(other.step) == steps

reference = run(single, tiny.make_state(SGD))
assert max(tiny.differences(reference[0].params, tiny.make_state(SGD).params).values()) > 1e-2  # it did move
"""

PMAP = """
def update(state, part):  # each device gathers the whole batch; the update knows nothing of devices
    batch = jax.tree.map(lambda x: jax.lax.all_gather(x, "data", tiled=True), part)
    return training_step.update(state, batch, items, SGD)
mapped = jax.pmap(update, axis_name="data", in_axes=(None, 0))
split = lambda batch: jax.tree.map(lambda x: x.reshape(4, -1, *x.shape[1:]), batch)
replicas = []
def fn(state, batch, items):
    out = mapped(state, batch)
    replicas.append(jax.device_get(out))
    return jax.tree.map(lambda x: x[0], out)
same(reference, run(fn, tiny.make_state(SGD), split))
for leaf in jax.tree.leaves((replicas[-1][0].params, replicas[-1][0].tables, replicas[-1][1])):
    assert (leaf == leaf[:1]).all()  # all replicas hold the same bits
"""

SHARDED = """
partitioner = Partitioner()
items = partitioner.replicate(items)
replicated, sharded = partitioner.replicated_sharding, partitioner.data_sharding
jitted = jax.jit(
    functools.partial(training_step.update, config=SGD),
    in_shardings=(replicated, sharded, replicated), out_shardings=replicated, donate_argnums=0,
)
state = partitioner.replicate(tiny.make_state(SGD))
same(reference, run(jitted, state, partitioner.shard_inputs))
"""


@pytest.mark.slow
def test_update_under_pmap(run_python):
    """House rule 2: the product runs under jit; `jax.pmap` gives the same numbers."""
    run_python(SPLIT + PMAP, 5, devices=4)


@pytest.mark.parametrize("steps", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_update_on_four_devices(run_python, steps):
    """Contract, "Tolerances" (a): fixed log, 100 SGD updates, parameters to 1e-5."""
    run_python(SPLIT + SHARDED, steps, devices=4)
