"""Session logs on disk: what is read is what was written, and nothing half-written is taken for a log."""

import dataclasses
import json
import sys

import numpy as np
import pytest

from mmrf_jax.data import records
from mmrf_jax.data.session_log import InputSpec, Sessions


def assert_same(a: Sessions, b: Sessions):
    for field in dataclasses.fields(Sessions):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if x is None or y is None:
            assert x is y, field.name
        else:
            assert x.dtype == y.dtype, field.name
            np.testing.assert_array_equal(x, y, err_msg=field.name)


@pytest.mark.parametrize("scores", [True, False])
def test_round_trip(tmp_path, make_log, spec, scores):
    log = make_log(0, 700, scores)  # three records, the last one not full
    records.write_log(log, tmp_path / "log", spec)
    read, found = records.read_log(tmp_path / "log", spec)
    assert found == spec
    assert_same(read, log)
    manifest = json.loads((tmp_path / "log" / records.MANIFEST).read_text())
    assert manifest["sessions"] == 700 and manifest["requests"] == log.num_requests
    assert manifest["exposures"] == (log.slate >= 0).sum()
    assert [p.name for p in tmp_path.iterdir()] == ["log"]


def test_several_files_and_an_empty_log(tmp_path, make_log, spec, monkeypatch):
    monkeypatch.setattr(records, "SESSIONS_PER_FILE", 300)
    log = make_log(1, 700)
    records.write_log(log, tmp_path / "log", spec)
    assert len(list((tmp_path / "log").glob("*.array_record"))) == 3
    assert_same(records.read_log(tmp_path / "log")[0], log)
    records.write_log(make_log(1, 0, scores=False), tmp_path / "empty", spec)
    empty, _ = records.read_log(tmp_path / "empty")
    assert empty.num_sessions == 0 and empty.candidates.shape == (0, spec.candidates)


def test_a_failed_write_leaves_nothing(tmp_path, make_log, spec, monkeypatch):
    def fails(*_):
        raise RuntimeError("disk on fire")

    monkeypatch.setattr(records, "pack_sessions", fails)
    with pytest.raises(RuntimeError, match="disk on fire"):
        records.write_log(make_log(0, 5), tmp_path / "log", spec)
    assert not list(tmp_path.iterdir())


def test_errors_say_what_and_how_to_fix(tmp_path, make_log, spec):
    log = make_log(2, 300)
    records.write_log(log, tmp_path / "log", spec)
    with pytest.raises(FileExistsError, match="remove it or"):
        records.write_log(log, tmp_path / "log", spec)
    with pytest.raises(FileNotFoundError, match="a folder that collect wrote"):
        records.read_log(tmp_path)
    with pytest.raises(ValueError, match="candidates=10, 12 is asked for"):
        records.read_log(tmp_path / "log", dataclasses.replace(spec, candidates=12))
    with pytest.raises(ValueError, match="'profile'"):
        records.write_log(log, tmp_path / "other", dataclasses.replace(spec, profile=7))
    unshown = dataclasses.replace(log, slate=np.where(np.arange(log.num_requests)[:, None] == 3, -1, log.slate))
    with pytest.raises(ValueError, match=r"1 of .* exposed no video"):
        records.write_log(unshown, tmp_path / "other", spec)

    path = next((tmp_path / "log").glob("*.array_record"))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged"):
        records.read_log(tmp_path / "log")
    path.unlink()
    with pytest.raises(FileNotFoundError, match="is missing though"):
        records.read_log(tmp_path / "log")


def test_a_block_of_another_spec_or_version_is_refused(make_log, spec):
    block = records.pack_sessions(make_log(0, 4), spec)
    with pytest.raises(ValueError, match="spec"):
        records.unpack_sessions([block], dataclasses.replace(spec, history=6))
    with pytest.raises(ValueError, match="spec"):
        records.unpack_sessions([block + b"x"], spec)
    with pytest.raises(ValueError, match="version 7"):
        records.unpack_sessions([block[:4] + (7).to_bytes(4, "little") + block[8:]], spec)
    with pytest.raises(ValueError, match="1 of 2 session blocks hold scores"):
        records.unpack_sessions([block, records.pack_sessions(make_log(0, 4, scores=False), spec)], spec)


def lines_run(fn) -> int:
    """How many lines of Python a call runs."""
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        fn()
    finally:
        sys.settrace(before)
    return count


def test_reading_has_no_loop_over_requests(tmp_path, make_log):
    """A million exposures are read in a second: NumPy does all that is done for each request."""
    full = InputSpec(
        num_videos=200,
        num_authors=5,
        num_tags=4,
        num_users=0,
        item_features=3,
        profile=16,
        context=20,
        candidates=100,
        slate=6,
        history=32,
    )
    log = make_log(3, 4096, spec=full, longest=16)
    records.write_log(log, tmp_path / "log", full)
    lines = lines_run(lambda: records.read_log(tmp_path / "log", full))
    assert 100 < lines < log.num_requests / 2, (lines, log.num_requests)
