"""What is read whole of logs that are too long for it."""

import functools
import types

import numpy as np
import pytest
import random_logs
import tiny
from ml_collections import ConfigDict

from mmrf_jax.data import statistics
from mmrf_jax.signals import SHORT_VIDEO
from mmrf_jax.training import sources


@pytest.mark.parametrize(
    ("stream", "large", "read"),
    [
        (None, 1_000, [0, 1, 2, 3]),  # short enough to be held
        (None, 600, [0, 2]),
        (False, 600, [0, 1, 2, 3]),  # wanted in memory, whatever its length
        (True, 600, [0, 2]),
        (True, 1_000, [0, 1, 2, 3]),
    ],
)
def test_of_a_long_log_blocks_from_all_over_are_held(stream, large, read, monkeypatch, capfd):
    monkeypatch.setattr(sources, "_LARGE", large)
    blocks = types.SimpleNamespace(sessions=np.full(4, 250), read=list)
    assert sources._held(ConfigDict({"data": {"stream": stream}}), blocks, "test") == read
    said = "of the test log, 500 of 1,000 sessions"
    assert (said in capfd.readouterr().err) == (len(read) < 4)


def test_requests_say_whether_they_were_exposed_at_random():
    logs = {
        name: functools.partial(random_logs.make_log, seed, 5 + seed)
        for seed, name in enumerate(("train", "valid", "test", "random_train", "random_valid", "random_test"))
    }
    before = {name: make() for name, make in logs.items()}
    after = {name: make() for name, make in sources._with_random_log(logs).items()}
    assert set(after) == {"train", "valid", "test", "random_test"}
    for name in ("test", "random_test"):
        flag = name == "random_test"
        assert (after[name].context[:, 0] == flag).all()
        np.testing.assert_array_equal(after[name].context[:, 1:], before[name].context)
        np.testing.assert_array_equal(after[name].feedback, before[name].feedback)
    for name in ("train", "valid"):
        both, standard, random = after[name], before[name], before[f"random_{name}"]
        assert both.num_sessions == standard.num_sessions + random.num_sessions
        flags = np.repeat([0, 1], [standard.num_requests, random.num_requests])
        np.testing.assert_array_equal(both.context[:, 0], flags)
        np.testing.assert_array_equal(both.feedback, np.concatenate([standard.feedback, random.feedback]))


@pytest.mark.parametrize("most", [10**9, 100])
def test_running_means_are_left_out_where_they_are_too_large(most, monkeypatch, capfd):
    monkeypatch.setattr(sources, "_MOST_STATISTICS", most)
    items = tiny.make_items(random_logs.SPEC)
    found, spec = sources._with_statistics(items, random_logs.SPEC, [random_logs.make_log(0, 20)])
    said = capfd.readouterr().err
    if most == 100:
        assert spec == random_logs.SPEC
        assert found.statistics is None and "running means of 50 videos over 2 days would take 0.0 GiB" in said
    else:
        assert found.statistics.shape == (3, 50, statistics.num_features(SHORT_VIDEO)) and not said
        assert spec.item_features == random_logs.SPEC.item_features + statistics.num_features(SHORT_VIDEO)
