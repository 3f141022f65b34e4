"""Who looks at the feed of the page: a visitor of whom nothing is known, or a simulated user of the world.

A ranking service is told candidates, profiles and histories by others: a recall stage, an app. This is what stands in
their place on the page, and it answers for users that are simulated.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from mmrf_jax import types
from mmrf_jax.envs import base
from mmrf_jax.io.progress import counted
from mmrf_jax.serving.ranker import Ranker
from mmrf_jax.serving.service import Refused

_REMEMBERED = 2_000  # videos that a visitor is not shown again
_TASTES = 12  # reactions that a visitor's candidates follow
_KEPT, _LIKED = 0.5, 0.25  # of a visitor's candidates: asked about before, of topics reacted to


class Answer(NamedTuple):
    """What a slate brought.

    Attributes:
      feedback: [k, S] of the slate, in its order, where a simulated user was asked; None for a visitor.
      leaves: whether the simulated user leaves.
    """

    feedback: np.ndarray | None
    leaves: bool


class Visit:
    """One session of the page; not thread-safe.

    Attributes:
      user: id under which the service knows the visit. position: of the request that waits for an answer, from 0.
      candidates: [c] int64 of that request, the platform's ids. context: [Dx − 1] of it.
      profile: [Du] or None. history: (videos [h], feedback [h, S]) that the user arrives with, oldest first, or None.
      simulated: id of the simulated user, or None.
    """

    simulated: int | None = None
    profile: np.ndarray | None = None
    history: tuple[np.ndarray, np.ndarray] | None = None
    candidates: np.ndarray
    context: np.ndarray

    def __init__(self, user: int, slate: int):
        self.user, self.position = user, 0
        self._slate = slate
        self._last: tuple[list[int], Answer] | None = None

    def step(self, ranker: Ranker, position: int, slate: list[int], reacted: list[int]) -> Answer:
        """Takes the slate that was shown and moves on to the next request; said again, it answers the same.

        Args:
          reacted: videos of the slate that were liked in one way or another.

        Raises:
          Refused: for another request than the one that waits, or a slate that it cannot have.
        """
        if self._last is not None and position == self.position - 1 and slate == self._last[0]:
            return self._last[1]
        if position != self.position:
            message = f"request {position} does not wait for an answer, request {self.position} does"
            raise Refused(409, message, ("body", "position"))
        k = min(self._slate, len(self.candidates))
        if len(slate) != k or len(set(slate)) != k:
            raise Refused(422, f"a slate has {k} different videos, this one {len(set(slate))}", ("body", "slate"))
        if strange := sorted(set(slate) - set(self.candidates.tolist())):
            raise Refused(422, f"video {strange[0]} is no candidate of the request", ("body", "slate"))
        answer = self._answer(ranker, slate, reacted)
        self._last, self.position = (slate, answer), self.position + 1
        return answer

    def _answer(self, ranker: Ranker, slate: list[int], reacted: list[int]) -> Answer:
        """Answers the slate, and sets candidates and context of the next request."""
        raise NotImplementedError


class Visitor(Visit):
    """A person, of whom nothing is known but what is done with the slates.

    Half of the candidates were asked about before and not shown, a quarter is of topics that the visitor reacted to,
    the others are drawn from the whole catalogue.
    """

    def __init__(self, user: int, ranker: Ranker, limit: int):
        """
        Args:
          limit: most candidates of a request.
        """
        super().__init__(user, ranker.schema.slate)
        self._size = min(ranker.schema.candidates, limit, ranker.schema.num_videos)
        self._rng = np.random.default_rng(user)
        self._seen: collections.deque[int] = collections.deque(maxlen=_REMEMBERED)
        self._tags: collections.deque[int] = collections.deque(maxlen=_TASTES)
        self.candidates = np.zeros(0, np.int64)
        self._recall(ranker)

    def _answer(self, ranker: Ranker, slate: list[int], reacted: list[int]) -> Answer:
        rows = ranker.rows_of(np.array([v for v in reacted if v in slate], np.int64))
        self._seen.extend(slate)
        self._tags.extend(ranker.catalogue["tag"][rows[rows >= 0]].tolist())
        self._recall(ranker)
        return Answer(None, False)

    def _recall(self, ranker: Ranker) -> None:
        catalogue, rng = ranker.catalogue, self._rng
        ids, total = catalogue["video_id"], len(catalogue["video_id"])

        def draw(n):
            return rng.permutation(total)[:n] if total < 8 * n else rng.integers(total, size=n)

        seen = set(self._seen)
        before = [v for v in rng.permutation(self.candidates).tolist() if v not in seen]
        liked = np.flatnonzero(np.isin(catalogue["tag"], list(self._tags)))
        liked = ids[rng.permutation(liked)[: self._size]].tolist() if self._tags else []
        anew = ids[draw(4 * self._size)].tolist()
        chosen = dict.fromkeys(before[: int(_KEPT * self._size)])
        chosen |= dict.fromkeys([v for v in liked if v not in seen and v not in chosen][: int(_LIKED * self._size)])
        chosen |= dict.fromkeys(v for v in anew if v not in seen)
        chosen |= dict.fromkeys([*anew, *ids[: self._size].tolist()])  # a small catalogue may have nothing else left
        self.candidates = np.array(list(chosen)[: self._size], np.int64)
        self.context = np.zeros(ranker.schema.context - 1, np.float32)


class World:
    """A simulator that is asked for one user at a time."""

    def __init__(self, simulator: base.Simulator, slate: int):
        """Compiles its functions, which takes seconds."""
        self.params = simulator.params
        self.reset, self.step = jax.jit(simulator.reset), jax.jit(simulator.step)
        first = SimulatedUser(0, self, 0, 0, slate, 2**31)
        first.feel(np.arange(min(slate, len(first.candidates))))


class SimulatedUser(Visit):
    """A user of the world, who knows what is shown, and not what the page's buttons say."""

    def __init__(self, user: int, world: World, simulated: int, visit: int, slate: int, limit: int):
        """
        Args:
          simulated: the world's id of the user. visit: number of the visit; each has its own chance.
          slate: K. limit: most candidates of a request.
        """
        super().__init__(user, slate)
        self.simulated = simulated
        self._world, self._limit = world, limit
        self._key = jax.random.fold_in(types.make_key(0), visit)
        self._state, request, history = world.reset(self._key, np.array([simulated], np.int32), 0, world.params)
        there = np.asarray(history.mask[0])
        self.history = np.asarray(history.videos[0], np.int64)[there], np.asarray(history.feedback[0])[there]
        self.profile = np.asarray(request.profile[0])
        self._take(request)

    def _take(self, request) -> None:
        self.candidates = np.asarray(request.candidates[0], np.int64)[: self._limit]
        self.context = np.asarray(request.context[0])[:-1]  # the service adds the position

    def _answer(self, ranker: Ranker, slate: list[int], reacted: list[int]) -> Answer:
        place = {v: i for i, v in enumerate(self.candidates.tolist())}
        return self.feel(np.array([place[v] for v in slate]))

    def feel(self, shown: np.ndarray) -> Answer:
        """Answers candidates by position [k]."""
        exposed = shown[None].astype(np.int32)
        self._state, result = self._world.step(self._key, self._state, exposed, self._world.params)
        self._take(result.request)
        over = bool(result.terminated[0] | result.truncated[0])
        return Answer(np.asarray(result.exposure.feedback[0]), over)


def why_not(config: dict[str, Any]) -> str | None:
    """Why an artefact of this config has no simulated users; None where it has."""
    if config.get("source") == "world" and "world" in config:
        return None
    return f"the ranker was trained on {config.get('source', 'a log')}, whose users nobody can simulate"


def world_of(config: dict[str, Any], slate: int) -> World:
    """The world of a run's config."""
    from mmrf_jax.training import (  # only those who want a simulated user wait for all sources of sessions
        configs,
        sources,
    )

    source = sources.from_config(configs.run_of(config), counted)
    assert source.sim is not None
    return World(source.sim, slate)


#: (config of the run, K) -> its world.
MakeWorld = Callable[[dict[str, Any], int], World]
