"""Batched scoring with an artefact: requests are padded to few array sizes, so that nothing is recompiled."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from mmrf_jax.data.readers import feedback_log
from mmrf_jax.ope import propensity
from mmrf_jax.serving import artifact

BATCHES = (1, 4, 16, 64)  # batches of requests are padded to one of these sizes
_LONG = 64  # exposures written at a time, if they are more than a slate
_BLOCK = 65_536  # videos encoded at a time


@dataclasses.dataclass
class Job:
    """A request to score: its user's memory so far, later exposures, and the candidates.

    Attributes:
      user_id: id of the user.
      memory: (outer [L, F, D], weight [L]), or None for a user without memory.
      videos: [e] item rows of exposures since then, oldest first.
      feedback: [e, S] their feedback.
      candidates: [c] item rows, all different.
    """

    user_id: int
    profile: np.ndarray  # [Du]
    context: np.ndarray  # [Dx]
    candidates: np.ndarray
    memory: tuple[np.ndarray, np.ndarray] | None
    videos: np.ndarray
    feedback: np.ndarray


class Ranker:
    """Scores jobs with an artefact. `warm` compiles its functions for every size that it uses."""

    def __init__(self, loaded: artifact.Artifact, max_candidates: int):
        """Prepare the functions of an artefact and encode all items.

        Args:
          loaded: the artefact.
          max_candidates: of one request. Requests are padded to it or, if they have no more, to the C of training.
        """
        self.id, self.spec, self.manifest = loaded.id, loaded.spec, loaded.manifest
        self.agents: list[str] = loaded.manifest["agents"]
        #: Number of compilations of each function; constant once the ranker is warm.
        self.traces = {"encode": 0, "observe": 0, "score": 0}
        self.widths = tuple(sorted({min(loaded.spec.candidates, max_candidates), max_candidates}))
        self._lengths = (self.spec.slate, max(_LONG, self.spec.slate))
        catalogue = loaded.arrays["catalogue"]
        self._duration = catalogue["duration"]
        self.catalogue = catalogue
        #: Item rows [n] for the platform's ids [n]; −1 for an unknown video.
        self.rows_of = feedback_log.rows_by_id(catalogue["video_id"])
        self._users = loaded.arrays.get("users")
        self._user_rows = None if self._users is None else feedback_log.rows_by_id(self._users["user_id"])
        self._functions = {name: self._traced(name, loaded.functions[name]) for name in self.traces}
        self._weights = jax.device_put(artifact.nested(loaded.arrays["policy"]))
        self._encodings = self._encode(catalogue)

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
        video = {name: catalogue[name] for name in ("author", "tag", "embedding_id", "features")}
        total = len(catalogue["author"])
        size = min(total, _BLOCK)
        starts = [min(start, total - size) for start in range(0, total, size)]  # the last block overlaps the one before
        parts = [
            self._functions["encode"](self._weights, {name: x[start : start + size] for name, x in video.items()})
            for start in starts
        ]
        parts[-1] = parts[-1][(len(starts) - 1) * size - starts[-1] :]
        return jax.block_until_ready(jax.numpy.concatenate(parts))

    def warm(self) -> None:
        """Compile every size that a service uses."""
        nothing = np.zeros(0, np.int64)
        for batch in BATCHES:
            for width in self.widths:
                job = Job(
                    0,
                    np.zeros(self.spec.profile, np.float32),
                    np.zeros(self.spec.context, np.float32),
                    np.arange(width) % self.spec.num_videos,
                    None,
                    nothing,
                    np.zeros((0, len(self.spec.signals)), np.float32),
                )
                self._score([job] * batch, [self._nothing()] * batch)
            for length in self._lengths:
                videos, feedback = np.zeros(length, np.int64), np.zeros((length, len(self.spec.signals)), np.float32)
                self._observe([self._nothing()] * batch, [videos] * batch, [feedback] * batch, length)

    def run(self, jobs: Sequence[Job]) -> list[tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]]:
        """Return for each job the scores [N, c] of its candidates, and the user's memory before the request."""
        done = []
        for start in range(0, len(jobs), BATCHES[-1]):
            part = jobs[start : start + BATCHES[-1]]
            memories = self._remember(part)
            for job, memory, scores in zip(part, memories, self._score(part, memories), strict=True):
                done.append((scores[:, : len(job.candidates)], memory))
        return done

    def _nothing(self) -> tuple[np.ndarray, np.ndarray]:
        shape = tuple(self.manifest["memory"])
        return np.zeros(shape, np.float32), np.zeros(shape[:1], np.float32)

    def _remember(self, jobs: Sequence[Job]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the memories with the new exposures of each job written to them."""
        memories = [self._nothing() if job.memory is None else job.memory for job in jobs]
        at = [0] * len(jobs)
        while left := [i for i, job in enumerate(jobs) if at[i] < len(job.videos)]:
            longest = max(len(jobs[i].videos) - at[i] for i in left)
            length = self._lengths[longest > self._lengths[0]]
            cuts = [slice(at[i], at[i] + length) for i in left]
            videos = [jobs[i].videos[cut] for i, cut in zip(left, cuts, strict=True)]
            feedback = [jobs[i].feedback[cut] for i, cut in zip(left, cuts, strict=True)]
            after = self._observe([memories[i] for i in left], videos, feedback, length)
            for i, memory in zip(left, after, strict=True):
                memories[i] = memory
                at[i] += length
        return memories

    def _observe(self, memories, videos, feedback, length: int) -> list[tuple[np.ndarray, np.ndarray]]:
        n = BATCHES[bisect.bisect_left(BATCHES, len(memories))]
        shown = {
            "videos": np.zeros((n, length), np.int32),
            "feedback": np.zeros((n, length, len(self.spec.signals)), np.float32),
            "mask": np.zeros((n, length), bool),
        }
        for i, (v, f) in enumerate(zip(videos, feedback, strict=True)):
            shown["videos"][i, : len(v)], shown["feedback"][i, : len(v)], shown["mask"][i, : len(v)] = v, f, True
        shown["duration"] = self._duration[shown["videos"]]
        memory = self._functions["observe"](self._weights, self._stacked(memories, n), self._encodings, shown)
        outer, weight = np.asarray(memory["outer"]), np.asarray(memory["weight"])
        return [(outer[i].copy(), weight[i].copy()) for i in range(len(memories))]  # a view would hold the whole batch

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
        return {"outer": np.stack([m[0] for m in padded]), "weight": np.stack([m[1] for m in padded])}


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
