"""Embedding tables split by rows over four devices: the same numbers as whole ones, and nothing of their size moves."""

import pytest

FOUR_DEVICES = """
import dataclasses, re, sys
sys.path.insert(0, "tests/agents")
import jax, jax.numpy as jnp, numpy as np, tiny
from mmrf_jax.models import embeddings
from mmrf_jax.parallel.partitioner import Partitioner
from mmrf_jax.training import steps, train_state

embeddings.SPLIT_ROWS, embeddings.SPLITS = 3_000, 8
VIDEOS = 4_001
spec = dataclasses.replace(tiny.SPEC, num_videos=VIDEOS)
config = dataclasses.replace(tiny.CONFIG, optimizer="sgd")
plan = steps.TrainConfig("mmrf", config, tiny.FEEDBACK, rounds=1, closed_loop=True, slates=1)
items, ones = tiny.make_items(spec), jnp.ones(9)
batches = [tiny.make_batch(seed, spec=spec) for seed in range(3)]
init = lambda key: steps.init_train_state(key, plan, spec, items, 0.3 * ones, ones, ones)

def learned(devices):
    partitioner = Partitioner(jax.devices()[:devices])
    shapes = train_state.infer_shardings(jax.eval_shape(init, jax.random.key(0)), partitioner)
    state = partitioner.partition_init(init, shapes)(jax.random.key(0))
    here = partitioner.replicate(items)
    for batch in batches:
        placed = partitioner.shard_inputs(batch)
        state, _ = steps.fit_step(state, placed, here, plan, 1.0)
        state, _ = steps.update_step(state, placed, here, plan, 1.0)
    return state, partitioner, here

state, partitioner, here = learned(4)
split = [state.agents.tables["id"], state.behavior_params["tables"]["id"], state.feedback.tables["id"]]
for table in split:
    assert table.num_rows == 4_008
    for x in (table.rows, table.accumulator):
        assert x.sharding.is_equivalent_to(partitioner.data_sharding, x.ndim), x.sharding
        assert [shard.data.shape[0] for shard in x.addressable_shards] == [1_002] * 4
tags = state.agents.tables["tag"].rows
assert tags.sharding.is_fully_replicated
whole, _, _ = learned(1)
worst = max(tiny.differences(whole, state).values(), default=0.0)
assert worst < 1e-5, worst

COLLECTIVES = {steps.fit_step: 5, steps.update_step: 8}  # as few as they have been
for step, most in COLLECTIVES.items():
    text = step.lower(state, partitioner.shard_inputs(batches[0]), here, plan, 1.0).compile().as_text()
    kinds = "all-gather|all-reduce|all-to-all|collective-permute"
    moved = re.findall(rf"= \\w+\\[([\\d,]*)\\][^=]* (?:{kinds})[\\w-]*\\(", text)
    sizes = [int(np.prod([int(n) for n in shape.split(",") if n] or [1])) for shape in moved]
    assert sizes and max(sizes) < 1_002, max(sizes)
    assert len(sizes) <= most, (step.__name__, len(sizes))
print("all well")
"""


@pytest.mark.slow
def test_split_tables(run_python):
    assert "all well" in run_python(FOUR_DEVICES, devices=4)
