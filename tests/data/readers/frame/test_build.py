"""A table as sessions, against arrays that were computed without it."""

import dataclasses

import numpy as np
import own_logs
import polars as pl
import pytest

from mmrf_jax.data import named_features, sessions
from mmrf_jax.data.frame_log import SessionLog
from mmrf_jax.data.readers.frame import requests
from mmrf_jax.data.splits import PARTS, SPLITS
from mmrf_jax.ope import propensity
from mmrf_jax.schema import Schema
from mmrf_jax.signals import Signal

SCHEMA = Schema(
    user="user",
    item="item",
    time="time",
    request="request",
    position="place",
    signals=[Signal("like"), Signal("watch", kind="duration", unit="min")],
    main="like",
    split=("2024-05-01", "2024-05-02"),
    history=3,
    num_candidates=3,
)
#: Day and time, user, request, place, item, like, minutes; in no order.
ROWS = [
    ("2024-05-03T00:10:00Z", "a", "r6", 1, "z", 0, 1.0),
    ("2024-05-01T10:00:00Z", "a", "r1", 2, "y", 0, 0.0),
    ("2024-05-01T10:00:00Z", "a", "r1", 1, "x", 1, 2.0),
    ("2024-05-01T10:05:00Z", "a", "r2", 1, "z", 0, 0.5),
    ("2024-05-01T10:01:00Z", "b", "r4", 1, "y", 1, 1.0),
    ("2024-05-02T08:00:00Z", "a", "r3", 1, "x", 0, 0.0),
    ("2024-05-03T09:00:00Z", "b", "r5", 1, "w", 1, 3.0),
    ("2024-05-03T09:05:00Z", "b", "r7", 1, "x", 0, 3.0),
]


def table(rows=ROWS):
    return pl.DataFrame(rows, ["time", "user", "request", "place", "item", "like", "watch"], orient="row")


def read(rows=ROWS, schema=SCHEMA, **tables):
    return SessionLog.from_frame(table(rows), schema, quiet=True, **tables)


def shown(log, part):
    """[(user, [[items of a request], ...])] of the sessions of a part."""
    part, found = log.part(part), []
    for n in range(part.num_sessions):
        requests = range(part.offsets[n], part.offsets[n + 1])
        items = [[str(log.item_ids[part.candidates[r, s]]) for s in part.slate[r] if s >= 0] for r in requests]
        found.append((str(log.user_ids[part.user_id[n]]), items))
    return found


def test_requests_sessions_and_parts():
    log = read()
    assert shown(log, "train") == [("a", [["x", "y"], ["z"]]), ("b", [["y"]])]
    assert shown(log, "valid") == [("a", [["x"]])]
    assert shown(log, "test") == [("a", [["z"]]), ("b", [["w"], ["x"]])]
    assert log.item_ids.tolist() == ["", "w", "x", "y", "z"] and log.user_ids.tolist() == ["", "a", "b"]
    train = log.train
    np.testing.assert_array_equal(train.feedback[0], [[1, 120], [0, 0]])  # minutes become seconds
    np.testing.assert_array_equal(train.feedback[1], [[0, 30], [0, 0]])
    assert train.date.tolist() == [20240501, 20240501] and np.isnan(train.log_propensity).all()
    # In training the log ends at 10:05; no one is away for longer than the gap. In the test a is, at 09:05.
    assert train.terminated.tolist() == [False, False] and log.test.terminated.tolist() == [True, False]
    assert all((log.part(name).terminated != log.part(name).truncated).all() for name in SPLITS)


def test_histories_are_all_that_the_user_saw_before():
    log = read()
    assert not log.train.history_mask.any()
    test = log.test
    assert test.history_mask.tolist() == [[True, True, True], [False, False, True]]
    assert log.item_ids[test.history_videos[0]].tolist() == ["y", "z", "x"]
    np.testing.assert_array_equal(test.history_feedback[0], [[0, 0], [0, 30], [0, 0]])
    np.testing.assert_array_equal(test.history_feedback[1, 2], [1, 60])


def test_context_is_hour_absence_and_position():
    log = read(schema=dataclasses.replace(SCHEMA, time_zone="Asia/Shanghai", split=(0.6, 0.1, 0.3)))
    angle = (10 + 8) / 24 * 2 * np.pi
    np.testing.assert_allclose(log.train.context[0], [np.sin(angle), np.cos(angle), 1.0, 0.0], atol=1e-6)
    away = np.log1p(5 / 60) / np.log1p(168)
    np.testing.assert_allclose(log.train.context[1, 2:], [away, np.log1p(1)], atol=1e-6)


def test_the_first_value_of_a_list_is_the_tag():
    items = pl.DataFrame({"item": ["w", "x", "y", "z"], "dept": [["a", "b"], ["b"], [], ["a"]]})
    log = read(schema=dataclasses.replace(SCHEMA, tag="dept"), items=items)
    assert log.vocabularies["tag"].tolist() == ["a", "b"] and log.items.tag.tolist() == [0, 1, 2, 0, 1]
    assert "the first value of each list in dept is the tag" in log.report["assumed"]


def test_requests_are_reconstructed_where_the_log_has_none():
    times = [0, 1, 2, 3, 4, 100, 101, 200]
    items = ["x", "y", "z", "x", "x", "y", "z", "w"]
    rows = [
        (f"2024-05-01T{10 + t // 60}:{t % 60:02d}:00Z", "a", None, None, item, int(item == "x"), 1.0 + t)
        for t, item in zip(times, items, strict=True)
    ]
    rows.append(("2024-05-04T00:00:00Z", "a", None, None, "x", 1, 1.0))
    plain = dataclasses.replace(SCHEMA, request=None, position=None, slate_size=3, num_candidates=4)
    log = read(rows, plain)
    # At most three, all different, and a new session after half an hour.
    assert shown(log, "train") == [("a", [["x", "y", "z"], ["x"], ["x"]]), ("a", [["y", "z"]]), ("a", [["w"]])]
    assert log.train.terminated.tolist() == [True, True, False]
    said = log.describe()
    assert "requests are reconstructed" in said and "no candidates are logged" in said and "propensities fitted" in said


def test_a_place_that_does_not_rise_begins_a_request():
    rows = [
        (f"2024-05-0{1 + 3 * (t > 3)}T10:0{t}:00Z", "a", None, place, item, t % 2, 1.0 + t)
        for t, (place, item) in enumerate([(1, "x"), (2, "y"), (1, "z"), (2, "w"), (1, "x")])
    ]
    log = read(rows, dataclasses.replace(SCHEMA, request=None))
    assert shown(log, "train") == [("a", [["x", "y"], ["z", "w"]])] and log.spec.slate == 2


def minutes(of_user, day, *rows):
    """Rows of a user in the columns of `table`, from (minute after ten, item, like)."""
    return [(f"2024-05-0{day}T10:{m:02d}:00Z", of_user, None, None, item, like, 1.0 + m) for m, item, like in rows]


def test_rows_shown_at_random_are_parts_of_their_own_and_in_no_history():
    rows = minutes("a", 1, (0, "x", 1), (1, "y", 1), (2, "z", 0), (3, "w", 0))
    rows += minutes("b", 1, (0, "x", 0)) + minutes("a", 2, (0, "z", 0)) + minutes("a", 4, (0, "x", 0), (1, "w", 1))
    lottery = [0, 1, 0, 0, 0, 0, 0, 1]
    schema = dataclasses.replace(SCHEMA, request=None, position=None, slate_size=2, num_candidates=4, random="lottery")
    log = SessionLog.from_frame(table(rows).with_columns(lottery=pl.Series(lottery)), schema, quiet=True)
    assert shown(log, "train") == [("a", [["x", "z"], ["w"]]), ("b", [["x"]])]
    assert shown(log, "random_train") == [("a", [["y"]])] and shown(log, "random_test") == [("a", [["w"]])]
    assert log.part("random_valid").num_sessions == 0 and log.parts.keys() == set(PARTS)
    train, test = log.part("random_train"), log.part("random_test")
    assert log.item_ids[train.history_videos[0][train.history_mask[0]]].tolist() == ["x"]
    assert log.item_ids[test.history_videos[0]].tolist() == ["w", "z", "x"]  # without y
    np.testing.assert_array_equal(train.feedback[0, 0], [1, 120])
    np.testing.assert_allclose([*train.log_propensity, *test.log_propensity], np.log(1 / 4), rtol=1e-6)
    assert np.isnan(log.train.log_propensity).all() and train.truncated.all() and test.truncated.all()
    # Nothing is fitted on them: y has features and may be a candidate, and no separate embedding.
    assert log.items.embedding_id.tolist() == [0, 1, 2, 0, 3]  # w, x, y, z
    assert "where lottery is true, items were drawn uniformly" in log.describe()
    assert log.report["splits"]["random_train"]["rows"] == 1 and log.report["splits"]["train"]["rows"] == 4
    with pytest.raises(ValueError, match=r"'lottery' .* is true in all rows, .*; leave schema\.random out"):
        SessionLog.from_frame(table(rows).with_columns(lottery=pl.lit(True)), schema, quiet=True)


def test_sampled_candidates_are_available_from_the_day_that_the_item_table_names():
    items = pl.DataFrame({"item": [*"uvwxyz"], "uploaded": ["2024-05-02", None, "2024-05-03", None, None, None]})
    schema = dataclasses.replace(SCHEMA, available="uploaded")
    wanted = {"train": set("xyz"), "valid": set("uxyz"), "test": set("uwxyz")}  # v is never shown
    for kind in (pl.String, pl.Date, pl.Datetime("us")):
        column = pl.col("uploaded").str.to_datetime("%Y-%m-%d").cast(kind) if kind != pl.String else pl.col("uploaded")
        log = read(schema=schema, items=items.with_columns(column))
        found = {name: set(log.item_ids[log.part(name).candidates].ravel().tolist()) for name in SPLITS}
        assert all(found[name] <= wanted[name] for name in SPLITS) and "u" in found["valid"] | found["test"]
    numbers = items.with_columns(pl.col("uploaded").str.replace_all("-", "").cast(pl.Int64))
    assert read(schema=schema, items=numbers).train.candidates.tolist() == log.train.candidates.tolist()
    with pytest.raises(ValueError, match=r"column 'uploaded' of days has '2024-05-32' in row 0; write days such as"):
        read(schema=schema, items=items.with_columns(uploaded=pl.lit("2024-05-32")))
    with pytest.raises(ValueError, match=r"the item table has no column 'since' \(schema: available\)"):
        read(schema=dataclasses.replace(SCHEMA, available="since"), items=items)


def test_reconstructed_requests_end_with_a_gap_or_another_tab():
    rows = minutes("a", 1, (0, "x", 1), (1, "y", 0), (2, "z", 0), (9, "w", 1), (10, "x", 0))
    rows += minutes("a", 4, (0, "x", 0), (1, "w", 1))
    frame = table(rows).with_columns(tab=pl.Series(["home", "home", "shop", "shop", "shop", "shop", "home"]))
    plain = dataclasses.replace(SCHEMA, request=None, position=None, slate_size=3, num_candidates=4)
    for change, wanted in (
        ({}, [["x", "y", "z"], ["w", "x"]]),
        ({"request_gap": 5.0}, [["x", "y", "z"], ["w", "x"]]),
        ({"request_by": ("tab",)}, [["x", "y"], ["z", "w", "x"]]),
        ({"request_by": ("tab",), "context": ("tab",), "request_gap": 5.0}, [["x", "y"], ["z"], ["w", "x"]]),
    ):
        log = SessionLog.from_frame(frame, dataclasses.replace(plain, **change), quiet=True)
        assert shown(log, "train") == [("a", wanted)], change
    with pytest.raises(ValueError, match=r"schema.request names the requests, so leave out request_gap and request_by"):
        dataclasses.replace(SCHEMA, request_by=("tab",))
    with pytest.raises(ValueError, match=r"schema.request_gap is 0; give minutes above 0"):
        dataclasses.replace(plain, request_gap=0)


@pytest.fixture(scope="module")
def tables():
    return own_logs.make_log(600)


@pytest.fixture(scope="module")
def full(tables):
    return SessionLog.from_frame(
        tables["log"], own_logs.SCHEMA, items=tables["items"], users=tables["users"], quiet=True
    )


def test_logged_candidates_and_propensities(tables, full):
    lists = {row["req"]: row for row in tables["log"].group_by("req").agg(pl.all().first()).iter_rows(named=True)}
    of_user = {f"u{n}": [] for n in range(80)}
    for row in sorted(lists.values(), key=lambda row: row["ts"]):
        of_user[row["user_id"]].append(row)
    whole = sessions.concatenate([full.part(name) for name in SPLITS])
    order = np.repeat(whole.user_id, np.diff(whole.offsets))
    for user, rows in of_user.items():
        mine = np.flatnonzero(order == np.searchsorted(full.user_ids[1:], user) + 1)
        assert len(mine) == len(rows)
        for r, row in zip(mine, rows, strict=True):
            assert set(full.item_ids[whole.candidates[r]]) == set(row["candidates"])
            assert full.item_ids[whole.candidates[r, whole.slate[r, 0]]] == row["item_id"]
    k = (whole.slate >= 0).sum(1)
    logged = np.array([sum(np.log(1 / (12 - i)) for i in range(n)) for n in k])
    np.testing.assert_allclose(whole.log_propensity, logged, rtol=1e-6)
    # Off-policy estimates split a slate's propensity over its items by the scores.
    each = propensity.log_prob(whole.scores, whole.slate)
    wanted = np.where(whole.slate >= 0, np.log(1 / (12 - np.arange(4))), 0.0)
    np.testing.assert_allclose(each, wanted, atol=1e-5)


def test_the_place_among_the_candidates_says_nothing(full):
    place = full.train.slate[:, 0]
    assert np.bincount(place, minlength=12).min() > 0  # the shown item is first, last and anywhere between


def test_candidates_from_a_second_table_are_those_of_the_log(tables, full):
    lists = tables["log"].select("req", "candidates").unique("req", maintain_order=True)
    log = tables["log"].drop("candidates")
    known = {"items": tables["items"], "users": tables["users"], "quiet": True}
    again = SessionLog.from_frame(log, own_logs.SCHEMA, candidates=lists, **known)
    assert again.digest() == full.digest()
    long = lists.explode("candidates").rename({"candidates": "item_id"})
    schema = dataclasses.replace(own_logs.SCHEMA, candidates=None)
    assert SessionLog.from_frame(log, schema, candidates=long, **known).digest() == full.digest()


def test_shorter_lists_are_filled_and_longer_ones_sampled(tables):
    known = {"items": tables["items"], "quiet": True}
    more = SessionLog.from_frame(tables["log"], dataclasses.replace(own_logs.SCHEMA, num_candidates=20), **known)
    fewer = SessionLog.from_frame(tables["log"], dataclasses.replace(own_logs.SCHEMA, num_candidates=6), **known)
    assert "list fewer than 20 candidates" in more.describe() and "list more than 6" in fewer.describe()
    for log, count in ((more, 20), (fewer, 6)):
        part = log.train
        assert part.candidates.shape[1] == count and all(len(set(row)) == count for row in part.candidates.tolist())
    ids = {row["req"]: set(row["candidates"]) for row in tables["log"].iter_rows(named=True)}
    assert {frozenset(fewer.item_ids[row]) <= frozenset(x) for row in fewer.train.candidates for x in ids.values()} == {
        True,
        False,
    }


def test_propensities_that_are_partly_unknown_are_fitted(tables):
    some = tables["log"].with_columns(pl.when(pl.int_range(600) > 9).then("p").alias("p"))
    log = SessionLog.from_frame(some, own_logs.SCHEMA, items=tables["items"], quiet=True)
    assert "10 of 600 propensities are empty: the behaviour policy is fitted" in log.describe()
    assert np.isnan(log.test.log_propensity).all() and log.test.scores is None


@pytest.mark.parametrize(
    ("split", "wanted"),
    [
        ((0.5, 0.25, 0.25), [0, 0, 0, 0, 1, 1, 2, 2]),
        ((0.75, 0, 0.25), [0, 0, 0, 0, 0, 0, 2, 2]),
        (1, [0, 0, 0, 0, 0, 1, 1, 2]),
        (("2024-05-01", "2024-05-02"), [0, 0, 1, 1, 1, 2, 2, 2]),
        (("20240502", "20240503"), [0, 0, 0, 0, 0, 1, 1, 2]),
    ],
)
def test_time_is_cut_by_shares_days_or_dates(split, wanted):
    day = 20240500 + np.array([1, 1, 2, 2, 2, 3, 3, 4])
    schema = dataclasses.replace(SCHEMA, split=split)
    time, rows = np.arange(8) * 1_000, {int(d): int((day == d).sum()) for d in day}
    for pieces in ([time], [time[::2], time[1::2], time[:0]]):
        assert requests.cut_parts(requests.SortedTimes(pieces), rows, schema).of(time, day).tolist() == wanted


@pytest.mark.parametrize("library", ["pandas", "pyarrow", "lazy", "csv", "csv.gz", "parquet", "ipc", "folder"])
def test_the_same_log_from_any_library_and_file(tables, full, library, tmp_path):
    log, known = tables["log"], {"items": tables["items"], "users": tables["users"], "quiet": True}
    if "csv" in library:
        text = pl.lit('["') + pl.col("candidates").list.join('", "') + pl.lit('"]')
        log = log.with_columns(text.alias("candidates"))
        log.write_csv(tmp_path / f"log.{library}", compression="gzip" if library == "csv.gz" else "uncompressed")
        log = str(tmp_path / "*.csv*")
    elif library in ("parquet", "ipc", "folder"):
        write = pl.DataFrame.write_ipc if library == "ipc" else pl.DataFrame.write_parquet
        ending = "parquet" if library == "folder" else library
        write(log.head(250), tmp_path / f"part0.{ending}")
        write(log.tail(-250), tmp_path / f"part1.{ending}")
        log = tmp_path if library == "folder" else f"{tmp_path}/part*.{ending}"
    else:
        log = {"pandas": log.to_pandas, "pyarrow": log.to_arrow, "lazy": log.lazy}[library]()
    assert SessionLog.from_frame(log, own_logs.SCHEMA, **known).digest() == full.digest()


def test_integer_ids_stay_integers(tables):
    number = pl.col("item_id").str.slice(1).cast(pl.Int64) + 2**53  # not exact in floats
    users = pl.col("user_id").str.slice(1).cast(pl.UInt64) + 2**63
    items = pl.col("candidates").list.eval(pl.element().str.slice(1).cast(pl.Int64) + 2**53)
    log = tables["log"].with_columns(number, users, items)
    schema = dataclasses.replace(own_logs.SCHEMA, author=None, tag=None, duration=None)
    read = SessionLog.from_frame(log, schema, quiet=True)
    assert read.item_ids.dtype == np.int64 and read.item_ids[1:].min() == 2**53
    assert read.user_ids.dtype == np.uint64 and read.user_ids[1:].min() == log["user_id"].min()
    assert read.spec.num_authors == read.spec.num_tags == 1 and not read.items.duration.any()


def test_everything_is_fitted_on_training_alone(tables, full):
    """Other values on the later days change no vocabulary, normaliser or training session."""
    last = tables["log"].with_row_index()["ts"].sort()[int(0.8 * len(tables["log"])) - 1]
    late = pl.col("ts") > last + 3_600_000
    changed = tables["log"].with_columns(
        pl.when(late).then(pl.lit(3_000)).otherwise("watch_ms").alias("watch_ms"),
        pl.when(late).then(1 - pl.col("liked")).otherwise("liked").alias("liked"),
    )
    assert not changed.equals(tables["log"])
    again = SessionLog.from_frame(changed, own_logs.SCHEMA, items=tables["items"], users=tables["users"], quiet=True)
    assert again.encoders == full.encoders
    for field in dataclasses.fields(full.train):
        np.testing.assert_array_equal(getattr(again.train, field.name), getattr(full.train, field.name))


def test_what_is_saved_is_opened(full, tmp_path):
    full.save(tmp_path / "log")
    again = SessionLog.open(tmp_path / "log")
    assert again.digest() == full.digest() and again.schema == full.schema and again.describe() == full.describe()
    assert again.item_ids.dtype == full.item_ids.dtype and again.spec == full.spec
    with pytest.raises(FileExistsError):
        full.save(tmp_path / "log")
    (tmp_path / "log" / "items.npz").write_bytes(b"x")
    with pytest.raises(ValueError, match="is no log that can be read"):
        SessionLog.open(tmp_path / "log")


def test_columns_of_the_context_are_features_of_the_request():
    """Of a request its first row in place order counts; encoders are fitted on the rows of training."""
    extra = {"device": ["tv", "web", "app", "app", "app", "web", None, "app"], "battery": [9, 2, 4, 0, 2, 7, 5, None]}
    given = table().with_columns(pl.Series(name, values) for name, values in extra.items())
    log = SessionLog.from_frame(given, dataclasses.replace(SCHEMA, context=["device", "battery"]), quiet=True)
    assert log.spec.context == 4 + 3 + 1
    assert [encoder["name"] for encoder in log.encoders["context"]] == ["device", "battery"]
    assert log.encoders["context"][0]["vocabulary"] == ["app", "web"]  # of 1 May, rows 1 to 4
    train = np.array([2.0, 4.0, 0.0, 2.0])
    scaled = (train - train.mean()) / train.std()
    # Requests r1 (rows 2 and 1), r2, r4; then r3; then r6, r5, r7.
    np.testing.assert_allclose(log.train.context[:, 3:7], [[1, 0, 0, scaled[1]], [1, 0, 0, scaled[2]], [1, 0, 0, 0]])
    np.testing.assert_allclose(log.valid.context[:, 3:7], [[0, 1, 0, (7 - train.mean()) / train.std()]], rtol=1e-6)
    late = [[0, 0, 1, (9 - train.mean()) / train.std()], [0, 0, 0, (5 - train.mean()) / train.std()], [1, 0, 0, 0]]
    np.testing.assert_allclose(log.test.context[:, 3:7], late, rtol=1e-6)
    np.testing.assert_allclose(log.train.context[:, -1], [0, np.log(2), 0], rtol=1e-6)  # the last is the position
    assert "features of context: device (category of 2), battery (number)" in log.describe()
    with pytest.raises(ValueError, match=r"the log has no column 'app' \(schema: context app\)"):
        SessionLog.from_frame(given, dataclasses.replace(SCHEMA, context=["app"]), quiet=True)


def test_a_run_asks_for_the_context_by_name():
    given = table().with_columns(device=pl.lit("tv"))
    log = SessionLog.from_frame(given, dataclasses.replace(SCHEMA, context=["device"]), quiet=True)
    encoders = [*named_features.plain_encoders(["hour_sin", "hour_cos", "hours_away"]), *log.encoders["context"]]
    of_tv = named_features.encode_named(encoders, {"device": "tv", "hour_sin": 0.5, "hours_away": 1.0})
    np.testing.assert_array_equal(of_tv, [0.5, 0, 1, 1, 0])
    np.testing.assert_array_equal(log.train.context[:, 3:5], [[1, 0]] * 3)
    np.testing.assert_array_equal(named_features.encode_named(encoders, {"device": "new"}), [0, 0, 0, 0, 1])
