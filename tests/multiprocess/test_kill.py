"""A training process is killed with SIGKILL in every phase and started again: the end must be the same to the bit."""

import random
import time

import jax
import numpy as np
import pytest
from processes import rows, steps

from mmrf_jax.checkpointing import integrity, manager

pytestmark = pytest.mark.slow


def watch(process, condition, timeout=240):
    """Waits until the condition holds; False if the process ended before."""
    end = time.monotonic() + timeout
    while process.poll() is None:
        if condition():
            return True
        assert time.monotonic() < end, "the moment to kill at never came"
        time.sleep(0.002)
    return False


def final_state(workdir):
    """The leaves of the last checkpoint, as NumPy arrays."""
    step = steps(workdir)[-1]
    with manager.Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        spec = integrity.verify(checkpoints._directory / str(step)).leaves
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        key = jax.random.key(0).dtype
        dtypes = {name: key if dtype.startswith("key<") else np.dtype(dtype) for name, (dtype, _) in spec.items()}
        target = {n: jax.ShapeDtypeStruct(tuple(s), dtypes[n], sharding=device) for n, (_, s) in spec.items()}
        state, _ = checkpoints.restore(target, step)
    return {
        n: np.asarray(jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
        for n, x in state.items()
    }


def assert_same(workdir, reference):
    assert (workdir / "results.json").read_bytes() == (reference / "results.json").read_bytes()
    assert rows(workdir) == rows(reference)
    assert steps(workdir)[-1] == steps(reference)[-1]
    found, wanted = final_state(workdir), final_state(reference)
    assert found.keys() == wanted.keys() and any(name.startswith("params/") for name in found)
    for name, value in wanted.items():
        assert found[name].tobytes() == value.tobytes(), name


def being_written(workdir, above=0):
    """Whether a checkpoint newer than `above` is in its temporary folder."""
    found = [p.name.split(".")[0] for p in (workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*")]
    return any(name.isdigit() and int(name) > above for name in found)


#: In the order of a run. Each start goes on where the kill before left it, so every one but the first is a restart.
MOMENTS = {
    "before anything is collected": lambda w: (w / "config.json").exists(),
    "first update": lambda w: len(rows(w)) >= 1,
    "first checkpoint being written": lambda w: being_written(w),
    "between two checkpoints": lambda w: len(steps(w)) >= 1 and len(rows(w)) > steps(w)[-1],
    "middle checkpoint being written": lambda w: being_written(w, 8),
    "middle checkpoint just committed": lambda w: steps(w)[-1:] >= [16],
    "last checkpoint being written or committed": lambda w: being_written(w, 24) or steps(w)[-1:] >= [27],
    "learning ended, A/B test begins": lambda w: (w / "learned.json").exists(),
}


def test_killed_in_every_phase_one_after_another(launch, reference, args, tmp_path):
    workdir, log = tmp_path / "run", tmp_path / "log.txt"
    whole, killed = rows(reference), []
    for name, moment in MOMENTS.items():
        process = launch.start("train", *args, f"--workdir={workdir}", log=log)
        if watch(process, lambda moment=moment: moment(workdir)):
            process.kill()
            killed.append(name)
        process.wait()
        assert rows(workdir) == whole[: len(rows(workdir))], name
    assert killed == list(MOMENTS), log.read_text()[-3000:]
    # During the A/B test and, by the time that the rest takes, right before the results.
    started = time.monotonic()
    process = launch.start("train", *args, f"--workdir={workdir}", log=log)
    assert watch(process, lambda: "resumed at update" in log.read_text()[-20000:])
    time.sleep(1.0)
    process.kill()
    process.wait()
    started = time.monotonic()
    launch.ok("train", *args, f"--workdir={workdir}")
    rest = time.monotonic() - started
    assert_same(workdir, reference)
    (workdir / "results.json").unlink()  # and again: the folder is that of a run killed just before its results
    process = launch.start("train", *args, f"--workdir={workdir}", log=log)
    watch(process, lambda: time.monotonic() - started > 1.9 * rest or (workdir / "results.json").exists())
    process.kill()
    process.wait()
    launch.ok("train", *args, f"--workdir={workdir}")
    assert_same(workdir, reference)


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_a_random_time(seed, launch, reference, args, tmp_path):
    workdir, log = tmp_path / "run", tmp_path / "log.txt"
    started = time.monotonic()
    process = launch.start("train", *args, f"--workdir={workdir}", log=log)
    # Of the first 16 s, which hold a whole run on an idle machine.
    moment = random.Random(seed).uniform(1.0, 16.0)
    watch(process, lambda: time.monotonic() - started > moment)
    process.kill()
    process.wait()
    launch.ok("train", *args, f"--workdir={workdir}")
    assert_same(workdir, reference)
