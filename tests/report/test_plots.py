"""The picture of an A/B test is written, can be read, and shows the result."""

import numpy as np
from matplotlib import image

from mmrf_jax.report import plots


def entry(diff, half):
    if diff is None:
        return {"mean": 1.0, "diff_pct": None, "ci95": None, "note": "too few: 3 users of mmrf have any"}
    return {"mean": 1.0, "diff_pct": diff, "ci95": [diff - half, diff + half]}


def make_result(diff=5.0, arms=("mmrf", "random")):
    control = {"watch_time": entry(0, 0), "depth": entry(0, 0), "hate": entry(None, 0)}
    treated = {"watch_time": entry(diff, 1.0), "depth": entry(-2.0, 0.5), "hate": entry(None, 0)}
    return {"ab_test": {"production": control} | dict.fromkeys(arms, treated)}


def test_a_png_is_written_into_a_new_folder(tmp_path):
    path = tmp_path / "new" / "ab.png"
    plots.forest(make_result(), path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = image.imread(path)
    assert pixels.ndim == 3 and 0.0 < np.mean(pixels[..., :3].min(axis=-1) < 0.5) < 0.5  # ink, on white


def test_days_are_drawn(tmp_path):
    def draw(name, diffs):
        days = [{"day": i, "ab_test": make_result(diff)["ab_test"]} for i, diff in enumerate(diffs)]
        plots.days(make_result() | {"by_day": days}, tmp_path / name, metrics=["watch_time", "hate"])  # no hate drawn
        return image.imread(tmp_path / name)

    lasts = draw("lasts.png", [5.0, 5.0, 5.0])
    np.testing.assert_array_equal(lasts, draw("again.png", [5.0, 5.0, 5.0]))
    assert not np.array_equal(lasts, draw("wears_off.png", [5.0, 3.0, 1.0]))


def test_the_picture_is_of_the_result(tmp_path):
    def draw(name, result, **kwargs):
        plots.forest(result, tmp_path / name, **kwargs)
        return image.imread(tmp_path / name)

    first = draw("first.png", make_result())
    np.testing.assert_array_equal(first, draw("again.png", make_result()))
    assert not np.array_equal(first, draw("other.png", make_result(diff=9.0)))
    assert draw("tall.png", make_result(arms=("a", "b", "c"))).shape[0] > first.shape[0]
    # One panel a metric; hate, which never happens in the control, has no difference to draw.
    assert draw("one.png", make_result(), metrics=["watch_time", "hate"]).shape[1] < first.shape[1]


def test_intervals_that_events_cannot_carry_are_words_or_gaps(tmp_path):
    """Of an arm or a day alone they are words and gaps; of all, the picture says so; no run fails for it."""
    some, none = make_result(arms=("mmrf", "random")), make_result(diff=None)
    some["ab_test"]["random"] = some["ab_test"]["random"] | {"watch_time": entry(None, 0)}
    for name, result in (("some.png", some), ("all.png", make_result())):
        plots.forest(result, tmp_path / name, metrics=["watch_time"])
    assert not np.array_equal(image.imread(tmp_path / "some.png"), image.imread(tmp_path / "all.png"))
    days = [{"day": i, "ab_test": x["ab_test"]} for i, x in enumerate((make_result(), none, make_result()))]
    plots.days(make_result() | {"by_day": days}, tmp_path / "gap.png", metrics=["watch_time"])
    for draw in (plots.forest, plots.days):
        draw(none | {"by_day": days[1:2]}, tmp_path / "none.png", metrics=["watch_time", "hate"])
        assert np.ptp(image.imread(tmp_path / "none.png")) > 0.5
        (tmp_path / "none.png").unlink()
