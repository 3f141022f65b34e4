"""Traces on demand: which steps, where they lie, and what is no such thing."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from mmrf_jax.io import profile


def run(traced, steps):
    step = jax.jit(lambda x: x + 1.0)
    x, on = jnp.zeros(()), []
    for number in steps:
        traced.before(number)
        on.append(traced._on)
        x = step(x)
        traced.after(number, functools.partial(jnp.asarray, x))
    traced.close()
    return on


def traces(folder):
    return list(folder.rglob("*.xplane.pb"))


@pytest.mark.parametrize(
    "steps, first, last, traced", [("2:3", 1, 5, [2, 3]), ("2:9", 1, 4, [2, 3, 4]), ("2:4", 3, 6, [3, 4])]
)
def test_the_steps_that_were_asked_for_are_traced(tmp_path, steps, first, last, traced):
    """Also where the run ends before them, or goes on after a restart among them."""
    on = run(profile.Profile(steps, tmp_path / "profile"), range(first, last + 1))
    assert [number for number, is_on in zip(range(first, last + 1), on, strict=True) if is_on] == traced
    assert len(traces(tmp_path)) == 1


@pytest.mark.parametrize("steps, inside", [("", True), ("7:9", True), ("1:2", False)])
def test_nothing_is_written_unless_asked_for(tmp_path, steps, inside):
    assert not any(run(profile.Profile(steps, tmp_path / "profile" if inside else None), range(1, 4)))
    assert not traces(tmp_path)


@pytest.mark.parametrize("steps", ["5", "a:b", "9:3", "0:4", "1:2:3"])
def test_what_names_no_steps_is_refused(steps):
    with pytest.raises(ValueError, match=r"profile_steps=.*FIRST:LAST"):
        profile.parse_steps(steps)


def plane(name, **lines):
    events = {
        line: [
            SimpleNamespace(name=name, start_ns=start, duration_ns=end - start, stats=stats)
            for name, start, end, stats in events
        ]
        for line, events in lines.items()
    }
    return SimpleNamespace(
        name=name, lines=[SimpleNamespace(name=k.replace("_", " "), events=v) for k, v in events.items()]
    )


def read(tmp_path, monkeypatch, *planes):
    (tmp_path / "t.xplane.pb").touch()
    reader = SimpleNamespace(from_file=lambda path: SimpleNamespace(planes=planes))
    monkeypatch.setattr(jax.profiler, "ProfileData", reader)
    return profile.device_time(tmp_path)


def test_busy_time_is_what_any_stream_covers_and_copies_are_no_kernels(tmp_path, monkeypatch):
    first = plane(
        "/device:GPU:0",
        Stream_13=[("gemm", 100, 200, {}), ("fusion", 150, 250, {})],
        Stream_14=[("MemcpyD2D", 400, 500, {}), ("add", 240, 260, {})],
        Steps=[("1", 0, 1000, {})],
    )
    second = plane("/device:GPU:1", Stream_13=[("gemm", 100, 200, {})])
    host = plane("/host:CPU", python=[("f", 0, 2000, {"hlo_op": "no"})])
    found = read(tmp_path, monkeypatch, host, first, second)
    assert found == pytest.approx((400e-9, (260 + 100) / 2 / 400, (3 + 1) / 2))


def test_tpus_have_a_line_of_operations(tmp_path, monkeypatch):
    tpu = plane("/device:TPU:0", XLA_Modules=[("jit_f", 0, 900, {})], XLA_Ops=[("a", 0, 300, {}), ("b", 600, 900, {})])
    assert read(tmp_path, monkeypatch, tpu) == pytest.approx((900e-9, 2 / 3, 2))


def test_a_trace_of_this_machine_has_the_kernels_of_its_steps(tmp_path):
    """On a CPU: those of two steps are twice those of one."""
    step = jax.jit(lambda x: jnp.sort(x @ x, axis=0))
    x = jax.block_until_ready(step(jnp.ones((64, 64))))
    found = []
    for number, folder in enumerate(("one", "two"), 1):
        with jax.profiler.trace(str(tmp_path / folder)):
            for _ in range(number):
                x = jax.block_until_ready(step(x))
        found.append(profile.device_time(tmp_path / folder))
    assert found[0].kernels > 0 and found[1].kernels == 2 * found[0].kernels
    assert all(0.0 < one.busy <= 1.0 and one.seconds > 0.0 for one in found)


def test_a_trace_without_kernels_is_refused(tmp_path):
    with jax.profiler.trace(str(tmp_path)):
        pass
    with pytest.raises(ValueError, match="has no kernel; trace steps"):
        profile.device_time(tmp_path)
