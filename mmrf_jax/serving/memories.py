"""What artefacts computed of users' sessions so far, so that a request scores only what came since."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import numpy as np

from mmrf_jax.data.readers import feedback_log
from mmrf_jax.data.readers.feedback_log import UserLog
from mmrf_jax.serving.ranker import Ranker


@dataclasses.dataclass
class Memory:
    """A user's memory up to a request of a session, computed by one artefact."""

    artifact: str
    first: int  # number of the session's first request
    upto: int  # requests from this number on are not included
    value: tuple[np.ndarray, np.ndarray]


class Memories:
    """Memories by user; the most recent ones are held."""

    def __init__(self, limit: int):
        self._limit = limit
        self._by_user: collections.OrderedDict[int | str, Memory] = collections.OrderedDict()

    def since(self, user: int | str, known: UserLog, serving: Ranker, start: bool, given: Any):
        """Return a user's memory, and the item rows [e] and feedback [e, S] of exposures not in it.

        Args:
          user: id of the user.
          known: the user's state.
          serving: the artefact that ranks.
          start: whether a session begins.
          given: the history of a new user, or None.
        """
        memory = self._by_user.get(user)
        if start:
            value, (videos, feedback) = None, known.exposures() if given is None else given
            last = max(len(videos) - serving.spec.history, 0)
            videos, feedback = videos[last:], feedback[last:]
        elif memory is None or (memory.artifact, memory.first) != (serving.id, known.shown[0].number):
            value, (videos, feedback) = None, known.exposures()
        else:
            answered = [s for s in known.shown[memory.upto - memory.first :] if s.answered]
            value, videos = memory.value, feedback_log.joined([s.videos for s in answered])
            none = np.zeros((0, len(serving.spec.signals)), np.float32)
            feedback = np.concatenate([none, *(s.feedback for s in answered)])
        rows = serving.rows_of(videos)
        return value, rows[rows >= 0], feedback[rows >= 0]

    def hold(self, user: int | str, memory: Memory) -> None:
        self._by_user[user] = memory
        self._by_user.move_to_end(user)
        while len(self._by_user) > self._limit:
            self._by_user.popitem(last=False)

    def answered(self, user: int | str, first: int, number: int) -> None:
        """Drop a user's memory if it was computed without the feedback that request `number` now has."""
        memory = self._by_user.get(user)
        if memory is not None and memory.first == first and number < memory.upto:
            del self._by_user[user]
