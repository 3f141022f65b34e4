"""Programs compiled ahead of their first call, and where compilation's seconds are counted."""

import threading
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrf_jax.parallel import programs


@pytest.fixture
def compiled():
    """The number of programs that XLA has compiled since the test began, by a call."""
    events = []

    def count(event: str, duration_secs: float, **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(count)
    yield lambda: len(events)
    jax.monitoring.unregister_event_duration_listener(count)


def scaled(x, by: int):
    return by * x + 1.0


def test_a_program_compiled_ahead_is_not_compiled_by_its_call(compiled):
    program, ahead = programs.Program(scaled, calls="many", static_argnames="by"), programs.Ahead()
    x = np.arange(3.0, dtype=np.float32)
    ahead.add("scaled", lambda: program.lower(jax.ShapeDtypeStruct((3,), jnp.float32), by=2))
    ahead.wait("scaled")
    before = compiled()
    assert before == 1
    np.testing.assert_array_equal(program(x, by=2), 2 * x + 1)
    assert compiled() == before and program._cache_size() == 1
    program(x[:2], by=2)  # another shape
    assert compiled() == before + 1


def test_a_program_within_another_is_a_part_of_it(compiled):
    """Compiler options are of whole programs: JAX refuses them within another."""
    inner = programs.Program(scaled, calls="few", static_argnames="by")
    outer = jax.jit(lambda x: inner(x, by=3) * 2.0)
    np.testing.assert_array_equal(outer(np.float32(1.0)), 8.0)
    assert compiled() == 1


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("calls", typing.get_args(programs.Calls))
def test_the_options_of_every_kind_of_program_are_known_to_the_compiler(calls, quick):
    before = programs.compile_quickly(quick)
    try:
        program = programs.Program(scaled, calls=calls, static_argnames="by")
        np.testing.assert_array_equal(program(np.arange(3.0, dtype=np.float32), by=2), [1.0, 3.0, 5.0])
    finally:
        programs.compile_quickly(before)


def test_what_cannot_be_compiled_ahead_is_said_by_the_call():
    def refuse():
        raise ValueError("no such shapes")

    ahead = programs.Ahead()
    ahead.add("refused", refuse)
    ahead.wait("refused")
    ahead.wait("never added")


def test_waiting_can_be_interrupted():
    done, ahead = threading.Event(), programs.Ahead()

    class Stopped(Exception):
        pass

    def stop():
        raise Stopped

    ahead.add("endless", done.wait)
    with pytest.raises(Stopped):
        ahead.wait("endless", stop)
    done.set()


def test_nothing_more_is_compiled_once_it_is_closed():
    begun, go, ahead = threading.Event(), threading.Event(), programs.Ahead()
    ahead._gate = threading.BoundedSemaphore(1)
    lowered = []

    def first():
        begun.set()
        go.wait()

    ahead.add("first", first)
    begun.wait()
    ahead.add("second", lambda: lowered.append(2))
    ahead.close()
    go.set()
    ahead.wait("first")
    ahead.wait("second")
    assert not lowered


def test_the_clock_counts_compilation_of_the_main_thread():
    clock = programs.CompileClock()
    jax.jit(lambda x: x + 1.0)(np.float32(0.0))
    here = clock.seconds
    assert here > 0.0
    thread = threading.Thread(target=lambda: jax.jit(lambda x: x + 2.0)(np.float32(0.0)))
    thread.start()
    thread.join()
    assert clock.seconds == here
    clock.close()
    jax.jit(lambda x: x + 3.0)(np.float32(0.0))
    assert clock.seconds == here
