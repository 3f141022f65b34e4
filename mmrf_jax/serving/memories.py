"""What artefacts computed of users' sessions so far, so that a request scores only what came since."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

from mmrf_jax.data.readers.feedback_log import UserLog
from mmrf_jax.serving.ranker import Carry, Ranker, Seen


@dataclasses.dataclass
class Memory:
    """A user's memory up to a request of a session, computed by one artefact."""

    artifact: str
    first: int  # number of the session's first request
    upto: int  # requests from this number on are not included
    value: Carry


class Memories:
    """Memories by user; the most recent ones are held."""

    def __init__(self, limit: int):
        self._limit = limit
        self._by_user: collections.OrderedDict[int | str, Memory] = collections.OrderedDict()

    def since(
        self, user: int | str, known: UserLog, serving: Ranker, start: bool, given: Any
    ) -> tuple[Carry | None, list[Seen]]:
        """Return a user's memory, and the answered requests not in it, oldest first.

        Args:
          user: id of the user.
          known: the user's state.
          serving: the artefact that ranks.
          start: whether a session begins.
          given: the history of a new user, or None.
        """
        memory = self._by_user.get(user)
        if start:
            videos, feedback = known.exposures() if given is None else given
            last = max(len(videos) - serving.spec.history, 0)
            return None, serving.seen(videos[last:], feedback[last:])
        value, seen, requests = None, [], known.shown
        if memory is None or (memory.artifact, memory.first) != (serving.id, known.shown[0].number):
            seen = serving.seen(known.history_videos, known.history_feedback)
        else:
            value, requests = memory.value, known.shown[memory.upto - memory.first :]
        for s in requests:
            seen += serving.seen(s.videos, s.feedback, s.context) if s.answered else []
        return value, seen

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
