"""The KuaiRand builder on real rows: the figures that are known of the slice of 25 April to 5 May 2022."""

import os
import pathlib
import time

import kuairand_files as files
import numpy as np
import polars as pl
import pytest

from mmrf_jax.data import sessions
from mmrf_jax.data.readers.engine import grouping, tasks
from mmrf_jax.data.readers.kuairand import builder, clean, csv_files, prepare, release
from mmrf_jax.io.progress import counted

SOURCE = os.environ.get("KUAIRAND_DIR", "")
_REAL = pytest.mark.skipif(
    not SOURCE or not pathlib.Path(SOURCE).is_dir(),
    reason="KUAIRAND_DIR is unset or names no folder: set it to a folder of KuaiRand's official files",
)
pytestmark = [_REAL, pytest.mark.slow]


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    start = time.perf_counter()
    builder.open_or_prepare(SOURCE, cache)
    prepared = time.perf_counter()
    result = files.loaded(builder.open_or_prepare(SOURCE, cache))
    print(f"prepare and read {prepared - start:.1f} s, read {time.perf_counter() - prepared:.1f} s")
    return result


@pytest.fixture(scope="module")
def frame(tmp_path_factory):
    job = prepare.KuaiRandJob(release.find_release(SOURCE), builder.KuaiRandConfig(), tmp_path_factory.mktemp("work"))
    with tasks.worker_processes(1) as engine:
        prepare.run_stages(job, engine, counted)
    return pl.read_ipc(job.path("rows", 0))


def test_duplicates_and_unusable_rows(real):
    standard, random = real[3]["log"]["standard"], real[3]["log"]["random"]
    assert (standard["rows"], standard["duplicates"]) == (185_061, 4_677)
    assert (random["rows"], random["duplicates"]) == (30_629, 1)
    names = ("rows_without_duplicates", "users_without_duplicates", "videos_without_duplicates")
    assert [standard[n] for n in names] == [180_384, 24_448, 6_153]
    assert [random[n] for n in names] == [30_628, 982, 7_304]
    # rows without a duration: their videos have none in the features either
    assert standard["no_duration"] == 2_793 and random["no_duration"] == 919
    for counts in (standard, random):
        bad = sum(counts[reason] for reason in clean.REASONS)
        assert counts["used"] + bad == counts["rows_without_duplicates"] and counts["duration_repaired"] == 0


@pytest.mark.parametrize(("gap", "rows_per_session"), [(30, 1.2), (24 * 60, 2.7)])
def test_rows_per_session(gap, rows_per_session):
    source = release.find_release(SOURCE)
    rows = (
        csv_files.read_log_lines(csv_files.whole(source.logs[0])).unique().sort("user_id", "time_ms")
    )  # those without a duration too
    assert len(rows) == 180_384
    start = grouping.session_starts(rows["user_id"].to_numpy(), rows["time_ms"].to_numpy(), gap)
    assert round(len(rows) / start.sum(), 1) == rows_per_session


def test_rates_and_quantiles(real):
    """Rates of all rows, and of those with a duration, agree to the digits that are known."""
    splits = real[0]
    known = {0: 0.450, 1: 0.317, 2: 0.0175, 3: 0.0013, 4: 0.0026, 5: 0.0008, 6: 0.00085, 7: 0.0189}
    log = sessions.concatenate([splits[name] for name in ("train", "valid", "test")])
    feedback = log.feedback[log.slate >= 0]
    for signal, rate in known.items():
        assert feedback[:, signal].mean() == pytest.approx(rate, rel=0.1), signal
    np.testing.assert_allclose(np.quantile(feedback[:, -1], [0.25, 0.5, 0.75, 0.9]), [1.55, 4.81, 22.6, 63.5], rtol=0.1)
    items = real[1]
    request, place = np.nonzero(log.slate >= 0)
    duration = items.duration[log.candidates[request, log.slate[request, place]]]
    np.testing.assert_allclose(np.quantile(duration, [0.25, 0.5, 0.75, 0.9]), [26.4, 71.4, 156, 259], rtol=0.05)


def test_splits_hold_every_used_row(real, frame):
    splits, _, spec, report = real
    dates = frame.filter(frame["is_rand"] == 0)["date"].to_numpy()
    want = [(dates <= 20220502).sum(), (dates == 20220503).sum(), (dates >= 20220504).sum()]
    assert [(splits[name].slate >= 0).sum() for name in ("train", "valid", "test")] == want
    assert sum(want) == report["log"]["standard"]["used"]
    for log in splits.values():
        log.validate(spec)
        assert (np.diff(np.sort(log.candidates, 1), axis=1) > 0).all()
        assert (log.terminated ^ log.truncated).all()
    random = splits["random_test"]
    np.testing.assert_allclose(random.log_propensity, -np.log(100), rtol=1e-6)
    assert random.feedback[:, 0, 0].mean() == pytest.approx(0.171, rel=0.1)


def test_vocabulary_is_of_training_days(real, frame):
    items = real[1]
    train = frame.filter((frame["is_rand"] == 0) & (frame["date"] <= 20220502))
    assert items.num_embeddings == train["video_id"].n_unique() + 1
    # item rows are 1 + the video id in Pure, whose ids are 0 … 7582
    rows = 1 + np.unique(train["video_id"].to_numpy())
    np.testing.assert_array_equal(np.flatnonzero(items.embedding_id), rows)
    assert np.isfinite(items.features).all() and np.abs(items.features).max() < 10


def test_a_users_history_is_what_came_before(real):
    splits = real[0]
    train, test = splits["train"], splits["test"]
    first = np.unique(train.user_id, return_index=True)[1]
    assert not train.history_mask[first].any()
    new = ~np.isin(test.user_id, np.concatenate([train.user_id, splits["valid"].user_id]))
    first_test = np.zeros(test.num_sessions, bool)
    first_test[np.unique(test.user_id, return_index=True)[1]] = True
    assert not test.history_mask[new & first_test].any()
    # near midnight `date` and `time_ms` disagree in 0.9 % of rows: histories go by time, splits by date
    assert test.history_mask[~new & first_test].any(1).mean() > 0.999
    profile = train.profile
    assert np.isfinite(profile).all() and np.abs(profile).max() < 12
