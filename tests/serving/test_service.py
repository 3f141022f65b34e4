"""The service without HTTP: sessions, feedback, what a crash leaves, artefacts that are swapped."""

import asyncio
import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import sqlite3
import threading
from pathlib import Path

import exporting
import numpy as np
import pytest
import tiny
from processes import HANG

from mmrf_jax.data.readers import feedback_log
from mmrf_jax.serving import artifact, service, traffic, users
from mmrf_jax.serving.service import Asked, Refused, Service, Settings
from mmrf_jax.signals import SHORT_VIDEO

pytestmark = pytest.mark.usefixtures("few_sizes")
S = len(SHORT_VIDEO)
IDS = exporting.VIDEO_IDS


@pytest.fixture
def settings(mmrf, tmp_path) -> Settings:
    link = tmp_path / "current"
    link.symlink_to(mmrf[2])
    return Settings(artifact=link, log=tmp_path / "log", max_candidates=12)


@contextlib.asynccontextmanager
async def running(settings: Settings):
    made = Service(settings)
    await made.start()
    try:
        yield made
    finally:
        await made.close()


def asked(user: int, seed: int = 0, number: int = 8, **fields) -> Asked:
    rng = np.random.default_rng([user, seed])
    candidates = IDS[rng.permutation(len(IDS))[:number]]
    return Asked(user, candidates, rng.normal(size=1).astype(np.float32), k=3, **fields)


def answers(slate: service.Slate, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    return slate.videos, tiny.make_feedback(np.random.default_rng(seed), (len(slate.videos),))


async def step(s: Service, user: int, seed: int, left: bool = False) -> service.Slate:
    slate = await s.rank(asked(user, seed))
    await s.feedback(f"{user}/{seed}", slate.request, *answers(slate, seed), left)
    return slate


def test_a_session_by_hand(settings):
    async def run():
        async with running(settings) as s:
            first = await s.rank(asked(5, profile=np.ones(3, np.float32)))
            assert (first.request, first.position, len(first.videos)) == ("5-0", 0, 3)
            best = first.scores["watch_time"]
            np.testing.assert_array_equal(first.positions, np.argsort(-best)[:3])
            assert await s.feedback("a", "5-0", first.videos, np.ones((3, S), np.float32), False)
            second = await s.rank(asked(5))  # the same candidates, seen with other eyes
            assert (second.request, second.position) == ("5-1", 1)
            assert np.abs(second.scores["watch_time"] - best).max() > 0.01
            assert await s.feedback("b", "5-1", second.videos[:1], np.zeros((1, S), np.float32), True)
            third = await s.rank(asked(5))
            assert (third.request, third.position) == ("5-2", 0)  # the user had left
            fourth = await s.rank(asked(5, new_session=True))
            assert (fourth.request, fourth.position) == ("5-3", 0)

    asyncio.run(run())
    records = [record for record, _ in feedback_log.scan(settings.log)]
    assert [r["kind"] for r in records] == ["rank", "feedback", "rank", "feedback", "rank", "rank"]
    assert [r["start"] for r in records if r["kind"] == "rank"] == [True, False, True, True]
    for record in records:
        if record["kind"] == "rank":  # the profile that was given once goes on
            np.testing.assert_array_equal(np.frombuffer(record["profile"], "<f4"), [1, 1, 1])
    context = [np.frombuffer(r["context"], "<f4")[-1] for r in records if r["kind"] == "rank"]
    np.testing.assert_allclose(context, np.log1p([0, 1, 0, 0]))


def test_a_pause_ends_a_session(settings):
    async def run():
        async with running(dataclasses.replace(settings, session_gap=0.05)) as s:
            assert (await step(s, 1, 0)).position == 0
            await asyncio.sleep(0.1)
            assert (await step(s, 1, 1)).position == 0

    asyncio.run(run())


YEAR = 365 * 86_400_000  # milliseconds


@pytest.mark.parametrize("ahead", ["rank", "feedback", "both"])
def test_the_wall_clock_is_not_monotonic(settings, monkeypatch, capfd, ahead):
    """A clock a year ahead for one request: the user's session ends when it is set back, and later ones as ever."""
    clock = [1_800_000_000_000]
    monkeypatch.setattr(service, "_now", lambda: clock[0])

    def seconds(number: float) -> None:
        clock[0] += int(1000 * number)

    async def run():
        async with running(settings) as s:
            for user in (1, 2):  # the second sees no wrong clock
                assert (await step(s, user, 0)).position == 0
            clock[0] += YEAR if ahead != "feedback" else 0
            slate = await s.rank(asked(1, 1))
            clock[0] += YEAR * ((ahead == "feedback") - (ahead == "rank"))
            await s.feedback("1/1", slate.request, *answers(slate, 1), False)
            clock[0] = 1_800_000_000_000
            places = []
            for pause in (5, 5, settings.session_gap + 5, 5, -(settings.session_gap - 5), 5):
                seconds(pause)
                places.append((await step(s, 1, len(places) + 2)).position)
            assert places == [0, 1, 0, 1, 2, 3]  # back by less than the gap is none
            clock[0] = 1_800_000_005_000
            assert (await step(s, 2, 1)).position == 1
            clock[0] += YEAR
            assert [(await step(s, user, 20)).position for user in (1, 2)] == [0, 0]
            clock[0] -= YEAR
            assert [(await step(s, user, 21)).position for user in (1, 2)] == [0, 0]

    asyncio.run(run())
    assert capfd.readouterr().err.count("behind the time of a user's last request") == 1
    times = [r["time"] for r, _ in feedback_log.scan(settings.log) if r["kind"] == "rank" and r["user"] == 1]
    assert times[-1] < 1_800_000_000_000 + YEAR  # a new session has the time that the clock says


def test_a_history_is_taken_of_new_users_only(settings):
    history = IDS[:4], tiny.make_feedback(np.random.default_rng(0), (4,))

    async def run():
        async with running(settings) as s:
            plain = await s.rank(asked(11))
            same = await s.rank(dataclasses.replace(asked(11), user=12))
            np.testing.assert_allclose(same.scores["watch_time"], plain.scores["watch_time"], rtol=1e-4)
            reported = await s.rank(dataclasses.replace(asked(11), user=13, history=history))
            assert np.abs(plain.scores["watch_time"] - reported.scores["watch_time"]).max() > 0.01
            again = await s.rank(dataclasses.replace(asked(11), history=history, new_session=True))
            np.testing.assert_allclose(again.scores["watch_time"], plain.scores["watch_time"], rtol=1e-5)

    asyncio.run(run())


def test_feedback_that_cannot_be_taken(settings):
    async def refused(s, status, *arguments):
        with pytest.raises(Refused) as error:
            await s.feedback(*arguments)
        assert error.value.status == status
        return error.value

    async def run():
        async with running(settings) as s:
            slate = await step(s, 1, 0)
            zero = np.zeros((1, S), np.float32)
            for request in (
                "1-1",
                "2-0",
                "x",
                "1-0-0",
                "-1-0",
                "1-99999999999999999999999999999999999999999",
                "²-0",
                "99999999999999999999-0",
                "01-0",
                "1-00",
            ):
                await refused(s, 404, "e", request, slate.videos[:1], zero, False)
            strange = IDS[~np.isin(IDS, slate.videos)][:1]
            error = await refused(s, 422, "e", "1-0", np.append(slate.videos[:1], strange), np.zeros((2, S)), False)
            assert (
                error.field == ("body", "videos", 1, "video") and f"video {strange[0]} was not shown" in error.message
            )
            assert not await s.feedback("1/0", "1-0", slate.videos[:1], zero + 1, True)  # an event that came before
            await step(s, 1, 1, left=True)
            await s.feedback("late", "1-0", slate.videos[:1], zero, False)  # of the same session
            await s.rank(asked(1))
            await refused(s, 410, "later", "1-0", slate.videos[:1], zero, False)
            for i in range(64):
                await s.feedback(f"many{i}", "1-2", np.zeros(0, np.int64), zero[:0], False)
            await refused(s, 409, "more", "1-2", np.zeros(0, np.int64), zero[:0], False)

    asyncio.run(run())
    counts: dict = {}
    for record, _ in feedback_log.scan(settings.log):
        if record["kind"] == "feedback":
            counts[record["event"]] = counts.get(record["event"], 0) + 1
    assert set(counts.values()) == {1} and len(counts) == 3 + 64


def test_unknown_candidates_are_said(settings):
    async def run():
        async with running(settings) as s:
            some = dataclasses.replace(asked(11), candidates=np.array([5, IDS[3], 6, IDS[9]]))
            slate = await s.rank(some)
            assert slate.unknown == [5, 6] and set(slate.videos.tolist()) == {IDS[3], IDS[9]}
            assert np.isnan(slate.scores["watch_time"]).tolist() == [True, False, True, False]
            alone = await s.rank(dataclasses.replace(some, user=12, candidates=IDS[[3, 9]]))
            np.testing.assert_allclose(slate.scores["click"][[1, 3]], alone.scores["click"], rtol=1e-5)
            with pytest.raises(Refused, match="knows none of the videos 5; describe them in items"):
                await s.rank(dataclasses.replace(some, user=3, candidates=np.array([5])))

    asyncio.run(run())
    assert len(list(feedback_log.scan(settings.log))) == 2  # nothing of what was refused


def random_events(rng, events: int):
    """(user, seed, kind) of random traffic: late and repeated feedback, sessions left, requests without any."""
    return [(int(rng.integers(6)), i, str(rng.choice(["step", "rank", "late", "leave"]))) for i in range(events)]


async def play(s: Service, plan, slates: dict) -> None:
    for user, seed, kind in plan:
        if kind == "late" and user in slates:
            slate = slates[user][int(seed % len(slates[user]))]
            with contextlib.suppress(Refused):
                await s.feedback(f"{user}/{seed}", slate.request, *answers(slate, seed), False)
        elif kind == "rank":
            slates.setdefault(user, []).append(await s.rank(asked(user, seed)))
        else:
            slates.setdefault(user, []).append(await step(s, user, seed, kind == "leave"))


def test_a_crash_changes_nothing(settings, tmp_path):
    """The folder as a killed process leaves it, with an old store or none: the same users, the same scores."""

    async def run():
        async with running(settings) as s:
            slates: dict = {}
            plan = random_events(np.random.default_rng(0), 120)
            await play(s, plan[:60], slates)
            await asyncio.sleep(1.2)  # the store is written
            await play(s, plan[60:], slates)
            shutil.copytree(settings.log, tmp_path / "crashed")
            shutil.copytree(settings.log, tmp_path / "lost", ignore=shutil.ignore_patterns("*.sqlite*"))
            return [await s.rank(asked(user, 999)) for user in range(6)]

    async def again(log: Path):
        async with running(dataclasses.replace(settings, log=log)) as s:
            return [await s.rank(asked(user, 999)) for user in range(6)]

    live = asyncio.run(run())
    for log in ("crashed", "lost"):
        for before, after in zip(live, asyncio.run(again(tmp_path / log)), strict=True):
            assert (before.request, before.position) == (after.request, after.position)
            for agent, scores in before.scores.items():
                np.testing.assert_allclose(scores, after.scores[agent], rtol=1e-4, atol=1e-4)


def test_requests_at_once_are_scored_together_and_alike(settings):
    async def run():
        async with running(settings) as s:
            before = dict(s.ranker.traces)
            few = range(10, 50)  # beyond those who have an embedding of their own
            alone = [await s.rank(asked(user)) for user in few]
            batches = s.metrics.registry.get_sample_value("mmrf_batch_size_count")
            together = await asyncio.gather(*(s.rank(dataclasses.replace(asked(u), user=100 + u)) for u in few))
            assert s.metrics.registry.get_sample_value("mmrf_batch_size_count") - batches <= 4
            for one, other in zip(alone, together, strict=True):
                np.testing.assert_allclose(one.scores["watch_time"], other.scores["watch_time"], rtol=1e-4, atol=1e-5)
            same = await asyncio.gather(*(s.rank(asked(17)) for _ in range(5)))  # of one user: one after another
            assert [slate.request for slate in same] == [f"17-{i}" for i in range(1, 6)]
            assert s.ranker.traces == before

    asyncio.run(run())


def test_a_request_that_is_given_up_leaves_nothing(settings):
    async def run():
        async with running(settings) as s:
            task = asyncio.create_task(s.rank(asked(1)))
            await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            assert (await s.rank(asked(1))).request == "1-0"

    asyncio.run(run())
    assert len(list(feedback_log.scan(settings.log))) == 1


def test_a_full_disk_refuses_and_loses_nothing(settings, monkeypatch):
    async def run():
        async with running(settings) as s:
            slate = await step(s, 1, 0)

            def full(*_):
                raise OSError(errno.ENOSPC, "No space left on device")

            monkeypatch.setattr(os, "write", full)
            for call in (s.rank(asked(1, 1)), s.feedback("x", slate.request, *answers(slate), False)):
                with pytest.raises(Refused, match="cannot be written: No space left") as error:
                    await call
                assert error.value.status == 503
            monkeypatch.undo()
            assert (await step(s, 1, 1)).request == "1-1"

    asyncio.run(run())
    assert len(list(feedback_log.scan(settings.log))) == 4


async def until(condition, said=lambda: "") -> None:
    for _ in range(int(HANG / 0.05)):
        if condition():
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"it never came: {said()}")


def point(link: Path, to: Path) -> None:
    new = link.with_name("new")
    new.symlink_to(to)
    os.replace(new, link)


@pytest.mark.slow
def test_artefacts_are_swapped_while_users_go_on(settings, other, tmp_path):
    bad = tmp_path / "bad"
    shutil.copytree(other, bad)
    (bad / "functions" / "score.bin").write_bytes(b"")
    narrow = tmp_path / "narrow"
    shutil.copytree(other, narrow)
    manifest = json.loads((narrow / artifact.MANIFEST).read_text())
    manifest["spec"]["profile"] = 99
    content = json.dumps(manifest)
    (narrow / artifact.MANIFEST).write_text(content)
    (narrow / "manifest.sha256").write_text(hashlib.sha256(content.encode()).hexdigest())

    async def run():
        async with running(settings) as s:
            first = s.ranker.id
            for folder, why in ((bad, "score.bin has 0 bytes"), (narrow, "another spec: profile=99")):
                point(settings.artifact, folder)
                await until(lambda why=why: why in (s.failed_swap or ""), lambda: (s.failed_swap, s._tasks))
                assert s.ranker.id == first and (await step(s, 1, 0 if folder is bad else 1)).artifact == first
            point(settings.artifact, other)
            served = []
            while not served or served[-1] == first:  # never a request that fails
                served.append((await step(s, 2, len(served))).artifact)
                assert len(served) < 5000
            assert set(served) == {first, s.ranker.id} and s.failed_swap is None
            return await s.rank(asked(2, 999))

    async def fresh():  # what the new artefact says of the same log without having seen the old one
        log = tmp_path / "copy"
        shutil.copytree(settings.log, log)
        lines = [r for r, _ in feedback_log.scan(log)]
        shutil.rmtree(log)
        with feedback_log.Writer(log, SHORT_VIDEO) as writer:
            for record in lines[:-1]:
                writer.append(record)
        async with running(dataclasses.replace(settings, log=log)) as s:
            return await s.rank(asked(2, 999))

    after, anew = asyncio.run(run()), asyncio.run(fresh())
    assert after.artifact == anew.artifact and after.request == anew.request
    np.testing.assert_allclose(after.scores["watch_time"], anew.scores["watch_time"], rtol=1e-3, atol=1e-3)


def test_an_artefact_that_is_still_on_its_way_is_tried_again(settings, other, tmp_path, monkeypatch):
    monkeypatch.setattr(traffic, "RETRY_SECONDS", 0.1)
    late = tmp_path / "late"
    late.mkdir()

    async def run():
        async with running(settings) as s:
            first = s.ranker.id
            (tmp_path / "round").symlink_to(tmp_path / "round")
            point(settings.artifact, tmp_path / "round")  # a link to itself
            await until(lambda: s.failed_swap is not None, lambda: s._tasks)
            assert s.ranker.id == first and s.trouble is None
            point(settings.artifact, late)
            await until(lambda: "no artefact" in (s.failed_swap or ""), lambda: s.failed_swap)
            shutil.copytree(other, late, dirs_exist_ok=True)
            await until(lambda: s.ranker.id != first, lambda: (s.failed_swap, s._tasks))
            assert s.failed_swap is None and s.trouble is None
            s._tasks[-1].cancel()
            await until(lambda: s.trouble is not None, lambda: s._tasks)
            assert s.trouble == "looking for artefacts has ended: stopped"

    asyncio.run(run())


def test_feedback_is_acknowledged_when_it_is_on_the_disk(settings, monkeypatch):
    async def run():
        async with running(settings) as s:
            slate = await s.rank(asked(1))
            reached, let = threading.Event(), threading.Event()
            real = os.fdatasync

            def slow(file):
                reached.set()
                assert let.wait(HANG)
                real(file)

            monkeypatch.setattr(os, "fdatasync", slow)
            reported = [
                asyncio.create_task(s.feedback(f"e{i}", slate.request, *answers(slate), False)) for i in range(3)
            ]
            again = asyncio.create_task(s.feedback("e0", slate.request, *answers(slate), False))
            while not reached.is_set():
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)
            assert not any(task.done() for task in [*reported, again])  # one that was sent twice waits too
            let.set()
            assert await asyncio.gather(*reported) == [True] * 3 and not await again

    asyncio.run(run())


def test_a_disk_that_fails_is_trouble(settings, monkeypatch):
    async def run():
        made = Service(settings)
        await made.start()
        slate = await step(made, 1, 0)
        assert made.trouble is None

        def failing(_):
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "fdatasync", failing)
        for _ in range(2):
            with pytest.raises(Refused, match="cannot be written") as error:
                await made.feedback("x", slate.request, *answers(slate), False)
            assert error.value.status == 503
        monkeypatch.undo()  # even where the disk says yes again
        with pytest.raises(Refused, match="cannot be written"):
            await made.feedback("x", slate.request, *answers(slate), False)
        assert "Input/output error" in made.trouble
        with pytest.raises(OSError, match="Input/output"):
            await made.close()

    asyncio.run(run())


def test_a_store_that_cannot_be_written_is_written_later(settings, monkeypatch):
    async def run():
        async with running(dataclasses.replace(settings, users_in_memory=2)) as s:
            real, failed = users.UserStore.write, []

            def full(self, *arguments, **kwargs):
                if len(failed) < 2:
                    failed.append(1)
                    raise sqlite3.OperationalError("database or disk is full")
                return real(self, *arguments, **kwargs)

            monkeypatch.setattr(users.UserStore, "write", full)
            for user in range(8):
                await step(s, user, 0)
            await until(lambda: s._store.in_memory <= 2)
            assert len(failed) == 2 and s.trouble is None
            assert s.metrics.registry.get_sample_value("mmrf_store_write_failures_total") == 2
            assert (await s.rank(asked(0, 1))).request == "0-1"

    asyncio.run(run())


def test_two_services_cannot_have_one_log(settings):
    async def run():
        async with running(settings):
            with pytest.raises(ValueError, match="is used by another process: process"):
                Service(settings)

    asyncio.run(run())
