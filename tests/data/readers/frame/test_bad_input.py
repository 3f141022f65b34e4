"""Logs that do not fit their schema: one line that names column, value, row and fix."""

import dataclasses
import datetime

import own_logs
import polars as pl
import pytest

from mmrf_jax.data.frame_log import SessionLog, describe
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
        (at("liked", "often"), SCHEMA, "column 'liked' has 'often' in row 7; write numbers"),
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
    text = describe(LOG, SCHEMA, items=TABLES["items"], users=TABLES["users"])
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
    given, notes = Schema("u", "i", "t", [Signal("like")], time_zone=zone), columns.Notes()
    column = pl.Series("t", times)
    found = columns.times(
        column, columns.resolve(pl.DataFrame([column, pl.Series("like", [0, 1])]), given, notes), notes
    )
    assert found.to_list() == [1714557600_000, 1714557601_000]
    assert (f"times in t are in {unit}, by their size" in notes.assumed) == (unit is not None)
