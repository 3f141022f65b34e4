"""The store of users is what the log says, however the service before it ended."""

import itertools

import numpy as np
import pytest

from mmrf_jax.data.readers import feedback_log
from mmrf_jax.serving import users
from mmrf_jax.signals import SHORT_VIDEO

S, WATCH = len(SHORT_VIDEO), SHORT_VIDEO.index("watch_time")
HISTORY = 4


def some_records(rng, number: int, num_users: int = 5) -> list[feedback_log.Record]:
    """Requests and feedback of a few users in turns: sessions of any length, events twice, requests without any."""
    requests, shown, records = [0] * num_users, {}, []
    over = [True] * num_users
    for _ in range(number):
        user = int(rng.integers(num_users))
        if rng.random() < 0.5 or user not in shown:
            videos = rng.permutation(1000)[:6] + 10**12
            slate = rng.permutation(6)[: rng.integers(1, 4)]
            start = over[user] or bool(rng.random() < 0.1)
            records.append(
                {
                    "kind": "rank",
                    "request": feedback_log.request_id(user, requests[user]),
                    "user": user,
                    "number": requests[user],
                    "time": 1000 + len(records),
                    "start": start,
                    "history": None,
                    "profile": feedback_log.to_bytes(rng.normal(size=3), "<f4"),
                    "context": feedback_log.to_bytes(np.zeros(2), "<f4"),
                    "candidates": feedback_log.to_bytes(videos, "<i8"),
                    "scores": feedback_log.to_bytes(np.zeros(6), "<f4"),
                    "slate": feedback_log.to_bytes(slate, "<u2"),
                    "log_propensity": 0.0,
                    "artifact": "a",
                }
            )
            shown[user], over[user] = (requests[user], videos[slate]), False
            requests[user] += 1
        else:
            request, videos = shown[user]
            left = bool(rng.random() < 0.2)
            feedback = rng.random((len(videos), S))
            records.append(
                {
                    "kind": "feedback",
                    "event": str(rng.integers(40)),
                    "request": feedback_log.request_id(user, request),
                    "user": user,
                    "time": 1000 + len(records),
                    "videos": feedback_log.to_bytes(videos, "<i8"),
                    "feedback": feedback_log.to_bytes(feedback, "<f4"),
                    "left": left,
                }
            )
            over[user] = over[user] or left
    return records


def state(store: users.UserStore, num_users: int = 5) -> list[bytes]:
    return [users.pack(store.get(user)) for user in range(num_users)]


@pytest.fixture
def log(tmp_path):
    """A log, and the users as its records make them one after another."""
    records = some_records(np.random.default_rng(0), 200)
    with feedback_log.Writer(tmp_path / "log", SHORT_VIDEO) as writer:
        for record in records:
            writer.append(record)
    return tmp_path / "log", records


def by_hand(records) -> list[bytes]:
    known = [feedback_log.UserLog(SHORT_VIDEO) for _ in range(5)]
    for record in records:
        known[record["user"]].apply(record, HISTORY)
    return [users.pack(k) for k in known]


def test_a_store_is_made_of_the_log(log, tmp_path):
    folder, records = log
    store = users.UserStore(tmp_path / "s", folder, SHORT_VIDEO, HISTORY)
    assert state(store) == by_hand(records)
    assert store.position == feedback_log.end(folder)


def test_users_may_change_while_they_are_written(log, tmp_path):
    """Rows that say more than the position next to them: what a start takes twice changes nothing."""
    _, records = log
    with feedback_log.Writer(tmp_path / "live", SHORT_VIDEO) as writer:
        store = users.UserStore(tmp_path / "s", tmp_path / "live", SHORT_VIDEO, HISTORY)
        for record in records[:100]:
            writer.append(record)
            store.apply(record)
        position, rows = writer.position, []
        later = iter(records[100:])
        for some in store.packed():
            rows += some
            for record in itertools.islice(later, 7):
                writer.append(record)
                store.apply(record)
        for record in later:
            writer.append(record)
            store.apply(record)
        rows.append((0, users.pack(store.get(0))))  # and one that is far ahead
        store.write(rows, position)
        store.written(position)
        live = state(store)
        store._writer.close()
        store._db.close()
    assert state(users.UserStore(tmp_path / "s", tmp_path / "live", SHORT_VIDEO, HISTORY)) == live == by_hand(records)


def test_a_pass_that_is_given_up_loses_nobody(log, tmp_path):
    folder, records = log
    store = users.UserStore(tmp_path / "s", tmp_path / "empty", SHORT_VIDEO, HISTORY, in_memory=1)
    for record in records:
        store.apply(record)
    next(store.packed())
    store.close(feedback_log.end(folder))
    again = users.UserStore(tmp_path / "s", folder, SHORT_VIDEO, HISTORY)
    assert again.position == feedback_log.end(folder) and again.in_memory == 0  # nothing was taken from the log
    assert state(again) == by_hand(records)


def test_users_come_back_from_bytes(log):
    _, records = log
    for packed in by_hand(records):
        assert users.pack(users.unpack(packed, SHORT_VIDEO)) == packed


@pytest.mark.parametrize("flushed", [0, 1, 77, 200])
@pytest.mark.parametrize("in_memory", [2, 100])
def test_it_goes_on_from_wherever_it_was_written(log, tmp_path, flushed, in_memory):
    """A killed process has not closed its store; what the log has behind it is taken."""
    folder, records = log
    positions = [feedback_log.START, *(position for _, position in feedback_log.scan(folder))]
    first = tmp_path / "first"
    with feedback_log.Writer(first, SHORT_VIDEO) as writer:
        store = users.UserStore(tmp_path / "s", first, SHORT_VIDEO, HISTORY, in_memory)
        for record in records[:flushed]:
            writer.append(record)
            store.apply(record)
        store.flush(writer.position)
        assert writer.position == positions[flushed]
        for record in records[flushed:]:  # in the log, and not in the store when the process dies
            writer.append(record)
            store.apply(record)
        live = state(store)
        store._writer.close()
        store._db.close()
    again = users.UserStore(tmp_path / "s", first, SHORT_VIDEO, HISTORY, in_memory)
    assert state(again) == live == by_hand(records)


@pytest.mark.parametrize("how", ["garbage", "cut", "another log", "another history", "gone"])
def test_a_store_that_cannot_be_used_is_made_again(log, tmp_path, how, capfd):
    folder, records = log
    path = tmp_path / "s"
    store = users.UserStore(path, folder, SHORT_VIDEO, HISTORY)
    store.close(feedback_log.end(folder))
    history = HISTORY
    if how == "garbage":
        path.write_bytes(b"no database at all" * 100)
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-5000])
    elif how == "another log":
        with feedback_log.Writer(tmp_path / "other", SHORT_VIDEO) as writer:
            for record in records[:10]:
                writer.append(record)
        folder = tmp_path / "other"
        records = records[:10]
    elif how == "another history":
        history = 2
    else:
        path.unlink()
    store = users.UserStore(path, folder, SHORT_VIDEO, history)
    known = [feedback_log.UserLog(SHORT_VIDEO) for _ in range(5)]
    for record in records:
        known[record["user"]].apply(record, history)
    assert state(store) == [users.pack(k) for k in known]
    assert ("it is made again" in capfd.readouterr().err) == (how != "gone")


def test_memory_is_bounded(log, tmp_path):
    folder, records = log
    store = users.UserStore(tmp_path / "s", folder, SHORT_VIDEO, HISTORY, in_memory=2)
    for _ in range(3):
        state(store)
        assert store.in_memory <= 3
    assert state(store) == by_hand(records)


def test_exposures_are_the_history_and_what_was_answered():
    known = feedback_log.UserLog(SHORT_VIDEO)
    for record in some_records(np.random.default_rng(3), 400, num_users=1):
        before = known.exposures()
        known.apply(record, HISTORY)
        videos, feedback = known.exposures()
        assert (
            len(videos)
            == len(feedback)
            == len(known.history_videos) + sum(len(s.videos) for s in known.shown if s.answered)
        )
        if record["kind"] == "rank" and record["start"]:
            np.testing.assert_array_equal(videos, before[0][-HISTORY:])
            np.testing.assert_array_equal(feedback, before[1][-HISTORY:])
