"""Batched scoring with an artefact: requests are padded to few array sizes, so that nothing is recompiled."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mmrf_jax.data.readers import feedback_log
from mmrf_jax.ope import propensity
from mmrf_jax.serving import artifact, new_items

BATCHES = (1, 4, 16, 64)  # batches of requests are padded to one of these sizes
NEW_ITEMS = 16  # new items encoded at a time
_LONG = 64  # exposures written at a time, if they are of more than one request
_BLOCK = 65_536  # videos encoded at a time
_VIDEO = ("author", "tag", "embedding_id", "features")


#: What an artefact carries of a user, by name; its user encoder decides what (`models.user_encoders`).
Carry = dict[str, np.ndarray]


class Seen(NamedTuple):
    """An answered request of a user, or K exposures of a history."""

    videos: np.ndarray  # [k ≤ K] item rows
    feedback: np.ndarray  # [k, S]
    context: np.ndarray | None  # [Dx]; None where it is unknown, as of a history's


@dataclasses.dataclass
class Job:
    """A request to score: its user's memory so far, later requests, and the candidates.

    Attributes:
      user_id: id of the user.
      memory: what the artefact carries of the user, or None for a user without memory.
      seen: requests since then, oldest first.
      candidates: [c] item rows, all different.
    """

    user_id: int
    profile: np.ndarray  # [Du]
    context: np.ndarray  # [Dx]
    candidates: np.ndarray
    memory: Carry | None
    seen: Sequence[Seen]


class Ranker:
    """Scores jobs with an artefact. `warm` compiles its functions for every size that it uses."""

    def __init__(self, loaded: artifact.Artifact, max_candidates: int, spare: int = 0):
        """Prepare the functions of an artefact and encode all items.

        Args:
          loaded: the artefact.
          max_candidates: of one request. Requests are padded to it or, if they have no more, to the C of training.
          spare: item rows for items that the artefact does not have, see `add`.
        """
        self.id, self.spec, self.manifest = loaded.id, loaded.spec, loaded.manifest
        self.agents: list[str] = loaded.manifest["agents"]
        #: Number of compilations of each function; constant once the ranker is warm.
        self.traces = {"encode": 0, "observe": 0, "score": 0}
        self.widths = tuple(sorted({min(loaded.spec.candidates, max_candidates), max_candidates}))
        self._lengths = (1, -(-max(_LONG, self.spec.slate) // self.spec.slate))
        catalogue = loaded.arrays["catalogue"]
        self._spare = spare
        self._duration = np.append(catalogue["duration"], np.zeros(spare, np.float32))
        #: Ids, authors, tags and durations of the item rows in use.
        self.catalogue = {name: catalogue[name] for name in ("video_id", "author", "tag", "duration")}
        if catalogue["video_id"].dtype.kind != "U":
            self.catalogue["video_id"] = catalogue["video_id"].astype(np.int64)
        self._rows_of = feedback_log.rows_by_id(catalogue["video_id"])
        self._new_rows: dict[int | str, int] = {}
        self._describer = new_items.Describer(loaded)
        #: Encoders of features by name, {"item", "profile", "context": encoders}, where the artefact knows them.
        self.names = loaded.manifest.get("names") or {}
        #: How the platform calls authors and tags, {"author", "tag": "string" or "integer"}; {} for row numbers.
        self.vocabularies = {name: _kind(ids) for name, ids in (loaded.arrays.get("vocabularies") or {}).items()}
        self._users = loaded.arrays.get("users")
        self._user_rows = None if self._users is None else feedback_log.rows_by_id(self._users["user_id"])
        #: How the platform calls videos and users: "string" or "integer" ids; users without a table by "number".
        self.video_ids = _kind(catalogue["video_id"])
        self.user_ids = "number" if self._users is None else _kind(self._users["user_id"])
        self._functions = {name: self._traced(name, loaded.functions[name]) for name in self.traces}
        self._place = jax.jit(lambda encodings, rows, values: encodings.at[rows].set(values, mode="drop"))
        self._weights = jax.device_put(artifact.nested(loaded.arrays["policy"]))
        self._encodings = self._encode(catalogue)

    @property
    def room(self) -> int:
        """The number of items that can still be added."""
        return self._spare - len(self._new_rows)

    def rows_of(self, videos: np.ndarray) -> np.ndarray:
        """Return item rows [n] of the platform's ids [n]; −1 for an unknown video."""
        rows = self._rows_of(videos)
        if self._new_rows and (rows < 0).any():
            new = [self._new_rows.get(video, -1) for video in videos[rows < 0].tolist()]
            rows = rows.copy()
            rows[rows < 0] = new
        return rows

    def seen(self, videos: np.ndarray, feedback: np.ndarray, context: np.ndarray | None = None) -> list[Seen]:
        """Return exposures, ids [e] and feedback [e, S], as requests of at most K; unknown videos are left out.

        As in `models.user_encoders.in_requests`, all but the first request have K.
        """
        rows = self.rows_of(videos)
        rows, feedback, k = rows[rows >= 0], feedback[rows >= 0], self.spec.slate
        ends = range(len(rows), 0, -k)
        return [Seen(rows[max(e - k, 0) : e], feedback[max(e - k, 0) : e], context) for e in ends][::-1]

    def check(self, item: Mapping[str, Any]) -> None:
        """Check that an item can be added.

        Raises:
          new_items.Undescribed: naming field and value.
        """
        self._describer.describe(item)

    def add(self, items: Sequence[Mapping[str, Any]]) -> list[int | str]:
        """Take new items; they are ranked by their features and the rows of unknown ids. Nothing is compiled for it.

        Known items do not change. One thread adds at a time.

        Args:
          items: {"id", "features", "author", "tag", "duration"}, see `new_items`.

        Returns:
          The ids for which there is no room.
        """
        known = self.rows_of(feedback_log.ids_of([item["id"] for item in items])) >= 0
        new = [item for item, there in zip(items, known, strict=True) if not there]
        wanted, left = new[: self.room], new[self.room :]
        for start in range(0, len(wanted), NEW_ITEMS):
            self._add(wanted[start : start + NEW_ITEMS])
        return [item["id"] for item in left]

    def _add(self, items: Sequence[Mapping[str, Any]]) -> None:
        described = [self._describer.describe(item) for item in items]
        first = len(self.catalogue["author"])
        padded = [*described, *[described[0]] * (NEW_ITEMS - len(items))]
        video = {name: np.stack([one[name] for one in padded]) for name in _VIDEO}
        rows = np.full(NEW_ITEMS, len(self._duration), np.int32)  # padding is written nowhere
        rows[: len(items)] = np.arange(first, first + len(items))
        encoded = self._functions["encode"](self._weights, video)
        self._encodings = jax.block_until_ready(self._place(self._encodings, rows, encoded))
        ids = feedback_log.ids_of([item["id"] for item in items])
        new = {name: [one[name] for one in described] for name in ("author", "tag", "duration")} | {"video_id": ids}
        self.catalogue = {
            name: np.append(known, np.asarray(new[name], known.dtype if name != "video_id" else None))
            for name, known in self.catalogue.items()
        }
        self._duration = np.append(self.catalogue["duration"], np.zeros(self.room - len(items), np.float32))
        # Last, since requests look here first.
        self._new_rows = self._new_rows | dict(zip(ids.tolist(), rows.tolist(), strict=False))

    def user_of(self, user: int | str | None) -> tuple[int, np.ndarray | None]:
        """Return the number and the profile [Du] of a user; without a table of users, ids are the numbers."""
        if self._users is None or self._user_rows is None:
            return int(user or 0), None
        row = 0 if user is None else max(int(self._user_rows(np.asarray([user]))[0]), 0)
        return row, self._users["profile"][row]

    def _traced(self, name: str, function: Any):
        def call(*arguments):
            self.traces[name] += 1
            return function.call(*arguments)

        return jax.jit(call)

    def _encode(self, catalogue: artifact.Arrays) -> jax.Array:
        """Return encodings [V, D] of all items, computed in blocks of one size."""
        video = {name: catalogue[name] for name in _VIDEO}
        total = len(catalogue["author"])
        size = min(total, _BLOCK)
        starts = [min(start, total - size) for start in range(0, total, size)]  # the last block overlaps the one before
        parts = [
            self._functions["encode"](self._weights, {name: x[start : start + size] for name, x in video.items()})
            for start in starts
        ]
        parts[-1] = parts[-1][(len(starts) - 1) * size - starts[-1] :]
        spare = [jax.numpy.zeros((self._spare, *parts[0].shape[1:]), parts[0].dtype)] if self._spare else []
        return jax.block_until_ready(jax.numpy.concatenate([*parts, *spare]))

    def warm(self) -> None:
        """Compile every size that a service uses."""
        if self._spare:
            unknown = {name: np.stack([self._describer.unknown[name]] * NEW_ITEMS) for name in _VIDEO}
            encoded = self._functions["encode"](self._weights, unknown)
            self._place(self._encodings, np.full(NEW_ITEMS, len(self._duration), np.int32), encoded)
        nothing = Seen(np.zeros(0, np.int64), np.zeros((0, len(self.spec.signals)), np.float32), None)
        for batch in BATCHES:
            for width in self.widths:
                job = Job(
                    0,
                    np.zeros(self.spec.profile, np.float32),
                    np.zeros(self.spec.context, np.float32),
                    np.arange(width) % self.spec.num_videos,
                    None,
                    (),
                )
                self._score([job] * batch, [self._nothing()] * batch)
            for length in self._lengths:
                self._observe([self._nothing()] * batch, [[nothing]] * batch, length)

    def run(self, jobs: Sequence[Job]) -> list[tuple[np.ndarray, Carry]]:
        """Return for each job the scores [N, c] of its candidates, and the user's memory before the request."""
        done = []
        for start in range(0, len(jobs), BATCHES[-1]):
            part = jobs[start : start + BATCHES[-1]]
            memories = self._remember(part)
            for job, memory, scores in zip(part, memories, self._score(part, memories), strict=True):
                done.append((scores[:, : len(job.candidates)], memory))
        return done

    def _nothing(self) -> Carry:
        return {name: np.zeros(shape, np.float32) for name, shape in self.manifest["carry"].items()}

    def _remember(self, jobs: Sequence[Job]) -> list[Carry]:
        """Return the memories with the new requests of each job written to them."""
        memories = [self._nothing() if job.memory is None else job.memory for job in jobs]
        at = [0] * len(jobs)
        while left := [i for i, job in enumerate(jobs) if at[i] < len(job.seen)]:
            longest = max(len(jobs[i].seen) - at[i] for i in left)
            length = self._lengths[longest > self._lengths[0]]
            seen = [jobs[i].seen[at[i] : at[i] + length] for i in left]
            after = self._observe([memories[i] for i in left], seen, length)
            for i, memory in zip(left, after, strict=True):
                memories[i] = memory
                at[i] += length
        return memories

    def _observe(self, memories: Sequence[Carry], seen: Sequence[Sequence[Seen]], length: int) -> list[Carry]:
        """Return the memories after at most `length` requests of each user."""
        n, k = BATCHES[bisect.bisect_left(BATCHES, len(memories))], self.spec.slate
        shown = {
            "videos": np.zeros((n, length, k), np.int32),
            "feedback": np.zeros((n, length, k, len(self.spec.signals)), np.float32),
            "mask": np.zeros((n, length, k), bool),
            "context": np.zeros((n, length, self.spec.context), np.float32),
        }
        for i, requests in enumerate(seen):
            for j, (videos, feedback, context) in enumerate(requests):
                at = i, j, slice(len(videos))
                shown["videos"][at], shown["feedback"][at], shown["mask"][at] = videos, feedback, True
                if context is not None:
                    shown["context"][i, j] = context
        shown["duration"] = self._duration[shown["videos"]]
        memory = self._functions["observe"](self._weights, self._stacked(memories, n), self._encodings, shown)
        memory = {name: np.asarray(x) for name, x in memory.items()}
        # copies, since a view would hold the whole batch
        return [{name: x[i].copy() for name, x in memory.items()} for i in range(len(memories))]

    def _score(self, jobs: Sequence[Job], memories) -> np.ndarray:
        """Return scores [B, N, width] of jobs; some columns are padding."""
        n = BATCHES[bisect.bisect_left(BATCHES, len(jobs))]
        width = self.widths[bisect.bisect_left(self.widths, max(len(job.candidates) for job in jobs))]
        request = {
            "user_id": np.zeros(n, np.int32),
            "profile": np.zeros((n, self.spec.profile), np.float32),
            "context": np.zeros((n, self.spec.context), np.float32),
            "candidates": np.zeros((n, width), np.int32),
        }
        there = np.zeros((n, width), bool)
        for i, job in enumerate(jobs):
            there[i, : len(job.candidates)] = True
            request["user_id"][i], request["profile"][i], request["context"][i] = job.user_id, job.profile, job.context
            request["candidates"][i, : len(job.candidates)] = job.candidates
        scores = self._functions["score"](self._weights, self._stacked(memories, n), self._encodings, request, there)
        return np.asarray(scores)[: len(jobs)]

    def _stacked(self, memories, n: int) -> dict[str, np.ndarray]:
        padded = [*memories, *[self._nothing()] * (n - len(memories))]
        return {name: np.stack([memory[name] for memory in padded]) for name in padded[0]}


def _kind(ids: np.ndarray) -> str:
    return "string" if ids.dtype.kind == "U" else "integer"


def choose(scores: np.ndarray, k: int, temperature: float, rng: np.random.Generator):
    """Choose a slate by scores [c] of one request.

    Args:
      scores: [c].
      k: number of videos.
      temperature: 0 takes the k best; above 0 samples Plackett–Luce on scores standardised within the request, divided
        by it (off-policy estimates use 1).
      rng: source of randomness.

    Returns:
      Positions [k] in order, logits [c] float32 of the sample, and the log-probability of the slate, 0 if it is
      deterministic.
    """
    logits = (propensity.standardised(scores) / (temperature or 1.0)).astype(np.float32)
    noisy = logits if temperature == 0.0 else logits + rng.gumbel(size=len(logits))
    k = min(k, len(scores))
    best = np.argpartition(-noisy, k - 1)[:k] if k < len(noisy) else np.arange(k)
    slate = best[np.lexsort((best, -noisy[best]))]
    if temperature == 0.0:
        return slate, logits, 0.0
    return slate, logits, float(propensity.log_prob(logits[None], slate[None]).sum())
