"""Signals as data: order, kinds, agents, refusals."""

import dataclasses
import json

import pytest

from mmrf_jax import signals
from mmrf_jax.data.session_log import InputSpec
from mmrf_jax.signals import Signal, Signals


def test_short_video_signals():
    s = signals.SHORT_VIDEO
    assert s.names[-1] == "watch_time" and s.names[6] == "hate"
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


def test_a_spec_with_signals_is_read_back_from_json():
    signals_ = Signals(
        (Signal("buy", weight=3.0), Signal("dwell", column="s", kind="duration", unit="min")), ("dwell", "buy")
    )
    spec = InputSpec(50, 5, 4, 0, 3, 4, 2, 10, 3, 5, signals_)
    read = InputSpec.from_dict(json.loads(json.dumps(dataclasses.asdict(spec))))
    assert read == spec and hash(read) == hash(spec)
    other = dataclasses.replace(spec, slate=2, signals=Signals((Signal("buy"),), ("buy",)))
    assert spec.differing(other) == {"slate": (3, 2), "signals": ("buy (binary), dwell (duration)", "buy (binary)")}


def test_a_spec_of_before_signals_were_data_has_the_nine():
    values = dataclasses.asdict(InputSpec(50, 5, 4, 0, 3, 4, 2, 10, 3, 5))
    del values["signals"]
    assert InputSpec.from_dict(values).signals == signals.SHORT_VIDEO


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("watch_time", {"watch_time": 1.0}),
        ("watch_time + 3*like - 5*hate", {"watch_time": 1.0, "like": 3.0, "hate": -5.0}),
        ("-hate", {"hate": -1.0}),
        ("2 * .5*like*3 + like", {"like": 4.0}),
        ("add to cart - -1e-1*like", {"add to cart": 1.0, "like": 0.1}),  # a name with spaces
        ("like_it - like", {"like_it": 1.0, "like": -1.0}),  # a name that begins with another
    ],
)
def test_a_reward_is_a_weighted_sum(text, weights):
    names = ("watch_time", "like", "hate", "add to cart", "like_it")
    assert signals.parse_reward(text, names) == pytest.approx(weights)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("likes", "unknown signal 'likes'; choose among like, hate"),
        ("like like", "'like' cannot stand there; write it as in"),
        ("like*hate", "'hate' cannot stand there"),
        ("3", "its end is missing"),
        ("", "its end is missing"),
        ("like +", "its end is missing"),
        ("(like)", r"'\(' cannot stand there"),
        ("like; hate", "';' cannot stand there"),
        ("like.__class__", r"'\.' cannot stand there"),
    ],
)
def test_a_reward_of_another_form_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        signals.parse_reward(text, ("like", "hate"))


def test_a_signal_may_not_have_the_name_of_a_metric():
    with pytest.raises(ValueError, match="signal depth has the name of another metric; use another, such as depth_si"):
        Signals((Signal("depth"),), ("depth",))
