"""Checkpoints: bit-identical round trips, damage of three kinds, retention, kills, other numbers of devices."""

import os
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging as absl_logging
from states import bits, like, make_state

from mmrf_jax.checkpointing import integrity, manager
from mmrf_jax.checkpointing.manager import CheckpointError, Checkpoints, targets


def fill(directory, steps=(10, 20, 30), **kwargs):
    with Checkpoints(directory, **kwargs) as checkpoints:
        for step in steps:
            assert checkpoints.save(step, make_state(step))


def restore(directory, **kwargs):
    with Checkpoints(directory) as checkpoints:
        return checkpoints.restore(like(make_state()), **kwargs)


@pytest.fixture
def warnings(monkeypatch):
    """Of the manager alone: on a busy machine, orbax warns of slow saves."""
    lines = []
    heard = vars(absl_logging) | {"warning": lambda text, *args: lines.append(text % args)}
    monkeypatch.setattr(manager, "logging", types.SimpleNamespace(**heard))
    return lines


def test_round_trip_is_bit_identical_with_typed_keys(tmp_path):
    state = make_state(3)
    fill(tmp_path, steps=(3,))
    restored, step = restore(tmp_path)
    assert step == 3 and jax.tree.structure(restored) == jax.tree.structure(state)
    assert restored.key.dtype == state.key.dtype and restored.nothing is None and restored.name == "static"
    assert bits(restored) == bits(state)
    np.testing.assert_array_equal(jax.random.bits(restored.key[2]), jax.random.bits(state.key[2]))


def test_tables_are_an_item_of_their_own(tmp_path):
    """Nothing of them is in the other item, which does not grow with them."""
    sizes = {}
    for rows in (300, 30_000):
        with Checkpoints(tmp_path / str(rows)) as checkpoints:
            checkpoints.save(1, {"agents": {"params": jnp.ones((100, 7)), "tables": make_state(rows=rows).tables}})
        for item in ("state", "tables"):
            files = files_of(tmp_path / str(rows) / "1" / item)
            assert files
            sizes[item, rows] = sum(path.stat().st_size for path in files)
    assert sizes["state", 30_000] < sizes["state", 300] + 500
    assert sizes["tables", 30_000] > 100 * 300 * 6 > sizes["tables", 300]


def test_numpy_and_python_leaves_come_back_as_arrays(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"count": np.arange(3, dtype=np.int32), "lr": 0.5, "on": True, "n": 7})
        shapes = jax.eval_shape(
            lambda: {"count": jnp.zeros(3, int), "lr": 0.5, "on": jnp.array(True), "n": jnp.array(7)}
        )
        restored, _ = checkpoints.restore(targets(shapes, jax.sharding.SingleDeviceSharding(jax.devices()[0])))
    assert (
        restored["n"] == 7
        and restored["lr"] == 0.5
        and bool(restored["on"])
        and restored["count"].tolist() == [0, 1, 2]
    )


def test_state_may_be_donated_while_its_save_is_under_way(tmp_path):
    state = {"x": jax.random.normal(jax.random.key(0), (500_000, 8)), "host": np.ones(1000, np.int32)}
    expected = jax.tree.map(np.array, state)
    bump = jax.jit(lambda x: x * 2 + 1, donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        x = state["x"]
        for _ in range(4):
            x = bump(x)
        state["host"][:] = 7
        x.block_until_ready()
        target = {"x": targets(x), "host": targets(jnp.zeros(1000, jnp.int32))}
        restored, _ = checkpoints.restore(target)
    jax.tree.map(np.testing.assert_array_equal, restored, expected)


def files_of(step_dir):
    return sorted(p for p in step_dir.rglob("*") if p.is_file())


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "missing": lambda path: path.unlink(),
    "one flipped byte": flip,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_newest_falls_back_and_says_so(tmp_path, warnings, damage):
    fill(tmp_path)
    data = max(files_of(tmp_path / "30"), key=lambda p: p.stat().st_size)
    DAMAGES[damage](data)
    restored, step = restore(tmp_path)
    assert step == 20 and bits(restored) == bits(make_state(20))
    assert len(warnings) == 1
    assert "checkpoint 30" in warnings[0] and data.name in warnings[0] and "falling back to step 20" in warnings[0]


def test_a_step_that_is_deleted_while_it_is_read_falls_back(tmp_path, warnings, monkeypatch):
    fill(tmp_path)
    verify = integrity.verify

    def gone(folder):
        if folder.name == "30":
            raise FileNotFoundError(f"{folder} does not exist")
        return verify(folder)

    monkeypatch.setattr(integrity, "verify", gone)
    assert restore(tmp_path)[1] == 20
    assert len(warnings) == 1 and "30 does not exist; falling back to step 20" in warnings[0]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_is_found(tmp_path, damage):
    fill(tmp_path, steps=(1,))
    step_dir = tmp_path / "1"
    paths = files_of(step_dir)
    assert len(paths) > 8
    for path in paths:
        whole = path.read_bytes()
        DAMAGES[damage](path)
        with pytest.raises(integrity.Damaged):
            integrity.verify(step_dir)
        path.write_bytes(whole)
    integrity.verify(step_dir)


def test_falls_back_over_two(tmp_path, warnings):
    fill(tmp_path)
    for step in (20, 30):
        flip(max(files_of(tmp_path / str(step)), key=lambda p: p.stat().st_size))
    assert restore(tmp_path)[1] == 10
    assert len(warnings) == 2 and "to step 20" in warnings[0] and "to step 10" in warnings[1]


def test_all_damaged_is_one_clear_error(tmp_path):
    fill(tmp_path, steps=(1, 2))
    (tmp_path / "1" / "checksums.json").unlink()  # a step without checksums is not believed
    flip(max(files_of(tmp_path / "2"), key=lambda p: p.stat().st_size))
    with pytest.raises(CheckpointError, match=r"no usable checkpoint in .*2: file .*; 1: checksums.json is missing"):
        restore(tmp_path)


def test_none_and_named_steps(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        restore(tmp_path)
    fill(tmp_path)
    assert restore(tmp_path, step=10)[1] == 10
    with pytest.raises(FileNotFoundError, match=r"no checkpoint 15 .*\[10, 20, 30\]"):
        restore(tmp_path, step=15)
    flip(max(files_of(tmp_path / "20"), key=lambda p: p.stat().st_size))
    with pytest.raises(CheckpointError, match="20: file"):  # a named step is not replaced by another
        restore(tmp_path, step=20)


def test_retention_and_interval(tmp_path):
    with Checkpoints(tmp_path, keep=2, save_interval=10) as checkpoints:
        assert checkpoints.latest_step() is None
        saved = [step for step in range(1, 41) if checkpoints.save(step, make_state(step))]
        assert saved == [10, 20, 30, 40]
        assert checkpoints.save(43, make_state(43), force=True)
        assert not checkpoints.save(43, make_state(43), force=True)  # saved just before
        checkpoints.wait()
        assert checkpoints.all_steps() == [40, 43] and checkpoints.latest_step() == 43
    assert sorted(os.listdir(tmp_path)) == ["40", "43"]


def test_saving_again_at_a_damaged_step(tmp_path):
    fill(tmp_path)
    flip(max(files_of(tmp_path / "30"), key=lambda p: p.stat().st_size))
    with Checkpoints(tmp_path) as checkpoints:
        _, step = checkpoints.restore(like(make_state()))
        assert step == 20 and not checkpoints.save(20, make_state(20))
        assert checkpoints.save(30, make_state(31))
    restored, step = restore(tmp_path)
    assert step == 30 and bits(restored) == bits(make_state(31))


def test_steps_of_a_history_that_was_left_are_deleted(tmp_path, warnings):
    fill(tmp_path)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.restore(like(make_state()), step=10)
        checkpoints.save(15, make_state(15))
        checkpoints.wait()
        assert checkpoints.all_steps() == [10, 15]
    assert restore(tmp_path)[1] == 15


def test_damaged_steps_do_not_count_as_kept(tmp_path, warnings):
    fill(tmp_path, keep=2)
    flip(max(files_of(tmp_path / "30"), key=lambda p: p.stat().st_size))
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.restore(like(make_state()))
        checkpoints.save(31, make_state(31))
        checkpoints.wait()
        assert checkpoints.all_steps() == [20, 31]


def test_another_state_is_refused(tmp_path):
    fill(tmp_path, steps=(1,))
    for other in (make_state(rows=301), make_state().replace(done=jnp.zeros(2)), make_state().replace(done=None)):
        with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match=r"checkpoint 1 in .* holds another"):
            checkpoints.restore(like(other))
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match="has no sharding"):
        checkpoints.restore(jax.eval_shape(make_state))


def test_unwritable_directory_and_bad_leaves(tmp_path):
    (tmp_path / "file").write_text("a regular file")
    with pytest.raises(CheckpointError, match=r"cannot write checkpoints in .*file/ckpt.*choose another workdir"):
        Checkpoints(tmp_path / "file" / "ckpt")
    with pytest.raises(CheckpointError, match="cannot read checkpoints"):
        Checkpoints(tmp_path / "nowhere", read_only=True)
    with pytest.raises(ValueError, match="keep is 0"):
        Checkpoints(tmp_path, keep=0)
    with Checkpoints(tmp_path / "ok") as checkpoints, pytest.raises(TypeError, match="position has dtype int64"):
        checkpoints.save(1, {"position": np.arange(3, dtype=np.int64)})


def test_failed_background_save_is_an_error_and_not_a_step(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1))
        checkpoints.wait()

        def full(*_, **__):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(integrity, "write", full)
        checkpoints.save(2, make_state(2))
        with pytest.raises(CheckpointError, match=r"checkpoint 2 could not be written.*No space left"):
            checkpoints.wait()
        monkeypatch.undo()
        assert checkpoints.all_steps() == [1]
    fill(tmp_path, steps=(2,))
    assert restore(tmp_path)[1] == 2


def test_read_only_sees_new_steps_and_deletes_nothing(tmp_path):
    fill(tmp_path, steps=(1,))
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()  # as a trainer that is saving has it
    with Checkpoints(tmp_path, read_only=True) as reader:
        fill_other = Checkpoints(tmp_path / "elsewhere")
        fill_other.close()
        assert reader.restore(like(make_state()))[1] == 1
        with pytest.raises(CheckpointError, match="read-only"):
            reader.save(5, make_state())
        (tmp_path / "1").rename(tmp_path / "4")  # stands for a step that the trainer commits
        assert reader.latest_step() == 4
    assert (tmp_path / "2.orbax-checkpoint-tmp").exists()


KILLED = """
import os, signal, sys, jax, jax.numpy as jnp
from mmrf_jax.checkpointing import integrity, manager
moment = sys.argv[2]
die = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
checkpoints = manager.Checkpoints(sys.argv[1], keep=1)
checkpoints.save(1, {"x": jnp.full(1000, 1.0)}); checkpoints.wait()
write = integrity.write
if moment == "before checksums": integrity.write = die
if moment == "before commit": integrity.write = lambda *a, **k: (write(*a, **k), die())
if moment == "before seal": integrity.seal = die
if moment == "while deleting":
    import shutil
    def delete(step): os.remove(os.path.join(sys.argv[1], str(step), "_CHECKPOINT_METADATA")); die()
    checkpoints._manager.delete = delete
checkpoints.save(2, {"x": jnp.full(1000, 2.0)}); checkpoints.wait()
"""


@pytest.mark.parametrize(
    "moment, survivor", [("before checksums", 1), ("before commit", 1), ("before seal", 2), ("while deleting", 2)]
)
def test_killed_while_saving(tmp_path, run_python, moment, survivor):
    run_python(KILLED, tmp_path, moment, expect=-signal.SIGKILL)
    target = {"x": targets(jnp.zeros(1000))}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        restored, step = checkpoints.restore(target)
        assert step == survivor and restored["x"][0] == survivor
        checkpoints.save(2 if survivor == 1 else 3, {"x": jnp.full(1000, 5.0)})
    assert len(os.listdir(tmp_path)) == 1  # nothing left over: no temporary directory, no half-deleted step
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(target)[0]["x"][0] == 5


TOPOLOGY = """
import sys, jax, jax.numpy as jnp, numpy as np
from mmrf_jax.checkpointing.manager import Checkpoints, targets
from mmrf_jax.parallel.partitioner import Partitioner
directory, action = sys.argv[1:]
partitioner = Partitioner()
def make():
    key = jax.random.key(5)
    table = jax.random.normal(key, (64, 3))
    return {"tables/id": table, "keys": jax.random.split(key, 8), "key": key, "n": jnp.int32(9)}
def place(tree):
    spec = {"tables/id": partitioner.data_sharding, "keys": partitioner.data_sharding}
    return {name: spec.get(name, partitioner.replicated_sharding) for name in tree}
state = jax.jit(make, out_shardings=place(jax.eval_shape(make)))()
assert jax.device_count() == (4 if "4" in action else 1)
with Checkpoints(directory) as checkpoints:
    if action.startswith("save"):
        checkpoints.save(1, state)
    else:
        target = targets(state)
        restored, _ = checkpoints.restore(target)
        jax.tree.map(lambda a, t: None if a.sharding == t.sharding else 1 / 0, restored, target)
        for name in state:
            a, b = restored[name], state[name]
            if "key" in name:
                a, b = jax.random.key_data(a), jax.random.key_data(b)
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), name
        print("the same on", jax.device_count())
"""


@pytest.mark.parametrize("saved_on, restored_on", [(1, 4), (4, 1)])
def test_restores_on_another_number_of_devices(tmp_path, run_python, saved_on, restored_on):
    run_python(TOPOLOGY, tmp_path, f"save{saved_on}", devices=saved_on)
    out = run_python(TOPOLOGY, tmp_path, f"restore{restored_on}", devices=restored_on)
    assert f"the same on {restored_on}" in out
