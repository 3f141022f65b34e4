"""Logs read for training: what each batch holds, and what each process has to read."""

import dataclasses
import types

import jax
import numpy as np
import pytest
from random_logs import SPEC, make_log

from mmrf_jax.data import records, sessions, stream

T, BATCH, SEED = 3, 8, [5, 0, False]


class Counted:
    """Blocks of a log in memory that remember which of them were read."""

    def __init__(self, log, size=7):
        cuts = np.arange(0, log.num_sessions, size)
        self._logs = [sessions.select_sessions(log, np.arange(c, min(c + size, log.num_sessions))) for c in cuts]
        self.sessions = np.array([part.num_sessions for part in self._logs], np.int32)
        self.asked = []

    def read(self, blocks):
        self.asked += [int(b) for b in blocks]
        return sessions.concatenate([self._logs[b] for b in blocks])


@pytest.fixture(scope="module")
def log():
    """301 sessions; a user each, so that a segment is known by its user and its first request's context."""
    log = make_log(3, 301)
    return dataclasses.replace(log, user_id=np.arange(301, dtype=np.int32))


def keep(part):
    """All sessions but every fifth of the log."""
    return part.number % 5 != 4


def open_part(log, share=(0, 1), size=7):
    blocks, seen = Counted(log, size), []
    part = stream.LogPart(blocks, 11, share, seen.append)
    number, parts = share
    slots = np.arange(BATCH)[BATCH * number // parts : BATCH * (number + 1) // parts]
    return blocks, part, seen, stream.BatchRows(part, slots, BATCH, T, keep(part), SEED)


def named(batch):
    """(user, first context) of each row: which segment it is."""
    return [(int(u), *map(float, c)) for u, c in zip(batch.user_id, batch.context[:, 0], strict=True)]


def test_a_pass_over_a_shard_has_each_of_its_segments_once(log):
    _, _, _, batches = open_part(log)
    index = sessions.segment_index(log, T)
    wanted = sessions.gather_segments(log, index[index[:, 0] % 5 != 4], T)
    assert batches.segments.sum() == len(wanted.user_id) and batches.segments.min() > 20
    rows = [batches.get(0, at) for at in range(batches.segments.max())]
    by_slot = [[named(batch)[slot] for batch in rows][: batches.segments[slot]] for slot in range(BATCH)]
    assert all(len(set(names)) == len(names) for names in by_slot)
    assert sorted(name for names in by_slot for name in names) == sorted(named(wanted))
    # They are cut as from a log in memory.
    place = {name: i for i, name in enumerate(named(wanted))}
    for batch in rows[:5]:
        same = jax.tree.map(lambda x, batch=batch: x[[place[name] for name in named(batch)]], wanted)
        jax.tree.map(np.testing.assert_array_equal, batch, same)


def test_every_pass_has_an_order_of_its_own(log):
    _, _, _, batches = open_part(log)
    passes = [[named(batches.get(epoch, at)) for at in range(20)] for epoch in (0, 1, 0)]
    assert passes[0] == passes[2] != passes[1]
    other = stream.BatchRows(open_part(log)[1], np.arange(BATCH), BATCH, T, keep(open_part(log)[1]), [5, 1, False])
    assert [named(other.get(0, at)) for at in range(20)] != passes[0]
    # Not that of the log, nor from block to block alone.
    users = np.array([name[0][0] for name in passes[0]])
    assert (np.diff(users) < 0).sum() > 4


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_batches_do_not_depend_on_who_reads_them(log, parts):
    whole = open_part(log)[3]
    each = [open_part(log, (number, parts))[3] for number in range(parts)]
    np.testing.assert_array_equal(np.concatenate([b.segments for b in each]), whole.segments)
    for epoch, at in ((0, 0), (0, 1), (0, 33), (3, 7)):
        joined = jax.tree.map(lambda *x: np.concatenate(x), *(b.get(epoch, at) for b in each))
        jax.tree.map(np.testing.assert_array_equal, joined, whole.get(epoch, at))


def test_a_process_reads_its_own_blocks_alone(log):
    """Blocks at the edge of two parts are read by both."""
    asked, shown = [], []
    for number in range(4):
        blocks, part, seen, batches = open_part(log, (number, 4))
        first = set(blocks.asked)
        for at in range(int(batches.segments.max())):
            batches.get(0, at)
        assert set(blocks.asked) == first  # what it was shown once is all that it ever needs
        asked.append(first)
        shown += [log.user_id for log in seen]
        assert len(part.number) in (75, 76)
    assert sum(map(len, asked)) <= len(Counted(log).sessions) + 3
    np.testing.assert_array_equal(np.sort(np.concatenate(shown)), log.user_id)


def test_it_goes_on_anywhere_and_reads_little_for_that(log):
    whole = open_part(log)[3]
    for at in range(40):
        batch = whole.get(2, at)
    blocks, _, _, batches = open_part(log)
    blocks.asked.clear()
    jax.tree.map(np.testing.assert_array_equal, batches.get(2, 39), batch)
    assert len(blocks.asked) == BATCH  # a block for each slot


def test_slots_do_not_change_blocks_all_at_once(log):
    blocks, _, _, batches = open_part(make_log(1, 3000, longest=1), size=30)
    read = []
    for at in range(150):
        blocks.asked.clear()
        batches.get(0, at)
        read.append(len(blocks.asked))
    assert read[0] == BATCH and max(read[1:]) <= 4 and sum(read) > 2 * BATCH


def test_a_log_smaller_than_a_batch(log):
    few = sessions.select_sessions(log, np.arange(5))
    blocks = Counted(few)
    part = stream.LogPart(blocks, 0, (0, 1), lambda _: None)
    batches = stream.BatchRows(part, np.arange(BATCH), BATCH, T, np.ones(5, bool), SEED)
    assert (batches.segments > 0).sum() == 5 and len(batches.segments) == BATCH
    with pytest.raises(ValueError, match="the log to train on has no sessions"):
        stream.LogPart(Counted(sessions.select_sessions(log, np.arange(0))), 0, (0, 1), lambda _: None)


def test_the_first_sessions_of_a_log(log):
    for number in (1, 7, 10, 301, 999):
        part = stream.Beginning(Counted(log), number)
        wanted = sessions.select_sessions(log, np.arange(min(number, 301)))
        assert part.sessions.sum() == wanted.num_sessions
        found = part.read(np.arange(len(part.sessions)))
        for field in dataclasses.fields(found):
            np.testing.assert_array_equal(getattr(found, field.name), getattr(wanted, field.name))
    part = stream.Beginning(Counted(log), 10)
    assert part.read([1, 0]).user_id.tolist() == [7, 8, 9, 0, 1, 2, 3, 4, 5, 6]


def test_blocks_of_a_written_log(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "SESSIONS_PER_FILE", 512)
    log = make_log(0, 1300)
    records.write_log(log, tmp_path / "log", SPEC)
    blocks = records.Blocks(tmp_path / "log", SPEC)
    assert blocks.sessions.tolist() == [256] * 5 + [20]
    found = blocks.read([5, 1, 3])
    wanted = sessions.select_sessions(log, np.r_[1280:1300, 256:512, 768:1024])
    for field in dataclasses.fields(found):
        np.testing.assert_array_equal(getattr(found, field.name), getattr(wanted, field.name))


def test_blocks_spread_over_a_log():
    def sizes(*numbers):
        return types.SimpleNamespace(sessions=np.array(numbers))

    assert stream.spread_blocks(sizes(256, 256, 20), 532).tolist() == [0, 1, 2]
    assert stream.spread_blocks(sizes(*[256] * 10), 1_280).tolist() == [0, 2, 4, 6, 8]
    assert stream.spread_blocks(sizes(*[256] * 10), 900).tolist() == [0, 3, 6]
    assert stream.spread_blocks(sizes(256, 256), 5).tolist() == [0]
    assert stream.spread_blocks(sizes(), 5).tolist() == []


def test_ahead_makes_one_more_than_is_used():
    made = []

    def make(at):
        made.append(at)
        if at == 5:
            raise ValueError("no batch 5")
        return 10 * at

    with stream.prefetch(make, 2, 5) as coming:
        assert list(coming) == [20, 30, 40]
    assert made == [2, 3, 4]
    with stream.prefetch(make, 3, 3) as coming:
        assert list(coming) == []
    made.clear()
    with stream.prefetch(make, 0, 9) as coming:
        assert next(coming) == 0
    assert made in ([0], [0, 1])
    with pytest.raises(ValueError, match="no batch 5"), stream.prefetch(make, 4, 9) as coming:
        list(coming)
