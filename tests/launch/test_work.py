"""A guard against slow changes that needs no clock: operations and bytes by XLA's count, and how often it compiles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrf_jax.abtest import simulate
from mmrf_jax.agents.mmrf import policy
from mmrf_jax.cli.benchmarks import cost, speed
from mmrf_jax.data import sessions
from mmrf_jax.envs import learned
from mmrf_jax.parallel.partitioner import Partitioner
from mmrf_jax.training import steps, train_state

#: Operations and bytes of a request (of steps: of a batch's, padding included), with jax 0.10.2 on a CPU.
KEPT = {
    "world/random": (56_530, 70_000),
    "world/mmrf": (826_598, 318_304),
    "model/mmrf": (2_010_474, 526_969),
    "fit": (4_993_982, 1_405_669),
    "update": (9_334_306, 3_291_293),
}
ROOM = 1.1


def product(x):
    return jnp.tanh(x @ x)


def test_a_loop_counts_as_often_as_it_runs():
    x = jnp.ones((64, 64))
    once = cost.work(product, x)

    def scanned(x):
        return jax.lax.scan(lambda c, _: (product(c), None), x, length=37)[0]

    def nested(x):
        return jax.lax.scan(lambda c, _: (scanned(c), None), x, length=3)[0]

    assert once.flops >= 2 * 64**3 and once.bytes >= 2 * x.nbytes
    np.testing.assert_allclose(cost.work(scanned, x), cost.work(product, x).times(37), rtol=0.1)
    np.testing.assert_allclose(cost.work(nested, x), cost.work(product, x).times(111), rtol=0.1)


def test_the_limit_is_the_slower_of_both(monkeypatch):
    machine = cost.Machine(flops=100.0, bytes=10.0)
    assert machine.rate(cost.Work(flops=50.0, bytes=1e9)) == 2.0  # on a CPU
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert machine.rate(cost.Work(flops=50.0, bytes=20.0)) == 0.5 and machine.rate(cost.Work(50.0, 1.0)) == 2.0


@pytest.fixture(scope="module")
def run():
    return speed.fresh_run(**{"world.num_videos": 20_000, "collect.sessions": 128})


@pytest.fixture(scope="module")
def batches(run):
    index = sessions.segment_index(run.log, run.config.train.segment)

    def cut(rows):
        return sessions.gather_segments(run.log, rows, run.config.train.segment)

    return [Partitioner().shard_inputs(cut(index[i * 32 : (i + 1) * 32])) for i in range(3)]


@pytest.mark.slow
def test_the_work_of_hot_functions_does_not_grow(run, batches, optimised):
    items, plan = run.source.items, run.plan
    ranker = policy.make_actor_ranker(run.state.agents, items, plan.agents)
    model = learned.make_learned_env(train_state.model_of(run.state), items, plan.feedback, run.log, 64)
    update = functools.partial(
        steps.update_step, plan=plan, lr_scale=1.0, encodings=steps.precompute_item_embeddings(run.state, items, plan)
    )
    fit = functools.partial(steps.fit_step, plan=plan, lr_scale=1.0)
    share = 1.0 / batches[0].mask[:, :-1].size
    found = {
        "world/random": speed.request_work(speed.Serving(run.source.sim, speed.random_policy(run.source.sim))),
        "world/mmrf": speed.request_work(speed.Serving(run.source.sim, ranker)),
        "model/mmrf": speed.request_work(speed.Serving(model, ranker)),
        "fit": cost.work(fit, run.state, batches[0], items).times(share),
        "update": cost.work(update, run.state, batches[0], items).times(share),
    }
    for name, kept in KEPT.items():
        assert found[name].flops < ROOM * kept[0] and found[name].bytes < ROOM * kept[1], (name, found[name], kept)
        assert found[name].flops > kept[0] / 2, f"{name} does much less than before: keep {found[name]} instead"


@pytest.mark.slow
def test_each_program_is_compiled_once(run, batches):
    """Whatever the batch, the users and their number."""
    hot = (steps.fit_step, steps.update_step)
    before = [step._cache_size() for step in hot]
    state = Partitioner().replicate(jax.tree.map(jnp.copy, run.state))
    for batch in batches:
        for step in hot:
            state, _ = step(state, batch, run.source.items, run.plan, jnp.float32(1.0))
    assert [step._cache_size() - old for step, old in zip(hot, before, strict=True)] == [1, 1]
    before = simulate._serve._cache_size()
    for first, number in ((0, 300), (1_000, 300), (5, 77)):
        simulate.rollout_user_metrics(
            run.source.sim,
            run.source.policies["random"],
            jax.random.key(first),
            Partitioner(),
            user_ids=np.arange(first, first + number),
            day=0,
            capacity=300,
        )
    assert simulate._serve._cache_size() - before == 1
