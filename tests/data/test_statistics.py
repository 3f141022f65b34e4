"""Running means against loops over exposures, and that no row sees its own day."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import random_logs

from mmrf_jax.data import sessions, statistics
from mmrf_jax.signals import SHORT_VIDEO

V = random_logs.SPEC.num_videos
DAYS = (20220428, 20220430, 20220502)
L, NUM_FEATURES = len(statistics.FREQUENT), statistics.num_features(SHORT_VIDEO)


def make_log(seed: int, count: int = 40):
    log = random_logs.make_log(seed, count)
    return dataclasses.replace(log, date=np.resize(np.array(DAYS, np.int32), count))


def one_by_one(log):
    """(day, video, labels) of each exposure."""
    at = [SHORT_VIDEO.index(name) for name in statistics.FREQUENT]
    for n in range(log.num_sessions):
        for r in range(log.offsets[n], log.offsets[n + 1]):
            for slot in np.flatnonzero(log.slate[r] >= 0):
                label = np.float64(log.feedback[r, slot][at])
                label[-1] = np.log1p(label[-1])
                yield log.date[n], log.candidates[r, log.slate[r, slot]], label


def test_exposures_are_in_the_order_of_their_index():
    log = make_log(0)
    rows, expected = statistics.exposures([log], SHORT_VIDEO), list(one_by_one(log))
    np.testing.assert_array_equal(rows.date, [day for day, _, _ in expected])
    np.testing.assert_array_equal(rows.video, [video for _, video, _ in expected])
    np.testing.assert_allclose(rows.label, [label for _, _, label in expected])
    np.testing.assert_array_equal(rows.user, log.user_id[sessions.exposure_index(log)[0]])


def test_running_means_equal_a_loop():
    rows = statistics.exposures([make_log(0)], SHORT_VIDEO)
    key = random_logs.make_items().author
    got = statistics.running_means(rows, key[rows.video], rows.date, key[rows.video], 5, prior=7.0)
    for i, (date, video) in enumerate(zip(rows.date, rows.video, strict=True)):
        earlier = rows.date < date
        same = earlier & (key[rows.video] == key[video])
        if earlier.any():
            means = (rows.label[same].sum(axis=0) + 7.0 * rows.label[earlier].mean(axis=0)) / (same.sum() + 7.0)
        else:
            means = np.full(L, 0.5)
        np.testing.assert_allclose(got[i], [*means, np.log1p(same.sum())], rtol=1e-9)


def test_by_day_equals_a_loop_up_to_one_scale_a_column():
    log, items = make_log(0), random_logs.make_items()
    dates, got = statistics.by_day([log], items, SHORT_VIDEO)
    assert dates.tolist() == sorted(DAYS) and got.shape == (4, V, NUM_FEATURES)
    assert not got[0].any()
    seen = list(one_by_one(log))
    raw = np.zeros((3, V, NUM_FEATURES))
    for i, date in enumerate(dates):
        overall = np.mean([label for day, _, label in seen if day <= date], axis=0)
        for v in range(V):
            row = []
            for key in (np.arange(V), items.author, items.tag):
                labels = [label for day, video, label in seen if day <= date and key[video] == key[v]]
                total = np.sum(labels, axis=0) if labels else np.zeros(L)
                means = (total + statistics.PRIOR * overall) / (len(labels) + statistics.PRIOR)
                row += [*(means - overall), np.log1p(len(labels))]
            raw[i, v] = row
    last = raw[-1][[video for _, video, _ in seen]]
    counts = np.arange(NUM_FEATURES) % (L + 1) == L
    np.testing.assert_allclose(got[1:], (raw - np.where(counts, last.mean(axis=0), 0.0)) / last.std(axis=0), atol=1e-4)


def test_no_row_sees_its_own_day_or_a_later_one():
    log, items = make_log(0), random_logs.make_items()
    session = np.repeat(np.arange(log.num_sessions), np.diff(log.offsets))
    changed = np.where((log.date[session] >= DAYS[1])[:, None, None], 1.0 - log.feedback, log.feedback)
    dates, before = statistics.by_day([log], items, SHORT_VIDEO)
    _, after = statistics.by_day([dataclasses.replace(log, feedback=changed)], items, SHORT_VIDEO)
    at = np.searchsorted(dates, DAYS)  # rows that requests of these days look at

    def ratio(table):
        return table[at[1]] / np.abs(table[at[1]]).max(axis=0)  # up to the scale of a column

    counts = np.arange(NUM_FEATURES) % (L + 1) == L
    np.testing.assert_allclose(ratio(before)[:, ~counts], ratio(after)[:, ~counts], rtol=1e-4, atol=1e-5)
    assert np.abs(before[at[2]] - after[at[2]]).max() > 0.1


def test_features_of_a_date_are_those_of_the_days_before():
    items = random_logs.make_items()
    dates, table = statistics.by_day([make_log(0)], items, SHORT_VIDEO)
    items = jax.tree.map(jnp.asarray, dataclasses.replace(items, dates=dates, statistics=table))
    videos, date = np.arange(12, dtype=np.int32).reshape(4, 3), np.array([20220401, DAYS[0], DAYS[1], 20220601])
    got = items.features_of(videos, jnp.asarray(date))
    assert got.shape == (4, 3, 3 + NUM_FEATURES)
    for row, video, day in zip(got, videos, (0, 0, 1, 3), strict=True):
        np.testing.assert_array_equal(row, np.concatenate([items.features[video], table[day, video]], axis=1))
    np.testing.assert_array_equal(items.features_of(videos)[..., 3:], table[-1][videos])


def test_without_statistics_features_are_those_that_stay():
    items = random_logs.make_items()
    videos = np.array([[1, 4]])
    np.testing.assert_array_equal(items.features_of(videos, np.array([DAYS[0]])), items.features[videos])


def test_what_is_equal_for_all_videos_is_no_feature():
    """With a single tag, its mean and its count differ between days alone."""
    items = random_logs.make_items()
    items = dataclasses.replace(items, tag=np.zeros(V, np.int32), num_tags=1)
    _, table = statistics.by_day([make_log(0)], items, SHORT_VIDEO)
    assert not table[..., -(L + 1) :].any() and np.abs(table).max() < 20
