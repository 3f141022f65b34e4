"""What is read whole of logs that are too long for it."""

import functools
import types

import numpy as np
import pytest
import random_logs
import tiny
from ml_collections import ConfigDict

from mmrf_jax.data import statistics
from mmrf_jax.envs import rankers
from mmrf_jax.envs.short_video import env, parameters, reference_policies
from mmrf_jax.signals import SHORT_VIDEO
from mmrf_jax.training import log_source, simulator_source, sources


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
    assert sources.read_held(ConfigDict({"data": {"stream": stream}}), blocks, "test") == read
    said = "of the test log, 500 of 1,000 sessions"
    assert (said in capfd.readouterr().err) == (len(read) < 4)


def test_requests_say_whether_they_were_exposed_at_random():
    logs = {
        name: functools.partial(random_logs.make_log, seed, 5 + seed)
        for seed, name in enumerate(("train", "valid", "test", "random_train", "random_valid", "random_test"))
    }
    before = {name: make() for name, make in logs.items()}
    after = {name: make() for name, make in log_source._with_random_log(logs).items()}
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


@pytest.mark.slow
def test_a_share_of_the_worlds_requests_gets_a_random_slate():
    sim = env.make_world(parameters.WorldConfig(num_videos=3000, candidates=20, slate=3, history=4, max_requests=6))
    policy = rankers.PrivilegedPolicy(reference_policies.production, 1.0)
    config, spec = types.SimpleNamespace(seed=0), types.SimpleNamespace(slate=3)
    source = sources.Source(config, spec, sim.items, list, dict, sim=sim)

    def collect(share):
        return simulator_source.collect_log(
            source,
            policy,
            first_user=0,
            sessions=400,
            progress=lambda name, number: lambda done: None,
            keep_scores=True,
            random_share=share,
        )

    log, none, without = collect(0.3), collect(0.0), collect(None)
    flag = log.context[:, 0] == 1
    assert abs(flag.mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / len(flag))
    np.testing.assert_array_equal(log.scores[flag], 0.0)
    np.testing.assert_allclose(log.log_propensity[flag], -np.log(20.0 * 19.0 * 18.0), rtol=1e-4)
    assert log.scores[~flag].std() > 0.5
    slots = np.bincount(log.slate[flag].ravel(), minlength=20)  # as good as uniform over the candidates
    assert ((slots - slots.mean()) ** 2).sum() / slots.mean() < 20 + 6 * np.sqrt(40)
    first, plain = log.offsets[:-1][~flag[log.offsets[:-1]]], without.offsets[:-1][~flag[log.offsets[:-1]]]
    np.testing.assert_array_equal(log.slate[first], without.slate[plain])
    assert not none.context[:, 0].any()
    np.testing.assert_array_equal(none.context[:, 1:], without.context)
    np.testing.assert_allclose(none.log_propensity, without.log_propensity, rtol=1e-5)
    for name in ("slate", "feedback", "offsets"):
        np.testing.assert_array_equal(getattr(none, name), getattr(without, name))


@pytest.mark.parametrize("most", [10**9, 100])
def test_running_means_are_left_out_where_they_are_too_large(most, monkeypatch, capfd):
    monkeypatch.setattr(log_source, "_MOST_STATISTICS", most)
    items = tiny.make_items(random_logs.SPEC)
    found, spec = log_source._with_statistics(items, random_logs.SPEC, [random_logs.make_log(0, 20)])
    said = capfd.readouterr().err
    if most == 100:
        assert spec == random_logs.SPEC
        assert found.statistics is None and "running means of 50 videos over 2 days would take 0.0 GiB" in said
    else:
        assert found.statistics.shape == (3, 50, statistics.num_features(SHORT_VIDEO)) and not said
        assert spec.item_features == random_logs.SPEC.item_features + statistics.num_features(SHORT_VIDEO)
