"""Conversion of a service's feedback log to training sessions."""

from __future__ import annotations

import datetime
import os
from typing import Any, NamedTuple

import numpy as np

from mmrf_jax.data import sessions
from mmrf_jax.data.readers import feedback_log
from mmrf_jax.data.readers.feedback_log import OpenRequest, Record, RowsOf, UserLog
from mmrf_jax.data.session_log import InputSpec, Sessions
from mmrf_jax.io import storage
from mmrf_jax.io.progress import Counter
from mmrf_jax.signals import Signals


def read(
    folder: str | os.PathLike,
    spec: InputSpec,
    rows_of: RowsOf,
    progress: Counter = lambda name, total: lambda done: None,
    user_ids: np.ndarray | None = None,
) -> tuple[Sessions, Record]:
    """Read a whole feedback log as training sessions.

    A request without any feedback is left out, since the user's reaction is unknown; the rest of the session becomes
    another session. If a request has more candidates than the spec's C, the slate is kept and C − k others are drawn;
    a request with fewer is left out. A session that the user has not left counts as truncated.

    Args:
      folder: folder of the log.
      spec: spec of the resulting sessions.
      rows_of: platform's video ids [n] -> item rows [n], −1 if unknown; unknown candidates are left out, and so
        is a request that showed one.
      progress: (name, bytes) -> a callback that receives the bytes read so far.
      user_ids: [U] platform's ids of the users in the table, whose `user_id` is then the row, and that of others the
        numbers from U; None if ids are numbers in int32.

    Returns:
      The log, ordered by user and time, and a report: {"records", "requests", "feedback", "sessions", "left_out": {why:
      requests}}.

    Raises:
      ValueError: for a log of another version or spec, a damaged one, or one without a usable session.
    """
    folder = storage.path(folder)
    feedback_log.check(folder, spec.signals)
    cut, number = _Cutter(spec, rows_of, user_ids), 0
    before = np.cumsum([0, *(path.stat().st_size for path in feedback_log.segments(folder))])
    report = progress("read", max(int(before[-1]), 1))
    for number, (record, position) in enumerate(feedback_log.scan(folder), 1):
        cut.take(record)
        if number % 256 == 0:
            report(int(before[position.segment]) + position.offset)
    report(max(int(before[-1]), 1))
    log = cut.log()
    if not log.num_sessions:
        raise ValueError(f"{folder} has no session to learn from ({cut.report}); collect feedback first")
    return log, cut.report | {"records": number, "sessions": log.num_sessions}


def new_items(folder: str | os.PathLike) -> list[Record]:
    """Return the items that were described to a service, in the order of the log, each once."""
    found: dict[int | str, Record] = {}
    for record, _ in feedback_log.scan(folder):
        if record["kind"] == "item":
            found.setdefault(record["id"], record)
    return list(found.values())


def by_arm(folder: str | os.PathLike, signals: Signals) -> dict[str, dict[str, np.ndarray]]:
    """Return the totals of the users in each arm of a service's traffic split, for `mmrf_jax.abtest.compare`.

    Args:
      folder: folder of the feedback log.
      signals: of the log.

    Returns:
      {arm: {"requests": [n], signal: [n] sums over the n users who were assigned to the arm}}; without a split there is
      the arm "a" alone. A user whom a changed split has moved counts in both arms.

    Raises:
      ValueError: for a damaged log, or one of other signals.
    """
    feedback_log.check(storage.path(folder), signals)
    users: dict[int | str, UserLog] = {}
    arm_of: dict[int | str, str] = {}
    totals: dict[str, dict[int | str, np.ndarray]] = {}

    def close(user: int | str) -> None:
        for shown in users[user].shown:
            totals[arm_of[user]][user][1:] += shown.feedback.sum(axis=0)

    for record, _ in feedback_log.scan(folder):
        if record["kind"] == "item":
            continue
        user = record["user"]
        known = users.setdefault(user, UserLog(signals))
        if record["kind"] == "rank":
            arm = record.get("arm", "a")
            if user in arm_of and (record["start"] or arm != arm_of[user]):
                close(user)
                known.shown = []
            arm_of[user] = arm
            of_user = totals.setdefault(arm, {}).setdefault(user, np.zeros(1 + len(signals)))
            of_user[0] += 1
        known.apply(record, 0)
    for user in users:
        close(user)
    tables = {arm: np.stack(list(of_users.values())) for arm, of_users in sorted(totals.items())}
    return {arm: dict(zip(("requests", *signals.names), table.T, strict=True)) for arm, table in tables.items()}


class _Asked(NamedTuple):
    """A request of the session being read."""

    context: np.ndarray
    candidates: np.ndarray  # [C] item rows
    slate: np.ndarray  # [K] positions, −1 where fewer were shown
    scores: np.ndarray
    log_propensity: float
    shown: OpenRequest


class _Cutter:
    """Assembles the records of all users into sessions."""

    def __init__(self, spec: InputSpec, rows_of: RowsOf, user_ids: np.ndarray | None):
        self._spec, self._rows_of = spec, rows_of
        self._numbers = None if user_ids is None else {user: row for row, user in enumerate(user_ids.tolist())}
        self._users: dict[int | str, UserLog] = {}
        self._open: dict[int | str, tuple[Record, UserLog, list[_Asked | None]]] = {}
        self._sessions: list[dict[str, Any]] = []
        self._requests: list[_Asked] = []
        self.report: Record = {
            "requests": 0,
            "feedback": 0,
            "left_out": {"unanswered": 0, "few_candidates": 0, "unknown_videos": 0},
        }

    def take(self, record: Record) -> None:
        if record["kind"] == "item":
            return
        user = record["user"]
        known = self._users.setdefault(user, UserLog(self._spec.signals))
        if record["kind"] == "feedback":
            self.report["feedback"] += known.apply(record, self._spec.history) is not None
            return
        if record["start"]:
            self._close(user)
        known.apply(record, self._spec.history)
        self.report["requests"] += 1
        if record["start"] or user not in self._open:
            self._open[user] = (record, known, [])
        self._open[user][2].append(self._asked(record, known.shown[-1]))

    def _asked(self, record: Record, shown: OpenRequest) -> _Asked | None:
        s = self._spec
        context = np.frombuffer(record["context"], "<f4")
        for name, found, wanted in (
            ("profile", len(record["profile"]) // 4, s.profile),
            ("context", len(context), s.context),
        ):
            if found != wanted:
                raise ValueError(
                    f"request {record['request']} has {name} of {found} numbers, the config's spec has {wanted}; use "
                    "the config of the run that was served"
                )
        slate = np.frombuffer(record["slate"], "<u2").astype(np.int64)
        rows = np.asarray(self._rows_of(feedback_log.unpack_ids(record["candidates"])), np.int64)
        scores = np.frombuffer(record["scores"], "<f4")
        if (rows[slate] < 0).any() or len(slate) > s.slate:
            self.report["left_out"]["unknown_videos"] += 1
            return None
        others = np.setdiff1d(np.flatnonzero(rows >= 0), slate)
        if len(slate) + len(others) < s.candidates:
            self.report["left_out"]["few_candidates"] += 1
            return None
        if len(slate) + len(others) > s.candidates:
            rng = np.random.default_rng([feedback_log.user_number(record["user"]), record["number"]])
            others = rng.choice(others, s.candidates - len(slate), replace=False)
        kept = np.sort(np.concatenate([slate, others]))
        positions = np.full(s.slate, -1, np.int32)
        positions[: len(slate)] = np.searchsorted(kept, slate)
        return _Asked(context, rows[kept].astype(np.int32), positions, scores[kept], record["log_propensity"], shown)

    def _close(self, user: int | str) -> None:
        """Close a user's session: emit one session of the log for each run of consecutive usable requests."""
        if user not in self._open:
            return
        record, known, asked = self._open.pop(user)
        videos, feedback = known.history_videos, known.history_feedback
        stretch: list[_Asked] = []
        for i, request in enumerate([*asked, None]):
            shown = known.shown[i] if i < len(asked) else None
            if request is not None and request.shown.answered:
                if not stretch:
                    before = videos, feedback
                stretch.append(request)
            else:
                if request is not None:
                    self.report["left_out"]["unanswered"] += 1
                if stretch:
                    self._emit(user, record, before, stretch, known.over and shown is None)
                    stretch = []
            if shown is not None and shown.answered:
                videos = feedback_log.joined([videos, shown.videos])
                feedback = np.concatenate([feedback, shown.feedback])

    def _emit(self, user, record, before, stretch, terminated) -> None:
        s = self._spec
        videos, feedback = before
        rows = np.asarray(self._rows_of(videos), np.int64)
        rows, feedback = rows[rows >= 0][-s.history :], feedback[rows >= 0][-s.history :]
        empty = s.history - len(rows)
        day = datetime.datetime.fromtimestamp(record["time"] / 1000, datetime.UTC)
        self._sessions.append(
            {
                "user_id": self._number(user),
                "date": int(day.strftime("%Y%m%d")),
                "time": record["time"],
                "profile": np.frombuffer(record["profile"], "<f4"),
                "history_videos": np.concatenate([np.zeros(empty, np.int32), rows]),
                "history_feedback": np.concatenate([np.zeros((empty, len(s.signals)), np.float32), feedback]),
                "history_mask": np.arange(s.history) >= empty,
                "terminated": terminated,
                "requests": len(stretch),
            }
        )
        self._requests += stretch

    def _number(self, user: int | str) -> int:
        if self._numbers is None:
            return int(user)
        return self._numbers.setdefault(user, len(self._numbers))

    def log(self) -> Sessions:
        """Return all sessions; sessions still open are truncated."""
        for user in list(self._open):
            self._close(user)
        s, made = self._spec, self._sessions

        def column(name, shape, dtype):
            return np.array([x[name] for x in made], dtype).reshape(len(made), *shape)

        lengths = column("requests", (), np.int64)
        slots = [np.zeros((s.slate, len(s.signals)), np.float32) for _ in self._requests]
        for slot, request in zip(slots, self._requests, strict=True):
            slot[: len(request.shown.feedback)] = request.shown.feedback

        def rows(values, shape, dtype):
            return np.array(values, dtype).reshape(len(self._requests), *shape)

        terminated = column("terminated", (), bool)
        log = Sessions(
            user_id=column("user_id", (), np.int32),
            date=column("date", (), np.int32),
            profile=column("profile", (s.profile,), np.float32),
            history_videos=column("history_videos", (s.history,), np.int32),
            history_feedback=column("history_feedback", (s.history, len(s.signals)), np.float32),
            history_mask=column("history_mask", (s.history,), bool),
            terminated=terminated,
            truncated=~terminated,
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            context=rows([r.context for r in self._requests], (s.context,), np.float32),
            candidates=rows([r.candidates for r in self._requests], (s.candidates,), np.int32),
            slate=rows([r.slate for r in self._requests], (s.slate,), np.int32),
            feedback=rows(slots, (s.slate, len(s.signals)), np.float32),
            log_propensity=rows([r.log_propensity for r in self._requests], (), np.float32),
            scores=rows([r.scores for r in self._requests], (s.candidates,), np.float32),
        )
        order = np.lexsort((column("time", (), np.int64), log.user_id))
        return sessions.select_sessions(log, order)
