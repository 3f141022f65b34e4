"""The log of a service: what was appended comes back, what a crash cut short is dropped, and sessions are cut right."""

import dataclasses
import errno
import os
import struct
import zlib

import msgpack
import numpy as np
import pytest

from mmrf_jax.data.readers import feedback_log, feedback_sessions
from mmrf_jax.data.session_log import InputSpec
from mmrf_jax.io import appending, files
from mmrf_jax.signals import SHORT_VIDEO

S = len(SHORT_VIDEO)
CLICK, WATCH = SHORT_VIDEO.index("click"), SHORT_VIDEO.index("watch_time")
SPEC = InputSpec(
    num_videos=50,
    num_authors=2,
    num_tags=2,
    num_users=0,
    item_features=1,
    profile=2,
    context=2,
    candidates=5,
    slate=2,
    history=3,
)
NOON = 1_651_492_800_000  # 2022-05-02 12:00 UTC


def rows_of(videos):
    """The platform calls row i of the catalogue 100 + i."""
    return np.where((videos >= 100) & (videos < 150), videos - 100, -1)


def ranked(user, number, candidates, slate, start=False, history=None, time=NOON, **changes) -> feedback_log.Record:
    given = None
    if history is not None:
        feedback = np.zeros((len(history), S), np.float32)
        feedback[:, WATCH] = np.arange(len(history)) + 1.0
        given = {
            "videos": feedback_log.to_bytes(np.array(history), "<i8"),
            "feedback": feedback_log.to_bytes(feedback, "<f4"),
        }
    return {
        "kind": "rank",
        "request": feedback_log.request_id(user, number),
        "user": user,
        "number": number,
        "time": time,
        "start": start,
        "history": given,
        "profile": feedback_log.to_bytes(np.array([user, 1.0]), "<f4"),
        "context": feedback_log.to_bytes(np.array([0.5, np.log1p(number)]), "<f4"),
        "candidates": feedback_log.to_bytes(np.array(candidates), "<i8"),
        "scores": feedback_log.to_bytes(np.arange(len(candidates)), "<f4"),
        "slate": feedback_log.to_bytes(np.array(slate), "<u2"),
        "log_propensity": -1.5,
        "artifact": "a",
    } | changes


def feedback_record(user, number, videos, event=None, left=False, click=0.0, seconds=0.0) -> feedback_log.Record:
    feedback = np.zeros((len(videos), S), np.float32)
    feedback[:, CLICK], feedback[:, WATCH] = click, seconds
    return {
        "kind": "feedback",
        "event": event or f"{user}-{number}",
        "request": feedback_log.request_id(user, number),
        "user": user,
        "time": NOON,
        "videos": feedback_log.to_bytes(np.array(videos), "<i8"),
        "feedback": feedback_log.to_bytes(feedback, "<f4"),
        "left": left,
    }


def write(folder, records, **kwargs):
    with feedback_log.Writer(folder, SHORT_VIDEO, **kwargs) as writer:
        for record in records:
            writer.append(record)


def some(number=5) -> list[feedback_log.Record]:
    return [ranked(7, i, range(100, 106), [0, 1], start=i == 0) for i in range(number)]


def test_what_was_appended_comes_back_over_segments(tmp_path):
    records = some(9)
    write(tmp_path / "log", records[:4], segment_bytes=400)
    write(tmp_path / "log", records[4:], segment_bytes=400)  # a second start goes on
    found = list(feedback_log.scan(tmp_path / "log"))
    assert [record for record, _ in found] == records
    assert len(list((tmp_path / "log").glob("feedback-*.log"))) > 2
    for i, (_, position) in enumerate(found):
        assert [record for record, _ in feedback_log.scan(tmp_path / "log", position)] == records[i + 1 :]
    assert found[-1][1] == feedback_log.end(tmp_path / "log")


def test_appending_waits_for_no_disk_and_one_sync_is_for_all(tmp_path, monkeypatch):
    synced = []
    real = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda file: (synced.append(os.fstat(file).st_ino), real(file)))
    with feedback_log.Writer(tmp_path / "log", SHORT_VIDEO, segment_bytes=400) as writer:
        for record in some(9):
            writer.append(record)
        paths = feedback_log.segments(tmp_path / "log")
        assert len(paths) > 3 and not synced
        writer.sync()
        assert synced == [path.stat().st_ino for path in paths]  # none is on the disk before what precedes it
        synced.clear()
        writer.sync()
        assert synced == [paths[-1].stat().st_ino]  # the others are on the disk


def test_frames_are_as_the_format_says(tmp_path):
    """Read by nothing but the description."""
    write(tmp_path / "log", some(2))
    data = (tmp_path / "log" / "feedback-000000.log").read_bytes()
    length, crc_of_length, crc = struct.unpack("<III", data[:12])
    assert zlib.crc32(data[:4]) == crc_of_length and zlib.crc32(data[12 : 12 + length]) == crc
    record = msgpack.unpackb(data[12 : 12 + length])
    assert record["request"] == "7-0" and record["start"] is True
    assert np.frombuffer(record["candidates"], "<i8").tolist() == list(range(100, 106))


@pytest.mark.parametrize("cut", [1, 11, 12, 13, 60])
def test_a_frame_cut_short_at_the_end_is_dropped(tmp_path, cut):
    records = some(3)
    write(tmp_path / "log", records)
    path = tmp_path / "log" / "feedback-000000.log"
    ends = [position.offset for _, position in feedback_log.scan(tmp_path / "log")]
    with path.open("r+b") as file:
        file.truncate(ends[1] + cut)
    assert [record for record, _ in feedback_log.scan(tmp_path / "log")] == records[:2]
    write(tmp_path / "log", [records[2]])  # appends where the whole frames end
    assert [record for record, _ in feedback_log.scan(tmp_path / "log")] == records


@pytest.mark.parametrize("frame", [0, 1, 2])
@pytest.mark.parametrize("byte", [*range(12), 30])
def test_one_wrong_bit_is_an_error_and_nothing_is_cut_off(tmp_path, frame, byte):
    write(tmp_path / "log", some(3))
    path = tmp_path / "log" / "feedback-000000.log"
    starts = [0, *(position.offset for _, position in feedback_log.scan(tmp_path / "log"))]
    content = bytearray(path.read_bytes())
    content[starts[frame] + byte] ^= 1 << (byte % 8)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"feedback-000000.log is damaged at byte {starts[frame]} of \d+; restore it"):
        list(feedback_log.scan(tmp_path / "log"))
    with pytest.raises(ValueError, match=f"is damaged at byte {starts[frame]}"):
        feedback_log.Writer(tmp_path / "log", SHORT_VIDEO)
    assert path.read_bytes() == content


def test_zeros_at_the_end_are_dropped_and_said(tmp_path, capfd):
    records = some(3)
    write(tmp_path / "log", records[:2])
    path = tmp_path / "log" / "feedback-000000.log"
    path.write_bytes(path.read_bytes() + bytes(4096))
    assert [record for record, _ in feedback_log.scan(tmp_path / "log")] == records[:2]
    write(tmp_path / "log", records[2:])
    assert [record for record, _ in feedback_log.scan(tmp_path / "log")] == records
    assert "the last 4096 bytes are of a record that was cut short" in capfd.readouterr().err


def test_after_a_sync_that_failed_nothing_is_taken(tmp_path, monkeypatch):
    """The system may say nothing of what it dropped when it is asked again."""
    records = some(3)
    writer = feedback_log.Writer(tmp_path / "log", SHORT_VIDEO)
    writer.append(records[0])
    real, calls = os.fdatasync, []

    def once(file):
        calls.append(file)
        if len(calls) == 1:
            raise OSError(errno.EIO, "Input/output error")
        real(file)

    monkeypatch.setattr(os, "fdatasync", once)
    for call in (writer.sync, writer.sync, lambda: writer.append(records[1])):
        with pytest.raises(OSError, match="Input/output"):
            call()
    assert writer.failed is not None
    with pytest.raises(OSError, match="Input/output"):
        writer.close()
    write(tmp_path / "log", records[1:])  # a new start takes what is there
    assert [record for record, _ in feedback_log.scan(tmp_path / "log")] == records


def test_a_segment_that_cannot_be_begun_costs_nothing(tmp_path, monkeypatch):
    records = some(6)
    with feedback_log.Writer(tmp_path / "log", SHORT_VIDEO, segment_bytes=400) as writer:
        writer.append(records[0])
        writer.append(records[1])
        real = os.open

        def full(path, *arguments):
            if str(path).endswith("feedback-000001.log"):
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(path, *arguments)

        monkeypatch.setattr(os, "open", full)
        with pytest.raises(OSError, match="No space"):
            writer.append(records[2])
        monkeypatch.undo()
        for record in records[2:]:
            writer.append(record)
    assert [record for record, _ in feedback_log.scan(tmp_path / "log")] == records


def test_a_log_is_of_one_kind_of_requests(tmp_path):
    with feedback_log.Writer(tmp_path / "log", SHORT_VIDEO, {"profile": 20, "history": 30}):
        pass
    feedback_log.Writer(tmp_path / "log", SHORT_VIDEO, {"profile": 20, "history": 30}).close()
    with pytest.raises(ValueError, match="is the log of rankers with profile=20, not 4; name another log"):
        feedback_log.Writer(tmp_path / "log", SHORT_VIDEO, {"profile": 4, "history": 30})


def test_one_writer_at_a_time_and_one_version(tmp_path):
    with (
        feedback_log.Writer(tmp_path / "log", SHORT_VIDEO),
        pytest.raises(ValueError, match="is used by another process: process"),
    ):
        feedback_log.Writer(tmp_path / "log", SHORT_VIDEO)
    manifest = tmp_path / "log" / feedback_log.MANIFEST
    manifest.write_text(manifest.read_text().replace('"version": 1', '"version": 9'))
    with pytest.raises(ValueError, match="use the code that wrote the log"):
        feedback_log.Writer(tmp_path / "log", SHORT_VIDEO)


def test_a_missing_segment_is_an_error(tmp_path):
    write(tmp_path / "log", some(9), segment_bytes=400)
    (tmp_path / "log" / "feedback-000001.log").unlink()
    with pytest.raises(ValueError, match=r"feedback-000001.log is missing"):
        list(feedback_log.scan(tmp_path / "log"))


def test_a_full_disk_leaves_nothing_of_a_record(tmp_path, monkeypatch):
    records = some(2)
    with feedback_log.Writer(tmp_path / "log", SHORT_VIDEO) as writer:
        writer.append(records[0])
        real = os.write

        def full(file, data):
            if len(data) > 20:
                return real(file, data[:20])
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "write", lambda file, data: full(file, data) if len(data) > 200 else full(file, b""))
        with pytest.raises(OSError, match="No space"):
            writer.append(records[1])
        monkeypatch.undo()
        writer.append(records[1])
    assert [record for record, _ in feedback_log.scan(tmp_path / "log")] == records


def test_sessions_by_hand(tmp_path):
    """Two users: one leaves, and comes back with what was shown; one is cut."""
    history = [110, 111, 112, 113]
    records = [
        ranked(1, 0, [100, 101, 102, 103, 104], [3, 0], start=True, history=history),
        ranked(2, 0, [105, 106, 107, 108, 109], [4], start=True),
        feedback_record(1, 0, [103, 100], seconds=9.0),
        feedback_record(2, 0, [109], click=1.0, seconds=3.0),
        feedback_record(2, 0, [109], event="later", seconds=8.0),  # the same video again: the larger of both
        feedback_record(2, 0, [109], event="later", seconds=80.0),  # the same event again: nothing
        ranked(1, 1, [120, 121, 122, 123, 124], [0, 1]),
        feedback_record(1, 1, [120], click=1.0, left=True),
        ranked(1, 2, [130, 131, 132, 133, 134], [2, 4], start=True, time=NOON + 86_400_000),
        feedback_record(1, 2, [132], click=1.0),
    ]
    write(tmp_path / "log", records)
    log, report = feedback_sessions.read(tmp_path / "log", SPEC, rows_of)
    log.validate(SPEC)
    assert log.user_id.tolist() == [1, 1, 2]
    assert log.date.tolist() == [20220502, 20220503, 20220502]
    assert np.diff(log.offsets).tolist() == [2, 1, 1]
    assert log.terminated.tolist() == [True, False, False] and log.truncated.tolist() == [False, True, True]
    np.testing.assert_array_equal(log.history_videos[0], [11, 12, 13])  # the last H it arrived with
    np.testing.assert_array_equal(log.history_feedback[0][:, WATCH], [2, 3, 4])
    np.testing.assert_array_equal(log.history_videos[1], [0, 20, 21])  # those shown last
    assert log.history_mask.tolist() == [[True] * 3, [True] * 3, [False] * 3]
    np.testing.assert_array_equal(log.candidates[0], [0, 1, 2, 3, 4])
    np.testing.assert_array_equal(log.slate, [[3, 0], [0, 1], [2, 4], [4, -1]])
    np.testing.assert_array_equal(log.feedback[0][:, WATCH], [9, 9])
    np.testing.assert_array_equal(log.feedback[1][:, CLICK], [1, 0])
    assert log.feedback[3, 0, CLICK] == 1 and log.feedback[3, 0, WATCH] == 8
    np.testing.assert_array_equal(log.scores[0], [0, 1, 2, 3, 4])
    np.testing.assert_allclose(log.log_propensity, -1.5)
    np.testing.assert_allclose(log.profile[:, 0], [1, 1, 2])
    assert report["requests"] == 4 and report["feedback"] == 5 and report["records"] == 10
    assert sum(report["left_out"].values()) == 0


def test_history_of_the_second_session_is_what_was_answered(tmp_path):
    log = [
        ranked(1, 0, range(100, 105), [0, 1], start=True),
        feedback_record(1, 0, [100, 101], seconds=5.0),
        ranked(1, 1, range(110, 115), [0, 1]),  # shown, and never answered
        ranked(1, 2, range(120, 125), [2, 3], start=True),
        feedback_record(1, 2, [122]),
    ]
    write(tmp_path / "log", log)
    found, report = feedback_sessions.read(tmp_path / "log", SPEC, rows_of)
    assert found.num_sessions == 2 and report["left_out"]["unanswered"] == 1
    assert found.terminated.tolist() == [False, False]
    np.testing.assert_array_equal(found.history_videos[1], [0, 0, 1])
    assert found.history_mask[1].tolist() == [False, True, True]


def test_an_unanswered_request_cuts_the_session(tmp_path):
    log = [ranked(1, i, range(100 + 5 * i, 105 + 5 * i), [0, 1], start=i == 0) for i in range(4)]
    log += [feedback_record(1, i, [100 + 5 * i], seconds=1.0 + i) for i in (0, 1, 3)]
    write(tmp_path / "log", log)
    found, report = feedback_sessions.read(tmp_path / "log", SPEC, rows_of)
    assert np.diff(found.offsets).tolist() == [2, 1] and report["left_out"]["unanswered"] == 1
    np.testing.assert_array_equal(found.candidates[2], np.arange(15, 20))
    np.testing.assert_array_equal(found.history_videos[1], [1, 5, 6])  # the last three answered
    assert not found.terminated.any()


def test_candidates_are_cut_to_size(tmp_path):
    wide = [900, *range(100, 120)]  # one that the catalogue does not have, 20 that it has
    log = [
        ranked(1, 0, wide, [3, 20], start=True),
        feedback_record(1, 0, [102]),
        ranked(1, 1, wide, [0, 1]),  # showed the unknown one
        feedback_record(1, 1, [100]),
        ranked(1, 2, range(100, 104), [0, 1]),  # too few
        feedback_record(1, 2, [100]),
    ]
    write(tmp_path / "log", log)
    found, report = feedback_sessions.read(tmp_path / "log", SPEC, rows_of)
    assert report["left_out"] == {"unanswered": 0, "few_candidates": 1, "unknown_videos": 1}
    assert found.num_requests == 1
    candidates, slate = found.candidates[0], found.slate[0]
    assert candidates[slate].tolist() == [2, 19] and len(set(candidates.tolist())) == 5
    np.testing.assert_array_equal(found.scores[0], candidates + 1.0)  # each kept its own score
    again, _ = feedback_sessions.read(tmp_path / "log", SPEC, rows_of)
    np.testing.assert_array_equal(again.candidates, found.candidates)


def test_logs_of_another_make_are_refused(tmp_path):
    write(tmp_path / "log", [ranked(1, 0, range(100, 105), [0], start=True), feedback_record(1, 0, [100])])
    with pytest.raises(ValueError, match="request 1-0 has profile of 2 numbers, the config's spec has 4"):
        feedback_sessions.read(tmp_path / "log", dataclasses.replace(SPEC, profile=4), rows_of)
    write(tmp_path / "empty", [ranked(1, 0, range(100, 105), [0], start=True)])
    with pytest.raises(ValueError, match="has no session to learn from"):
        feedback_sessions.read(tmp_path / "empty", SPEC, rows_of)


def test_a_log_in_object_storage_holds_what_was_synced(monkeypatch, tmp_path):
    """What was not is lost with the process, and nothing else; full segments are those of many parts, too."""
    monkeypatch.setattr(appending, "PARTS", 2)
    folder = files.user_path(f"memory://bucket/{tmp_path.name}/log", "--log")
    records = [ranked(1, number, [101, 102], [0], start=number == 0) for number in range(6)]
    writer = feedback_log.Writer(folder, SHORT_VIDEO)
    for record in records[:5]:
        writer.append(record)
        writer.sync()
    assert [record["number"] for record, _ in feedback_log.scan(folder)] == [0, 1, 2, 3, 4]
    assert [path.name for path in feedback_log.segments(folder)] == [f"feedback-{n:06d}.log" for n in range(3)]
    assert feedback_log.end(folder) == writer.position
    with pytest.raises(ValueError, match="used by another process"):
        feedback_log.Writer(folder, SHORT_VIDEO)
    writer.append(records[5])
    writer._lock.close()  # the process is killed before it syncs
    with feedback_log.Writer(folder, SHORT_VIDEO) as again:
        again.append(records[5])
    assert [record["number"] for record, _ in feedback_log.scan(folder)] == [0, 1, 2, 3, 4, 5]
