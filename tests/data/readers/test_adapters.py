"""Public data sets in their published layouts, made up here; Open Bandit also for real, where it is."""

import os
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from mmrf_jax.data import sessions
from mmrf_jax.data.readers import kuairec, movielens, open_bandit, tenrec
from mmrf_jax.data.splits import SPLITS

RNG = np.random.default_rng(0)
OBD = os.environ.get("OBD_DIR")


def whole(log):
    return sessions.concatenate([log.part(name) for name in SPLITS])


def test_open_bandit(tmp_path):
    folder, n = tmp_path / "bts" / "men", 60
    folder.mkdir(parents=True)
    pl.DataFrame(
        {
            "": range(n),
            "timestamp": [f"2019-11-24 00:{i:02d}:17.004101+00:00" for i in range(n)],
            "item_id": RNG.integers(0, 5, n),
            "position": RNG.integers(1, 4, n),
            "click": np.arange(n) % 4 == 0,
            "propensity_score": np.linspace(0.01, 1.0, n),
            **{f"user_feature_{i}": RNG.choice(["a1", "b2"], n) for i in range(4)},
            **{f"user-item_affinity_{i}": np.zeros(n) for i in range(5)},
        }
    ).write_csv(folder / "men.csv")
    features = {f"item_feature_{i}": ["x", "y", "x", "y", "x"] for i in (1, 2, 3)}
    pl.DataFrame({"": range(5), "item_id": range(5), "item_feature_0": np.linspace(-1, 1, 5)} | features).write_csv(
        folder / "item_context.csv"
    )
    log = open_bandit.load(tmp_path, campaign="men", quiet=True)
    read = whole(log)
    assert log.spec.candidates == 5 and log.spec.slate == 1 and log.spec.num_users == 0 and read.num_sessions == n
    order = np.argsort(read.user_id)
    np.testing.assert_allclose(np.exp(read.log_propensity[order]), np.linspace(0.01, 1.0, n), rtol=1e-5)
    np.testing.assert_array_equal(read.feedback[order, 0, 0], np.arange(n) % 4 == 0)
    assert log.spec.item_features == 1 + 3 * 3 and log.spec.profile == 4 * 3
    with pytest.raises(ValueError, match="is no file of the log"):
        open_bandit.load(tmp_path, campaign="women")


@pytest.mark.skipif(not OBD, reason="OBD_DIR is not set")
def test_open_bandit_for_real():
    """Weighted by its propensities, the Thompson sampling log has the click rate of the uniform log."""
    uniform, bts = (whole(open_bandit.load(Path(str(OBD)), p, "all", quiet=True)) for p in ("random", "bts"))
    np.testing.assert_allclose(np.exp(uniform.log_propensity), 1 / 80, rtol=1e-4)
    weight = np.exp(uniform.log_propensity[0] - bts.log_propensity)
    value = weight * bts.feedback[:, 0, 0]
    error = np.hypot(value.std(), uniform.feedback[:, 0, 0].std()) / np.sqrt(len(value))
    assert len(value) == 10_000 and abs(value.mean() - uniform.feedback[:, 0, 0].mean()) < 3 * error


RATINGS = [(1 + i % 4, 10 + i % 7, 1 + i % 5, 978_300_000 + 86_400 * (i // 10) + 60 * i) for i in range(80)]


@pytest.mark.parametrize("layout", ["dat", "csv"])
def test_movielens(layout, tmp_path):
    movies = [(10 + i, f"Film, the {i}th (19{80 + i})", "Comedy|Drama" if i % 2 else "Action") for i in range(7)]
    if layout == "dat":
        for name, rows in (
            ("ratings", RATINGS),
            ("movies", movies),
            ("users", [(u, "F", 25, 4, "99") for u in (1, 2)]),
        ):
            text = "\n".join("::".join(map(str, row)) for row in rows)
            (tmp_path / f"{name}.dat").write_text(text + "\n", "latin-1")
    else:
        pl.DataFrame(RATINGS, ["userId", "movieId", "rating", "timestamp"], orient="row").write_csv(
            tmp_path / "ratings.csv"
        )
        pl.DataFrame(movies, ["movieId", "title", "genres"], orient="row").write_csv(tmp_path / "movies.csv")
    log = movielens.load(tmp_path, quiet=True)
    assert log.item_ids[1:].tolist() == list(range(10, 17)) and log.user_ids[1:].tolist() == [1, 2, 3, 4]
    assert [encoder["name"] for encoder in log.encoders["items"]] == ["year"] and log.spec.num_tags == 3
    assert log.spec.signals.names == ("like", "rating")
    read = whole(log)
    shown = read.slate >= 0
    assert sorted(read.feedback[shown][:, 1]) == sorted(rating for _, _, rating, _ in RATINGS)
    np.testing.assert_array_equal(read.feedback[shown][:, 0], read.feedback[shown][:, 1] >= 4)


def test_kuairec(tmp_path):
    folder, n = tmp_path / "data", 80
    folder.mkdir()
    played, length = RNG.integers(0, 20_000, n), np.full(n, 10_000)
    pl.DataFrame(
        {
            "user_id": RNG.integers(0, 6, n),
            "video_id": np.arange(n) % 9,
            "play_duration": played,
            "video_duration": length,
            "time": ["2020-07-05 00:08:23.438"] * n,
            "date": [20200705] * n,
            "timestamp": 1593878903.438 + 400 * np.arange(n),
            "watch_ratio": played / length,
        }
    ).write_csv(folder / "big_matrix.csv")
    pl.DataFrame({"video_id": range(9), "feat": ["[8]", "[27, 9]", "[9]"] * 3}).write_csv(
        folder / "item_categories.csv"
    )
    degrees = ["full_active", "high_active"] * 3
    pl.DataFrame({"user_id": range(6), "user_active_degree": degrees, "follow_user_num": range(6)}).write_csv(
        folder / "user_features.csv"
    )
    log = kuairec.load(tmp_path, quiet=True)
    read = whole(log)
    feedback = read.feedback[read.slate >= 0]
    np.testing.assert_allclose(sorted(feedback[:, 1]), sorted(played / 1000), rtol=1e-6)
    np.testing.assert_array_equal(feedback[:, 0], feedback[:, 1] >= 10)
    assert log.items.duration[1:].tolist() == [10.0] * 9 and log.spec.num_tags == 4 and log.spec.profile == 4


def test_tenrec(tmp_path):
    n = 100
    flags = {
        name: (np.arange(n) % every == 0).astype(int)
        for name, every in (("click", 2), ("follow", 9), ("like", 5), ("share", 7))
    }
    pl.DataFrame(
        {"user_id": np.arange(n) // 20, "item_id": np.arange(n) % 13}
        | flags
        | {
            "video_category": (np.arange(n) % 13) % 3,
            "watching_times": np.arange(n) % 3,
            "gender": [1] * n,
            "age": np.arange(n) // 20 % 2,
        }
    ).write_csv(tmp_path / "QB-video.csv")
    log = tenrec.load(tmp_path / "QB-video.csv", quiet=True)
    for name, rows in (("train", 16), ("valid", 2), ("test", 2)):
        part = log.part(name)
        assert part.num_sessions == 5 and ((part.slate >= 0).sum() == 5 * rows)
    train = log.train
    shown = [train.candidates[r, s] for r in range(train.num_requests) for s in train.slate[r] if s >= 0]
    wanted = [i % 13 for user in range(5) for i in range(20 * user, 20 * user + 16)]
    assert log.item_ids[shown].tolist() == wanted  # of each user the first rows, in order
    assert log.spec.num_tags == 4 and log.spec.signals.main == "click"
