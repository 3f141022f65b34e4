"""What fails in the first of several processes ends the others too."""

import pytest

from mmrf_jax.parallel import multihost


@pytest.fixture
def processes(monkeypatch):
    """Run `on_primary` in the first of two processes, then in the second, which gets what the first has sent."""

    def run(fn):
        sent = []
        monkeypatch.setattr(multihost.jax, "process_count", lambda: 2)
        monkeypatch.setattr(multihost.jax, "process_index", lambda: len(sent))
        monkeypatch.setattr(multihost, "gather", lambda data: [*sent, data] if sent else sent.append(data) or [data])
        ends = []
        for _ in range(2):
            try:
                ends.append(multihost.on_primary(fn))
            except BaseException as error:
                ends.append(error)
        return ends

    return run


def test_the_result_is_in_every_process(processes):
    calls = []
    assert processes(lambda: calls.append(1) or {"steps": 3}) == [{"steps": 3}, {"steps": 3}] and calls == [1]


@pytest.mark.parametrize("error", [ValueError("no log"), KeyboardInterrupt("x"), SystemExit(3), GeneratorExit("x")])
def test_any_end_of_the_first_process_is_told_to_the_others(processes, error):
    def fail():
        raise error

    first, other = processes(fail)
    assert first is error
    assert type(other) is multihost.FailedElsewhere and str(other) == f"{type(error).__name__}: {error}"


def test_a_result_that_cannot_be_sent_is_an_error_in_every_process(processes):
    first, other = processes(lambda: object())
    assert type(first) is TypeError and str(other).startswith("TypeError: Object of type object is not JSON")


def shared(monkeypatch, fn, items, number):
    """Run `share_out` in each of so many processes; return the results or errors."""
    monkeypatch.setattr(multihost.jax, "process_count", lambda: number)
    sent = []

    def keep(data):
        sent.append(data)
        raise EOFError

    for gather in (keep, lambda data: sent):
        ends = []
        for index in range(number):
            monkeypatch.setattr(multihost.jax, "process_index", lambda index=index: index)
            monkeypatch.setattr(multihost, "gather", gather)
            try:
                ends.append(multihost.share_out(fn, items))
            except Exception as error:
                ends.append(error)
    return ends


@pytest.mark.parametrize("number", [1, 2, 3, 7])
def test_each_item_is_computed_by_one_process_and_known_to_all(monkeypatch, number):
    calls = []
    ends = shared(monkeypatch, lambda x: calls.append(x) or {"square": x * x}, range(5), number)
    assert ends == [[{"square": x * x} for x in range(5)]] * number
    assert sorted(calls) == sorted([*range(5)] * 2)  # both times, each item once


def test_an_item_that_fails_ends_every_process(monkeypatch):
    first, second = shared(monkeypatch, lambda x: 1 / x, [2.0, 0.0, 1.0], 2)
    assert type(second) is ZeroDivisionError
    assert type(first) is multihost.FailedElsewhere and str(first) == "ZeroDivisionError: float division by zero"
