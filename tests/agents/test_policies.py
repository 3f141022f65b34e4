"""TSCAC, TD3+BC, IQL, BC and MASSA: their losses by hand, and what of a state they move."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mmrf_jax.agents import iql, massa, registry, td3_bc, tscac
from mmrf_jax.agents.mmrf import losses, networks, training_step
from mmrf_jax.agents.mmrf.config import AgentConfig

ALONE = dataclasses.replace(tiny.CONFIG, signals=("watch_time",), ablation="no_augmentation")
QUIET = dataclasses.replace(tiny.CONFIG, communication="none", ablation="no_augmentation")
MASSA = dataclasses.replace(tiny.CONFIG, communication="shared_latent", ablation="no_augmentation")
B, T, C, K = 2, 3, 6, 2


@pytest.fixture(scope="module")
def items():
    return tiny.make_items()


def make_actor_batch(config: AgentConfig, seed: int = 0) -> losses.ActorBatch:
    """Random critics and scores of a batch in which every request is there."""
    rng = np.random.default_rng(seed)
    n, a = config.num_agents, config.num_actors
    mask = np.ones((B, T, K), bool)
    mask[0, 1, 1] = False

    def normal(*shape):
        return rng.normal(size=(B, T, *shape)).astype(np.float32)

    return losses.ActorBatch(
        scores=normal(a, C),
        q=normal(n, C),
        slate_bias=normal(n),
        value=normal(n),
        q_mean=np.zeros(n, np.float32),
        q_scale=np.linspace(0.5, 1.0, n, dtype=np.float32),
        slate=rng.random((B, T, C)).argsort(-1)[..., :K].astype(np.int32),
        slate_mask=mask,
        weight=None,
        mean=over_requests,
        jacobian=jax.jacrev,
    )


def over_requests(x):
    return x.mean(axis=(0, 1))


def relaxed(scores, k):
    """w with sum k by bisection, float64, NumPy."""
    low, high = scores.min() - 30.0, scores.max() + 30.0
    for _ in range(200):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if (1 / (1 + np.exp(middle - scores))).sum() > k else (low, middle)
    return 1 / (1 + np.exp(low - scores))


def test_td3_bc_by_hand():
    v = make_actor_batch(ALONE)
    loss, metrics = jax.jit(lambda scores: td3_bc.actor_loss(v._replace(scores=scores), ALONE.temperature))(v.scores)
    value, distance = np.zeros((B, T)), np.zeros((B, T))
    for b in range(B):
        for t in range(T):
            w = relaxed(np.float64(v.scores[b, t, 0]), K)
            q = np.float64(v.q[b, t, 0])
            value[b, t] = w @ (q - q.mean())
            logged = np.zeros(C)
            logged[v.slate[b, t][v.slate_mask[b, t]]] = 1.0
            distance[b, t] = ((w - logged) ** 2).sum() / K
    ascended = value.mean() / np.abs(value).mean()
    assert float(loss) == pytest.approx(distance.mean() - 2.5 * ascended, rel=1e-3)
    assert float(metrics["loss/distance"]) == pytest.approx(distance.mean(), rel=1e-3)


def test_iql_by_hand():
    v = make_actor_batch(ALONE)
    loss, _ = jax.jit(lambda scores: iql.actor_loss(v._replace(scores=scores), ALONE.temperature))(v.scores)
    total = 0.0
    for b in range(B):
        for t in range(T):
            scores, q = np.float64(v.scores[b, t, 0]), np.float64(v.q[b, t, 0])
            shown = [c for c, there in zip(v.slate[b, t].tolist(), v.slate_mask[b, t], strict=True) if there]
            left = list(range(C))
            for c in shown:
                advantage = q[c] + (float(v.slate_bias[b, t, 0]) - float(v.value[b, t, 0])) / len(shown)
                log_prob = scores[c] - np.log(np.exp(scores[left]).sum())
                total -= min(np.exp(3.0 * advantage / 0.5), 100.0) * log_prob
                left.remove(c)
    assert float(loss) == pytest.approx(total / (B * T * K), rel=1e-3)


@jax.jit
def iql_metrics(state, batch, items, expectile):
    """Metrics of an update with any expectile."""
    algorithm = training_step.Algorithm(iql.actor_loss, expectile=expectile)
    return training_step.update(state, batch, items, ALONE, algorithm=algorithm)[1]


def test_iql_values_are_expectiles_of_logged_slates(items):
    """V moves up by .7 of the shortfall and down by .3 of the excess; with .5 it is half of plain regression."""
    batch, state = tiny.make_batch(), tiny.make_state(ALONE)
    seven, five, three = (float(iql_metrics(state, batch, items, e)["loss/value"]) for e in (0.7, 0.5, 0.3))
    assert seven + three == pytest.approx(2.0 * five, rel=1e-4)
    assert abs(seven - three) > 1e-3 * five
    assert iql.EXPECTILE == 0.7 and iql.update.keywords["algorithm"].expectile == iql.EXPECTILE


def test_iql_never_values_what_was_not_logged(items):
    """Other scores of the actor change neither targets nor values; where values are the policy's they do."""
    batch, state = tiny.make_batch(), tiny.make_state(ALONE)
    other = state.replace(params=state.params | {"actor": jax.tree.map(lambda x: x + 0.3, state.params["actor"])})

    def of_td3_bc(state):
        return tiny.learner("td3_bc")(state, batch, items, config=ALONE)[1]

    for update, same in ((lambda state: iql_metrics(state, batch, items, 0.7), True), (of_td3_bc, False)):
        a, b = update(state), update(other)
        for name in ("loss/slate_bias", "loss/value"):
            assert (float(a[name]) == pytest.approx(float(b[name]), rel=1e-6)) == same, name


def test_tscac_closeness_by_hand():
    rng = np.random.default_rng(0)
    scores, others = rng.normal(size=C), rng.normal(size=(3, C))
    w = relaxed(scores, K)
    expected = []
    for other in others:
        o = relaxed(other, K)
        expected.append((w * np.log(w / o) + (1 - w) * np.log((1 - w) / (1 - o))).sum())
    closeness = jax.jit(tscac.closeness, static_argnums=2)
    np.testing.assert_allclose(closeness(scores, others, K), expected, rtol=1e-3)
    assert float(closeness(scores, np.tile(scores + 7.0, (3, 1)), K)[0]) == pytest.approx(0, abs=1e-4)


def test_tscac_settles_at_the_papers_solution(monkeypatch):
    """Ascending stage two's objective alone leads to w ∝ Π w_i^(lambda_i / Λ) exp(q / Λ)."""
    monkeypatch.setattr(losses, "PROJECTION_WEIGHT", 0.0)
    monkeypatch.setattr(tscac, "CLOSENESS", 0.2)
    v = make_actor_batch(QUIET)

    def loss(main):
        return tscac.actor_loss(v._replace(scores=jnp.asarray(v.scores).at[..., -1, :].set(main)), QUIET.temperature)[0]

    @jax.jit
    def ascend(main):
        return jax.lax.fori_loop(0, 3000, lambda _, main: main - 20.0 * jax.grad(loss)(main), main)

    main = ascend(v.scores[..., -1, :])
    tau, closeness = QUIET.temperature, 0.2
    stage_one = np.asarray(v.scores[..., :-1, :], np.float64)
    q = np.asarray(v.q / v.q_scale[:, None], np.float64)[..., -1, :]
    wanted = (q + closeness * stage_one.sum(axis=-2)) / (tau + closeness * stage_one.shape[-2])
    for b in range(B):
        for t in range(T):
            np.testing.assert_allclose(relaxed(np.float64(main[b, t]), K), relaxed(wanted[b, t], K), atol=5e-3)


def test_tscac_auxiliary_policies_are_stage_one(items):
    """What the main policy is held to does not move the others: they learn from their own critics alone."""
    config = dataclasses.replace(QUIET, optimizer="sgd", learning_rate=0.05)
    batch, state = tiny.make_batch(), tiny.make_state(config)

    @jax.jit
    def step(strength):
        def actor_loss(b, temperature):
            others = jax.lax.stop_gradient(b.scores[..., :-1, :])
            pull = b.mean(tscac.closeness(b.scores[..., -1, :], others, b.num_shown)).sum()
            loss, metrics = tscac.actor_loss(b, temperature)
            return loss + strength * pull, metrics

        algorithm = training_step.Algorithm(actor_loss)
        return training_step.update(state, batch, items, config, algorithm=algorithm)[0].params["actor"]

    assert set(state.params["actor"]["params"]) == {"agent_states", "main", "auxiliary", "state_gate"} | {
        "mix_in",
        "mix_bias",
        "mix_out",
    }
    moved = tiny.differences(step(0.0), step(1.0))
    assert moved and not any("auxiliary" in name for name in moved)


def test_bc_is_the_likelihood_of_logged_slates(items):
    batch, state = tiny.make_batch(), tiny.make_state(ALONE)
    fn = functools.partial(tiny.learner("bc"), config=ALONE)
    _, metrics = fn(state, batch, items)
    scores = np.float64(registry.score_candidates(state, batch, items, ALONE, "bc"))[..., 0, :]
    total, count = 0.0, 0
    for b, t in zip(*np.nonzero(batch.mask[:, :-1]), strict=True):
        left = list(range(scores.shape[-1]))
        for c in batch.slate[b, t][batch.slate_mask[b, t]]:
            total -= scores[b, t, c] - np.log(np.exp(scores[b, t, left]).sum())
            left.remove(c)
            count += 1
    assert float(metrics["loss/imitation"]) == pytest.approx(total / count, rel=1e-4)
    first = float(metrics["loss/imitation"])
    for _ in range(60):
        state, metrics = fn(state, batch, items)
    assert float(metrics["loss/imitation"]) < first - 0.3


def test_massa_differs_from_mmrf_in_communication_only(items):
    assert massa.update is training_step.update
    actor = jax.jit(networks.Actor(MASSA).apply)
    state = tiny.make_state(MASSA)
    params = state.params["actor"]
    assert "signal" in params["params"] and "collaboration" not in params["params"]
    rng = np.random.default_rng(0)
    z = rng.normal(size=(4, *params["params"]["signal"]["kernel"].shape[:1])).astype(np.float32)
    memory = rng.normal(size=(4, 2, 4, 14)).astype(np.float32)
    e = rng.normal(size=(4, 8, 14)).astype(np.float32)
    before = actor(params, z, memory, e).scores
    louder = jax.tree.map(lambda x: x, params)
    louder["params"]["signal"]["bias"] = louder["params"]["signal"]["bias"] + 1.0
    moved = np.abs(np.asarray(actor(louder, z, memory, e).scores - before)).max(axis=(0, 2))
    assert (moved > 1e-4).all()  # one signal for all agents
    changed = jax.tree.map(lambda x: x, params)
    changed["params"]["auxiliary"] = jax.tree.map(lambda x: x + 0.5, changed["params"]["auxiliary"])
    moved = np.abs(np.asarray(actor(changed, z, memory, e).scores - before)).max(axis=(0, 2))
    assert (moved[:-1] > 1e-4).all() and moved[-1] == 0.0  # the main agent does not see the others' scores
