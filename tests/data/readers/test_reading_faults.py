"""What the readers do with each fault of people's files, wherever it stands: the tables of docs/reading-logs.md."""

from __future__ import annotations

import gzip
import json
import pathlib
import re

import kuairand_files as files
import numpy as np
import pandas as pd
import polars as pl
import pytest
import reading
from reading import cells_of, with_cells

from mmrf_jax.data.readers.engine import tasks
from mmrf_jax.data.readers.kuairand import builder, csv_files, prepare, release
from mmrf_jax.io.progress import counted

DOCS = pathlib.Path(__file__).parents[3] / "docs" / "reading-logs.md"
CONFIG = builder.KuaiRandConfig(candidates=20, slate=3, history=8)


def quoted(line: str) -> str:
    return ",".join(f'"{cell}"' for cell in line.split(","))


#: Each fault of a line of the log: what is written in its place, and the reason that it counts under.
LINES = {
    "a field too many": (lambda s: s + ",1", "unparsable"),
    "a comma at the end": (lambda s: s + ",", "unparsable"),
    "a field too few": (lambda s: s.rpartition(",")[0], "unparsable"),
    "commas alone": (lambda s: "," * s.count(","), "unparsable"),
    "a blank line, or one of blanks": (lambda s: "\n  \n\r", ""),
    "the header again": (lambda s: reading.HEADER, "unparsable"),
    "text": (lambda s: "exported by someone", "unparsable"),
    "bytes that are no UTF-8": (lambda s: with_cells(s, tab="\udcff"), "unparsable"),
    "a NUL byte": (lambda s: with_cells(s, tab="1\0"), "unparsable"),
    "an empty cell": (lambda s: with_cells(s, is_click=""), "unparsable"),
    "an empty `hourmin` or stay time": (lambda s: with_cells(s, hourmin="", profile_stay_time=""), "used"),
    "a line that ends in CR LF": (lambda s: s + "\r", "used"),
    "cells in quotes": (quoted, "used"),
    "a quote without its end": (lambda s: with_cells(s, user_id='"' + cells_of(s)["user_id"]), "unparsable"),
    "blanks around a number": (lambda s: with_cells(s, tab=" 1 ", is_like="0 "), "used"),
    "a sign, leading zeros": (lambda s: with_cells(s, tab="+1", play_time_ms="007"), "used"),
    "`18312.0`": (lambda s: with_cells(s, play_time_ms="18312.0"), "used"),
    "`18312.5`": (lambda s: with_cells(s, play_time_ms="18312.5"), "unparsable"),
    '`"18,312"`': (lambda s: with_cells(s, play_time_ms='"18,312"'), "unparsable"),
    "`nan`, `NULL`": (lambda s: with_cells(s, play_time_ms="nan"), "unparsable"),
    "`True`, `False`": (lambda s: with_cells(s, is_click="True"), "unparsable"),
    "a day as `2022-04-22`": (lambda s: with_cells(s, date="2022-04-22"), "unparsable"),
    "a time as text": (lambda s: with_cells(s, time_ms="2022-04-22 14:59:07"), "unparsable"),
    "a number beyond its range": (lambda s: with_cells(s, play_time_ms="99999999999"), "unparsable"),
    "`1E+05`": (lambda s: with_cells(s, play_time_ms="1E+05"), "used"),
    "`1.65061E+12`": (lambda s: with_cells(s, time_ms="1.65061E+12"), "lost_digits"),
    "an id of 64 bits": (lambda s: with_cells(s, user_id="9007199254740993", duration_ms="9000"), "used"),
    "an id below 0, or beyond 64 bits": (lambda s: with_cells(s, video_id="-7"), "unparsable"),
    "a flag of 2": (lambda s: with_cells(s, is_click="2"), "bad_flag"),
    "a day that there is not": (lambda s: with_cells(s, date="20220431"), "bad_date"),
    "a time in seconds": (lambda s: with_cells(s, time_ms=cells_of(s)["time_ms"][:-3]), "time_not_on_date"),
    "a time in microseconds": (lambda s: with_cells(s, time_ms=cells_of(s)["time_ms"] + "000"), "time_not_on_date"),
    "a negative time": (lambda s: with_cells(s, time_ms="-5"), "time_not_on_date"),
    "a time two days off its date": (lambda s: shifted(s, 2), "time_not_on_date"),
    "a time within a day of its date": (lambda s: shifted(s, 1), "used"),
    "a negative play": (lambda s: with_cells(s, play_time_ms="-5"), "negative_play_time"),
    "a play or a video above six hours": (lambda s: with_cells(s, play_time_ms="22000000"), "too_long"),
    "a duration of 0 that the features know": (lambda s: with_cells(s, duration_ms="0"), "used"),
    "a duration of 0 that they do not": (lambda s: with_cells(s, duration_ms="0", video_id="5000"), "no_duration"),
    "the same line twice": (lambda s: s + "\n" + s, "duplicates"),
}


def shifted(line: str, days: int) -> str:
    """A line whose time is at noon, some days after its date."""
    date = cells_of(line)["date"]
    return with_cells(line, time_ms=str(files.midnight_ms(int(date)) + days * 86_400_000 + 43_200_000))


@pytest.mark.parametrize("fault", LINES)
def test_a_faulty_line_has_one_fate_at_all_places(fault, tmp_path):
    """As the first, a middle and the last line of the file, and alone in a chunk: 18 bytes are the shortest line."""
    check_fate(tmp_path / reading.NAME, fault, reading.good_lines(5), (0, 2, 4), "", (1 << 20, 18))


@pytest.mark.nightly
@pytest.mark.parametrize("fault", LINES)
def test_a_faulty_line_has_one_fate_at_each_place(fault, tmp_path):
    for at in range(12):
        for end in ("\n", ""):
            check_fate(tmp_path / reading.NAME, fault, reading.good_lines(12), (at,), end, (1 << 20, 250, 10))


def check_fate(path, fault, good, places, end, sizes):
    """Reads a file with the fault at some places, whole and in chunks of some bytes."""
    edit, outcome = LINES[fault]
    text = [edit(line) if i in places else line for i, line in enumerate(good)]
    path.write_bytes(("\n".join([reading.HEADER, *text]) + end).encode("utf-8", "surrogateescape"))
    found, n = [], len(places)
    for size in sizes:
        usable, counts = reading.read(path, size)
        assert reading.unused(counts) == ({outcome: n} if outcome not in ("used", "") else {}), (places, size)
        assert counts["rows"] == len(good) + n * ((outcome == "duplicates") - (outcome == ""))
        found.append(usable.cast(dict.fromkeys(csv_files.IDS, pl.Int64)))
    assert all(frame.equals(found[0]) for frame in found)


def test_lines_of_one_chunk_that_are_all_faulty_are_counted_each(tmp_path):
    path = tmp_path / reading.NAME
    for line in ("1,2", "", ",,,", "1," * 40, '"', '"a\nb"', "\r", "\t", "x"):
        path.write_text("\n".join([reading.HEADER, line, line, line]))
        blank = not line.strip()
        for size in (1 << 20, 3):
            usable, counts = reading.read(path, size)
            rows = 0 if blank else 3 * len(line.split("\n"))
            assert reading.unused(counts) == ({} if blank else {"unparsable": rows}) and usable.is_empty()


def test_a_column_of_ones_own_may_hold_quotes_and_commas_and_short_lines_show(tmp_path):
    path, good = tmp_path / reading.NAME, reading.good_lines(5)
    own = [line + f',"a, {i}"' if i % 2 else line + ",b" for i, line in enumerate(good)]
    for short in (None, 0, 2, 4):
        text = [line.rpartition(",b")[0] or line if i == short else line for i, line in enumerate(own)]
        if short is not None:
            text[short] = good[short]  # without the last field
        path.write_text("\n".join([reading.HEADER + ",title", *text]))
        for size in (1 << 20, 50):
            assert reading.unused(reading.read(path, size)[1]) == ({} if short is None else {"unparsable": 1})
        path.write_text("\n".join([reading.HEADER + ",title", *(t.replace('"', "").replace("a, ", "a") for t in text)]))
        for size in (1 << 20, 50):
            assert reading.unused(reading.read(path, size)[1]) == ({} if short is None else {"unparsable": 1})


def reordered(header: str, body: list[str]) -> str:
    def turn(line):
        return ",".join(reversed(line.split(",")))

    return "\n".join([turn(header), *map(turn, body)])


#: Each form of a whole file: how it is written, and "read" or what the error says.
FILES = {
    "a byte order mark, CR LF": (lambda h, b: "\ufeff" + "\r\n".join([h, *b, ""]), "read"),
    "blank lines before the header": (lambda h, b: "\n \r\n" + "\n".join([h, *b]), "read"),
    "a header in quotes": (lambda h, b: "\n".join([quoted(h), *b]), "read"),
    "columns in another order, or more of them": (reordered, "read"),
    "unnamed columns at the end": (lambda h, b: "\n".join(line + ",," for line in [h, *b]), "read"),
    "an unnamed column of row numbers": (
        lambda h, b: "\n".join(f"{i or ''},{s}" for i, s in enumerate([h, *b])),
        "read",
    ),
    "no line after the header": (lambda h, b: h, "read"),
    "no byte": (lambda h, b: "", "is empty; copy it again"),
    "no header": (lambda h, b: "\n".join(b), "has no column 'user_id'; copy it again"),
    "a column that is missing": (lambda h, b: "\n".join([h.replace(",tab", ",tabs"), *b]), "has no column 'tab'"),
    "a column twice": (
        lambda h, b: "\n".join([h + ",hourmin", *(s + ",1" for s in b)]),
        "has the column 'hourmin' twice; remove one",
    ),
    "semicolons, tabs or bars": (lambda h, b: "\n".join([h, *b]).replace(",", ";"), "is separated by semicolons"),
    "line ends of CR alone": (lambda h, b: "\r".join([h, *b]), "has lines that end in CR alone"),
    "UTF-16": (lambda h, b: "\n".join([h, *b]).encode("utf-16"), "is in UTF-16; save it as CSV in UTF-8"),
    "gzip, bzip2, xz, zstd, a zip or spreadsheet": (
        lambda h, b: gzip.compress("\n".join([h, *b]).encode()),
        "is compressed by gzip; unpack it",
    ),
}


@pytest.mark.parametrize("form", FILES)
def test_a_files_form_is_read_or_refused_by_name(form, tmp_path):
    write, outcome = FILES[form]
    good = reading.good_lines(5) if form != "no line after the header" else []
    path = tmp_path / reading.NAME
    text = write(reading.HEADER, good)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    if outcome == "read":
        assert reading.read(path, 100)[1]["used"] == len(good)
        return
    with pytest.raises(ValueError, match=re.escape(f"{path} {outcome}")):
        reading.read(path, 100)


def test_a_column_twice_is_refused_in_features(tmp_path):
    source = files.write(tmp_path)
    for stem in ("user_features", "video_features_basic"):
        path = source / "data" / f"{stem}_pure.csv"
        text = path.read_text()
        path.write_text("\n".join(line + "," + line.split(",")[0] for line in text.splitlines()))
        with pytest.raises(ValueError, match=rf"{stem}_pure.csv has the column '\w+_id' twice; remove one of the two"):
            csv_files.check_headers(release.find_release(source))
        path.write_text(text)


def test_packed_files_are_named(tmp_path):
    source = files.write(tmp_path)
    path = source / "data" / reading.NAME
    path.rename(path.with_name(path.name + ".gz"))
    with pytest.raises(ValueError, match=r"pure\.csv\.gz is compressed; unpack it"):
        release.find_release(source)
    (source / "data" / reading.NAME).write_text(reading.HEADER)
    assert len(release.find_release(source).logs) == 2  # unpacked meanwhile


def standard() -> pd.DataFrame:
    return files.make_log(0, 300).drop_duplicates()


def divide(column, by):
    return lambda rows: rows.assign(**{column: rows[column] // by})


#: Each way to write most rows of a log otherwise than the release does, and what the error says.
UNITS = {
    "times in seconds": (divide("time_ms", 1000), r"time_ms of 300 of 300 .* it?.*in seconds: multiply it by 1,000"),
    "times in microseconds": (lambda r: r.assign(time_ms=r.time_ms * 1000), "in microseconds: divide it by 1,000"),
    "times in nanoseconds": (lambda r: r.assign(time_ms=r.time_ms * 10**6), "in nanoseconds: divide it by 1,000,000"),
    "negative times": (lambda r: r.assign(time_ms=-5), r"not on their date \(line 2: time_ms is '-5'"),
    "times that a spreadsheet rounded": (
        lambda r: r.assign(time_ms=[f"{t:.5E}" for t in r.time_ms]),
        r"lack digits .* \(line 2: time_ms is '1.65\d+E\+12'",
    ),
    "years of two digits": (
        lambda r: r.assign(date=r.date % 10**6),
        r"not on their date \(line 2: .* date is '220\d+'",
    ),
    "plays in seconds": (divide("play_time_ms", 1000), "play_time_ms of .* as if in seconds; multiply it by 1,000"),
    "plays in microseconds": (
        lambda r: r.assign(play_time_ms=r.play_time_ms * 1000),
        "above ten times duration_ms, as if in microseconds; divide",
    ),
    "durations in seconds": (divide("duration_ms", 1000), "duration_ms of 300 of 300 .* as if in seconds; multiply"),
    "durations in microseconds": (
        lambda r: r.assign(duration_ms=r.duration_ms * 1000),
        "duration_ms of .* above six hours, as if in microseconds; divide",
    ),
    "`is_rand` of the other log": (lambda r: r.assign(is_rand=1), "of the random log, the name says standard"),
    "cells in quotes that are no numbers": (
        lambda r: r.assign(is_click="True"),
        "none of the 300 rows .*: 300 unparsable; the first is .*pure.csv, line 2: is_click is 'True', not 0 or 1",
    ),
    "days such as 2022-04-22": (
        lambda r: r.assign(date=r.date.astype(str).str.replace(r"(....)(..)", r"\1-\2-", regex=True)),
        "none of the 300 rows .* line 2: date is '2022-0.-..', not a whole number such as 20220422",
    ),
    "times as text": (lambda r: r.assign(time_ms="2022-04-22 14:59:07"), "line 2: time_ms is '2022-04-22 14:59:07'"),
    "plays in seconds with decimals": (
        lambda r: r.assign(play_time_ms=r.play_time_ms / 1000 + 0.0001),
        "play_time_ms is .*, not a whole number such as 18312",
    ),
    "a comma at the end of each line": (
        lambda r: r.assign(tab=r.tab.astype(str) + "|"),
        "none of the 300 rows .* line 2: it has 20 fields, the header 19",
    ),
    "flags that are no flags": (lambda r: r.assign(is_like=7), "300 bad_flag; .* line 2: is_like is '7', not 0 or 1"),
    "days that there are not": (lambda r: r.assign(date=20221345), "300 bad_date; .* date is '20221345', no day"),
    "no durations at all": (lambda r: r.assign(duration_ms=0, video_id=900), "300 no_duration; .* duration_ms is '0'"),
    "plays below 0": (lambda r: r.assign(play_time_ms=-1), "300 negative_play_time; .* play_time_ms is '-1'"),
    "no row": (lambda r: r.iloc[:0], "holds no row of the standard log; copy log_standard"),
}


def prepared(source: pathlib.Path, work: pathlib.Path, config=CONFIG, **sizes) -> dict:
    work.mkdir()
    with tasks.worker_processes(1) as engine:
        made = prepare.run_stages(
            prepare.KuaiRandJob(release.find_release(source), config, work, **sizes), engine, counted
        )
    return json.loads((made / prepare.ABOUT).read_text())


@pytest.mark.parametrize("way", UNITS)
def test_most_rows_written_otherwise_are_refused_with_the_unit_or_the_first_cell(way, tmp_path):
    change, message = UNITS[way]
    source = files.write(tmp_path / "source", standard=change(standard()))
    if way == "a comma at the end of each line":
        path = source / "data" / reading.NAME
        path.write_text(path.read_text().replace("|", ","))
    with pytest.raises(ValueError, match=message) as error:
        prepared(source, tmp_path / "work")
    assert "None" not in str(error.value) and "\n" not in str(error.value)


def test_a_file_in_another_unit_is_found_beside_a_longer_one_that_is_not(tmp_path):
    source = files.write(tmp_path, standard=standard())
    other = files.make_log(1, 50).assign(time_ms=lambda r: r.time_ms // 1000)
    other.to_csv(source / "data" / "log_standard_4_08_to_4_21_pure.csv", index=False)
    with pytest.raises(ValueError, match=r"4_08_to_4_21_pure\.csv: time_ms of 50 of 50 rows .* in seconds"):
        prepared(source, tmp_path / "work")


#: Each fault of the features: the file, the change, and what the error says.
FEATURES = {
    "days of another form": (
        "videos",
        lambda f: f.assign(upload_dt="10.04.2022"),
        "cells of upload_dt .* '10.04.2022'",
    ),
    "durations in seconds": (
        "videos",
        lambda f: f.assign(video_duration=36.0),
        "video_duration of .* as if in seconds",
    ),
    "durations in microseconds": ("videos", lambda f: f.assign(video_duration=9e10 / 3), "as if in microseconds"),
    "tags that are names": ("videos", lambda f: f.assign(tag="sports"), "cells of tag .* 'sports'; write a number"),
    "authors that are names": ("videos", lambda f: f.assign(author_id="ann"), "cells of author_id .* 'ann'"),
    "flags as True and False": (
        "users",
        lambda f: f.assign(is_video_author=True),
        "cells of is_video_author .* 'True'",
    ),
    "counts as 1,000": ("users", lambda f: f.assign(fans_user_num="1,000"), "cells of fans_user_num .* '1,000'"),
}


@pytest.mark.parametrize("fault", FEATURES)
def test_features_written_otherwise_are_refused_by_column(fault, tmp_path):
    kind, change, message = FEATURES[fault]
    frame = {"videos": files.make_videos, "users": files.make_users}[kind]()
    with pytest.raises(ValueError, match=message):
        prepared(files.write(tmp_path / "source", standard=standard(), **{kind: change(frame)}), tmp_path / "work")


@pytest.mark.parametrize("at", [0, 2, 4])
def test_faulty_lines_of_features_are_counted_wherever_they_stand(at, tmp_path):
    text = files.make_videos().iloc[:5].to_csv(index=False).splitlines()
    faults = {
        "a field too many": text[at + 1] + ",1",
        "a field too few": text[at + 1].rpartition(",")[0],
        "an id that is no number": "x" + text[at + 1],
        "text": "exported by someone",
        "blank": "",
    }
    path = tmp_path / "video_features_basic_pure.csv"
    for fault, line in faults.items():
        path.write_text("\n".join([*text[: at + 1], line, *text[at + 2 :]]))
        for size in (1 << 20, 10):
            frames = [csv_files.read_videos(chunk)[0] for chunk in csv_files.chunks(path, size)]
            rows = pl.concat(frames, how="vertical_relaxed")
            assert len(rows) == len(text) - 1 - (fault == "blank"), (fault, size)
            assert rows["video_id"].null_count() == (fault != "blank"), (fault, size)


def test_ids_of_64_bits_give_the_sessions_that_small_ones_do(tmp_path):
    """All ids moved beyond 2^53; users' numbers follow their order."""
    frames = {"standard": files.make_log(0, 800), "random": files.make_log(9, 300, is_rand=1)}
    frames |= {"users": files.make_users(), "videos": files.make_videos()}
    far = 2**60 + 1
    moved = {
        kind: frame.assign(**{name: frame[name].astype("int64") + far for name in csv_files.IDS if name in frame})
        for kind, frame in frames.items()
    }
    half = {**moved, "users": frames["users"], "standard": moved["standard"].copy()}
    small = files.loaded(builder.open_or_prepare(files.write(tmp_path / "small", **frames), tmp_path / "cache", CONFIG))
    log = builder.open_or_prepare(files.write(tmp_path / "large", **moved), tmp_path / "cache", CONFIG)
    large, ids = files.loaded(log), log.item_ids
    for name in ("train", "valid", "test", "random_test"):
        one, other = small[0][name], large[0][name]
        for field in ("date", "profile", "history_videos", "history_feedback", "offsets", "context", "feedback"):
            np.testing.assert_array_equal(getattr(one, field), getattr(other, field), err_msg=field)

        def place(log):
            return np.take_along_axis(log.candidates, np.maximum(log.slate, 0), 1)[log.slate >= 0]

        np.testing.assert_array_equal(place(one), place(other))
        np.testing.assert_array_equal(one.user_id, other.user_id)  # users are 0, 1, 2 …
    assert small[3]["log"] == large[3]["log"] and large[2].num_users == files.USERS
    assert ids.dtype == np.int64 and ids[1:].min() == far
    # features in Int32 next to a log in Int64
    mixed = builder.open_or_prepare(files.write(tmp_path / "half", **half), tmp_path / "cache", CONFIG).report
    assert mixed["users_without_features"] == files.USERS and mixed["log"] == small[3]["log"]


def test_the_path_of_the_records_is_no_pattern(tmp_path):
    source = files.write(tmp_path / "log [a] 'b' é*", standard=standard())
    out = tmp_path / 'x[3] "q" é ?'
    assert builder.open_or_prepare(source, out, CONFIG).part("train").num_sessions > 0


def test_unused_rows_are_said_once(tmp_path, capfd):
    rows = standard().astype(object)
    rows.loc[[3, 4], "is_click"] = 2
    source = files.write(tmp_path / "source", standard=rows)
    (source / "data" / "user_features_pure.csv").open("a").write("x" + ",1" * 29 + "\n")
    builder.open_or_prepare(source, tmp_path / "cache", CONFIG)
    said = capfd.readouterr().err
    assert "2 of 300 rows of the standard log are not used: 2 bad_flag\n" in said
    assert "1 of 14 rows of the features of users are not used: unparsable\n" in said


def test_too_few_videos_are_no_fix_of_zero(tmp_path):
    videos = files.make_videos().assign(upload_dt=None, video_duration=None)
    source = files.write(tmp_path / "source", videos=videos, standard=standard())
    with pytest.raises(
        ValueError, match=r"no video is live on 20220429, the first day of a split: .* add video features"
    ):
        prepared(source, tmp_path / "work")
    two = files.make_videos().iloc[:2]
    source = files.write(tmp_path / "two", videos=two, standard=standard().assign(video_id=1, duration_ms=10_500))
    with pytest.raises(ValueError, match=r"2 videos are live on .*; set slate and candidates to at most 2"):
        prepared(source, tmp_path / "work2")


def test_the_docs_table_is_what_these_tests_show():
    tables = re.split(r"^## ", DOCS.read_text(), flags=re.M)

    def rows(title):
        return dict(
            re.findall(r"^\| (.+?) \| (.+?) \|$", next(t for t in tables if t.startswith(title)), flags=re.M)[1:]
        )

    said = {"used": "used", "": "no row", "duplicates": "once"}
    assert rows("Lines of a log") == {name: said.get(of, f"`{of}`") for name, (_, of) in LINES.items()}
    assert rows("Files") == {name: "read" if of == "read" else "refused" for name, (_, of) in FILES.items()}
    assert [*rows("Most rows of a log")] == [*UNITS] and [*rows("Features")] == [*FEATURES]
    assert len(DOCS.read_text().splitlines()) <= 150
