"""Signals as data: order, kinds, agents, refusals."""

import pytest

from mmrf_jax import signals
from mmrf_jax.signals import Signal, Signals


def test_short_video_signals():
    s = signals.SHORT_VIDEO
    assert s.names == signals.SIGNALS
    assert s.main == "watch_time"
    assert s.binary == tuple(range(8))
    assert len(s) == 9
    assert [x.name for x in s.signals if x.sign < 0] == ["hate"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "ordinal"}, "signal like has kind='ordinal'; choose among binary, duration, count, value"),
        ({"sign": 0}, "signal like has sign=0; choose among 1, -1"),
        ({"unit": "weeks"}, "signal like has unit='weeks'; choose among ms, s, min, h"),
    ],
)
def test_a_signal_of_no_kind_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Signal("like", **fields)


def test_signals_that_cannot_be_are_refused():
    like, buy = Signal("like"), Signal("buy")
    with pytest.raises(ValueError, match="like, like: name at least one, each once"):
        Signals((like, like), ("like",))
    with pytest.raises(ValueError, match="unknown signal 'share'; choose among like, buy"):
        Signals((like, buy), ("like", "share"))
    with pytest.raises(ValueError, match="name at least one signal"):
        Signals((like, buy), ())
