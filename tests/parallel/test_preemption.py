"""Signals: SIGINT does what SIGTERM does, once; a second one ends at once; none gets lost."""

import gc
import io
import signal
import sys
import threading
import time

import pytest

from mmrf_jax.parallel import preemption

BOTH = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
PATIENCE = 900.0  # seconds until a test that hangs ends


def wait() -> None:
    """A while in which nothing is asked."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def handlers():
    """The handlers of before are there again after each test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)}
    yield
    assert before == {number: signal.getsignal(number) for number in before}


@BOTH
def test_a_signal_is_seen_where_the_run_asks(number, monkeypatch):
    said = io.StringIO()  # another thread writes: what pytest captures may lose a character while it is read
    monkeypatch.setattr(sys, "stderr", said)
    with preemption.watching() as watch:
        watch.check()
        signal.raise_signal(number)
        with pytest.raises(preemption.Preempted, match=f"asked to stop by {number.name}"):
            watch.check()
        end = time.monotonic() + PATIENCE
        while "a second one ends at once" not in said.getvalue() and time.monotonic() < end:
            time.sleep(0.01)
        assert f"{number.name}: stopping; a second one ends at once" in said.getvalue()


@BOTH
def test_a_signal_is_raised_at_once_where_nothing_can_be_lost(number):
    """Also in a watch that asks elsewhere, and where it came just before."""
    with preemption.watching() as watch:
        threading.Timer(0.05, signal.raise_signal, [number]).start()
        with pytest.raises(preemption.Preempted) as stopped, preemption.at_once():
            wait()
        assert stopped.value.number == number
        with pytest.raises(preemption.Preempted), preemption.at_once():
            wait()
        with preemption.watching(at_once=False) as same:
            assert same is watch


def test_a_signal_that_comes_in_a_callback_of_the_collector_is_not_lost():
    """Python prints and forgets what is raised there; JAX has such a callback, and a report makes much garbage."""
    called = []

    def callback(*_):
        if not called:
            called.append(True)
            signal.raise_signal(signal.SIGTERM)

    gc.callbacks.append(callback)
    try:
        with preemption.watching(at_once=True), pytest.raises(preemption.Preempted):
            gc.collect()
            wait()
    finally:
        gc.callbacks.remove(callback)
    assert called


def test_what_is_ignored_stays_ignored():
    """As in a shell's jobs in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with preemption.watching(at_once=True) as watch:
            signal.raise_signal(signal.SIGINT)
            watch.check()
    finally:
        signal.signal(signal.SIGINT, before)


def test_no_handler_of_any_error_takes_it():
    """A report that fails is said and no more; one that is asked to stop stops."""
    assert not issubclass(preemption.Preempted, Exception)


def test_elsewhere_nobody_is_told():
    """Python lets the main thread alone have handlers."""
    watched = []

    def elsewhere():
        with preemption.watching() as watch:
            watch.check()
            watched.append(watch)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert watched


SECOND = """
import os, signal, sys, threading
from mmrf_jax.parallel import preemption
number = int(sys.argv[1])
with preemption.watching():
    def send():
        os.kill(os.getpid(), number)
        while "second" not in open(sys.argv[2]).read():
            pass
        os.kill(os.getpid(), number)
    threading.Thread(target=send).start()
    signal.sigwait([signal.SIGUSR1])  # no place at which Python looks for signals
"""


@pytest.mark.slow
@BOTH
def test_a_second_signal_ends_at_once_whatever_the_program_does(number, run_python, tmp_path):
    said = tmp_path / "said"
    said.write_text("")
    script = f"import os, sys\nos.dup2(os.open(sys.argv[2], os.O_WRONLY), 2)\n{SECOND}"
    run_python(script, int(number), said, expect=-number)
