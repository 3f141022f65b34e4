"""Logs that do not fit their schema: one line that names column, value, row and fix."""

import dataclasses
import datetime
import math
import re

import own_logs
import polars as pl
import pytest

from mmrf_jax.data.frame_log import SessionLog, describe_log
from mmrf_jax.data.readers.frame import cells, columns, datetimes, tables
from mmrf_jax.data.readers.frame.notes import Notes
from mmrf_jax.schema import Schema
from mmrf_jax.signals import Signal

TABLES = own_logs.make_log(400)
LOG, SCHEMA = TABLES["log"], own_logs.SCHEMA


def at(column, value, row=7):
    """The log with another value in a row."""
    values = LOG[column].to_list()
    values[row] = value
    return LOG.with_columns(pl.Series(column, values, strict=False))


def schema(**given):
    return dataclasses.replace(SCHEMA, **given)


def kind(name, **given):
    return schema(signals=[dataclasses.replace(s, **(given if s.name == name else {})) for s in SCHEMA.signals])


REQUEST = LOG["req"][7]
WATCH = "column 'watch_ms' of the duration signal 'watch_time'"
TWICE = LOG.with_columns(req=pl.lit("r") + (pl.int_range(400) % 2).cast(pl.String), user_id=pl.lit("u"))


@pytest.mark.parametrize(
    ("log", "given", "message"),
    [
        (LOG.drop("liked"), SCHEMA, "the log has no column 'liked' (schema: signal like); there are"),
        (LOG.to_pandas().iloc[:, [0, 0, 1, 2, 3]], SCHEMA, "the log has two columns 'user_id'; rename or remove"),
        (at("liked", 7), SCHEMA, "column 'liked' of the binary signal 'like' has 7 in row 7; write 0 or 1, or choose"),
        (
            at("liked", "often"),
            SCHEMA,
            "column 'liked' of the binary signal 'like' has 'often' in row 7; write 0 or 1, or true",
        ),
        (at("taps", "often"), SCHEMA, "column 'taps' has 'often' in row 7; write numbers"),
        (LOG, SCHEMA.as_dict(), "schema is of type dict; give a mmrf_jax.Schema"),
        (LOG.rename({"user_id": "User_ID "}), SCHEMA, "no column 'user_id' (schema: user); did you mean 'User_ID '?"),
        (LOG.with_columns(ts=True), SCHEMA, "column 'ts' of times has type Boolean; write datetimes, ISO strings or"),
        (LOG.with_columns(ts=[0]), SCHEMA, "column 'ts' of times has type List(Int64); write datetimes, ISO strings"),
        (
            LOG.with_columns(ts=20240502),
            SCHEMA,
            "a median of 20240502, which is a date in no unit; write days as 2024-",
        ),
        (LOG.with_columns(ts=float("nan")), SCHEMA, "none of the 400 rows of the log can be used: {'no time': 400}"),
        (LOG.with_columns(watch_ms=float("nan")), SCHEMA, "none of the 400 rows of the log can be used: {'no watch"),
        (LOG.to_pandas().assign(user_id=[1, "a"] * 200), SCHEMA, "column 'user_id' of the log has values of several"),
        (LOG["user_id"].to_pandas(), SCHEMA, "the log is a Series; give a pandas, polars or pyarrow table"),
        (
            LOG,
            schema(request=None, position=None),
            "with those that were (without schema.request, requests are reconstructed)",
        ),
        (at("watch_ms", -5), SCHEMA, f"{WATCH} has -5 in row 7; write 0 or more, or choose kind='value'"),
        (at("taps", 0.5), SCHEMA, "column 'taps' of the count signal 'taps' has 0.5 in row 7; write whole numbers"),
        (LOG, kind("watch_time", unit="min"), f"{WATCH} with unit='min' has a median of "),
        (
            LOG.with_columns(liked=0),
            SCHEMA,
            "column 'liked' of signal 'like' has not a single positive in the 320",
        ),
        (at("p", 1.5), SCHEMA, "column 'p' of propensities has 1.5 in row 7; write probabilities above 0, at most 1"),
        (at("p", 0.0), SCHEMA, "column 'p' of propensities has 0.0 in row 7; write probabilities above 0, at most 1"),
        (at("ts", "soon"), SCHEMA, "column 'ts' of times has 'soon' in row 7; write all times as"),
        (
            LOG.with_columns(ts=pl.lit("2 May 2024")),
            SCHEMA,
            "column 'ts' of times has '2 May 2024' in row 0; write",
        ),
        (LOG.with_columns(ts=pl.int_range(400)), SCHEMA, "column 'ts' of times has a median of 199.5, which is a date"),
        (LOG.with_columns(user_id=0.5), SCHEMA, "column 'user_id' of ids has 0.5 in row 0; write ids as integers"),
        (at("user_id", "x"), SCHEMA, f"column 'req': request {REQUEST!r} belongs to several users (rows "),
        (
            TWICE,
            SCHEMA,
            "column 'req': request 'r0' comes again after more than schema.session_gap minutes (rows",
        ),
        (at("candidates", ["i001"]), SCHEMA, "column 'candidates' lacks the shown item "),
        (LOG, schema(split=("2023-01-01", "2023-01-02")), "no row is in the training part: schema.split=("),
        (LOG, schema(split=("2025-01-01", "2025-01-02")), "no row is in the test part: schema.split=("),
        (LOG, schema(split=5), "schema.split=5 takes the last 10 days, the log has 6; use fewer days"),
        (LOG, schema(num_candidates=2_000), "schema.num_candidates=2000 must lie between slate_size=4 and the 60"),
        (LOG.head(0), SCHEMA, "the log has no rows; give at least a few"),
        (3, SCHEMA, "the log is a int; give a pandas, polars or pyarrow table, or the path"),
        ("nosuch/*.csv", SCHEMA, "nosuch/*.csv is no file of the log; name a CSV, Parquet or Arrow file"),
    ],
)
def test_a_log_that_does_not_fit(log, given, message):
    with pytest.raises(ValueError) as error:
        SessionLog.from_frame(log, given, items=TABLES["items"], quiet=True)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"items": TABLES["items"].drop("shop")}, "the item table has no column 'shop' (schema: author)"),
        (
            {"items": TABLES["items"].with_columns(item_id=pl.int_range(60))},
            "column 'item_id' has type String in the log and Int64 in the item table; use one type",
        ),
        ({"items": None}, "schema.author='shop' is a column of the item table, which is not given; give one"),
        (
            {"items": TABLES["items"].with_columns(pl.col("item_id") + ".0")},
            "the item table has no item of the log: column 'item_id' has 'i",
        ),
        (
            {"users": TABLES["users"].with_columns(user_id=pl.lit("no one"))},
            "the user table has no user of the log: column 'user_id' has 'no one' there and '",
        ),
        (
            {"items": TABLES["items"].with_columns(duration_ms=pl.col("duration_ms") * 1000)},
            "s where it is not 0; choose a smaller schema.duration_unit such as 'ms'",
        ),
        ({"items": TABLES["items"].drop("duration_ms")}, "the log has no column 'duration_ms' (schema: duration)"),
        ({"users": TABLES["users"].drop("user_id")}, "the user table has no column 'user_id' (schema: user)"),
        (
            {"candidates": LOG.select("req", "candidates")},
            "of the candidate table has 'r0' in row 0 twice; keep one",
        ),
    ],
)
def test_tables_that_do_not_fit(table, message):
    with pytest.raises(ValueError) as error:
        SessionLog.from_frame(LOG, SCHEMA, **({"items": TABLES["items"]} | table), quiet=True)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_rows_that_cannot_be_used_are_counted():
    log = LOG.to_dicts()
    log[3]["user_id"] = log[4]["item_id"] = log[5]["ts"] = log[6]["watch_ms"] = None
    log[8]["item_id"] = ""
    log[10]["liked"] = None
    log.append(dict(log[20]))
    log.append(dict(log[21], rank=9))
    read = SessionLog.from_frame(pl.DataFrame(log, LOG.schema), SCHEMA, items=TABLES["items"], quiet=True)
    assert read.report["left_out"] == {
        "no user": 1,
        "no item": 2,
        "no time": 1,
        "no watch_time": 1,
        "repeated row": 1,
        "item repeated in a request": 1,
    }
    assert read.report["rows"] == 402 and read.report["used"] == 395
    assert "1 empty cells of like are 0" in read.report["assumed"]
    assert "left out: 2 rows: no item" in read.describe()


def test_a_dry_run_says_what_reading_would():
    text = describe_log(LOG, SCHEMA, items=TABLES["items"], users=TABLES["users"])
    assert text == SessionLog.from_frame(LOG, SCHEMA, TABLES["items"], TABLES["users"], quiet=True).describe()
    assert text.startswith("400 of 400 rows are used, of 60 items, 80 users")
    assert "signal watch_time (duration, more is better, main): " in text
    items = "price (number, as log1p), colours (categories of 3), vector (vector of 3), duration_ms (number)"
    assert f"features of items: {items}\nfeatures of users: age (number), country (category of 3)\n" in text


@pytest.mark.parametrize(
    ("times", "unit"),
    [
        ([1714557600, 1714557601], "s"),
        ([1714557600_000, 1714557601_000], "ms"),
        ([1714557600_000_000, 1714557601_000_000], "us"),
        ([1714557600_000_000_000, 1714557601_000_000_000], "ns"),
        (["2024-05-01T10:00:00Z", "2024-05-01T10:00:01Z"], None),
        (["2024-05-01 12:00:00+02:00", "2024-05-01 12:00:01.000+02:00"], None),
        ([datetime.datetime(2024, 5, 1, 12), datetime.datetime(2024, 5, 1, 12, 0, 1)], None),
        (["1714557600", "1714557601"], "s"),
        (["2024-05-01T12:00:00+02:00", "2024-05-01 10:00:01"], None),  # each row names its zone, or is in the schema's
    ],
)
def test_times_in_any_unit(times, unit):
    from mmrf_jax.data.readers.frame import columns

    zone = "Europe/Berlin" if isinstance(times[0], datetime.datetime) else "UTC"
    given, notes = Schema("u", "i", "t", [Signal("like")], time_zone=zone), Notes()
    column = pl.Series("t", times)
    found = datetimes.to_milliseconds(
        column, columns.resolve_units(pl.DataFrame([column, pl.Series("like", [0, 1])]), given, notes), notes
    )
    assert found.to_list() == [1714557600_000, 1714557601_000]
    assert (f"times in t are in {unit}, by their size" in notes.assumed) == (unit is not None)


def test_cells_without_a_value_are_empty_in_every_column():
    """NaN, and texts that are empty or blank."""
    blanks = pl.Series("x", ["a", "", "  ", None, "b"])
    assert cells.to_ids(blanks).to_list() == ["a", None, None, None, "b"]
    assert cells.to_ids(pl.Series([1.0, math.nan, None])).to_list() == [1, None, None]
    for days in ([20240502.0, math.nan, None], ["2024-05-02", " ", ""]):
        assert datetimes.to_days(pl.Series(days)).to_list() == [20240502, None, None]
    assert datetimes.to_days(pl.Series([None, None])).to_list() == [None, None]
    with pytest.raises(ValueError, match=r"column 'd' of days has 20240502\.5 in row 0"):
        datetimes.to_days(pl.Series("d", [20240502.5]))
    assert cells.to_numbers(pl.Series(["1.5", "", " ", None, " 2 "])).to_list() == [1.5, None, None, None, 2.0]
    flags = columns._signal(pl.Series(["1", "", "TRUE", " false"]), Signal("like"), 0)
    assert flags.to_list() == [1.0, None, 1.0, 0.0]


@pytest.mark.parametrize(
    ("lists", "clean"),
    [
        ([["a", "b", "a"], [], None, ["c"]], [["a", "b"], [], None, ["c"]]),
        ([["a", None, "b"], ["", " ", "c"]], [["a", "b"], ["c"]]),
        ([[1.0, math.nan, 1.0], [2.0]], [[1], [2]]),
        (['["a", "a"]', None, '["b", null]'], [["a"], None, ["b"]]),
    ],
)
def test_a_candidate_counts_once_and_an_empty_one_not_at_all(lists, clean):
    assert cells.to_id_lists(pl.Series("c", lists)).to_list() == clean


def test_candidate_lists_with_repeated_and_empty_entries_are_those_without():
    def read(log):
        return SessionLog.from_frame(log, SCHEMA, items=TABLES["items"], quiet=True)

    listed = pl.col("candidates")
    odd = LOG.with_columns(pl.concat_list(listed.list.head(3), pl.lit(None, pl.String), pl.lit(""), listed))
    assert read(odd).digest() == read(LOG).digest()


def test_the_unit_of_times_that_is_given_holds_and_another_size_is_noted():
    seconds = pl.Series("ts", [1_710_000_000] * 3)
    notes = Notes()
    assert columns.resolve_units(LOG.head(3).with_columns(seconds), schema(time_unit="ms"), notes).time_unit == "ms"
    assert notes.assumed[0] == "times in ts are in ms, as schema.time_unit says; their size is that of s"
    assert (
        columns.resolve_units(LOG.head(3).with_columns(seconds - seconds), schema(time_unit="s"), notes).time_unit
        == "s"
    )


def test_days_as_text_are_noted_as_days_are():
    notes = Notes()
    datetimes.to_milliseconds(pl.Series("ts", ["2024-05-02", None]), SCHEMA, notes)
    assert "ts has days without a time; each is midnight, so sessions last a day" in notes.assumed


def test_the_index_of_pandas_is_a_column_if_it_has_a_name():
    expected = cells.to_ids(LOG["user_id"])
    assert tables.read_table(LOG.to_pandas().set_index("user_id"), "log", ["user_id"])["user_id"].equals(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a;b\n1;2\n", "its header 'a;b' is separated by ';'; write commas, or Parquet"),
        (b"a\tb\n1\t2\n", "its header 'a\\tb' is separated by '\\t'; write commas, or Parquet"),
        ("a,b\n1,2\n".encode("utf-16"), "it is not in UTF-8; write it so"),
    ],
)
def test_other_kinds_of_text_are_named(text, message, tmp_path):
    (tmp_path / "x.csv").write_bytes(text)
    with pytest.raises(ValueError, match=re.escape(f"the log has no column 'a' (schema: user); {message}")):
        tables.read_table(tmp_path / "x.csv", "log", None, {"user": "a"})
