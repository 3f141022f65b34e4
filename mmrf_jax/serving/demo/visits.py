"""Viewers of the demo feed: an anonymous visitor, or a simulated user of the world.

A ranking service receives candidates, profiles and histories from a recall stage and an app. This module replaces both
for the page, and produces the feedback of simulated users.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from mmrf_jax import types
from mmrf_jax.envs.environment import Environment
from mmrf_jax.io.progress import counted
from mmrf_jax.serving.ranker import Ranker
from mmrf_jax.serving.service import Refused

_REMEMBERED = 2_000  # videos that a visitor is not shown again
_TASTES = 12  # reactions that determine a visitor's candidates
_KEPT, _LIKED = 0.5, 0.25  # shares of a visitor's candidates: of earlier requests, of topics with a reaction


class Answer(NamedTuple):
    """The response to a slate.

    Attributes:
      feedback: [k, S] of the slate, in its order, for a simulated user; None for a visitor.
      leaves: whether the simulated user leaves.
    """

    feedback: np.ndarray | None
    leaves: bool


class Viewer(Protocol):
    """Who sees the slates of a visit: a `Visitor` or a `SimulatedUser`.

    Attributes:
      candidates: [c] int64 of the pending request, the platform's ids.
      context: [Dx − 1] of that request.
      profile: [Du] or None.
      history: (videos [h], feedback [h, S]) from before the visit, oldest first, or None.
    """

    candidates: np.ndarray
    context: np.ndarray
    profile: np.ndarray | None
    history: tuple[np.ndarray, np.ndarray] | None

    def answer(self, ranker: Ranker, slate: list[int], reacted: list[int]) -> Answer:
        """Answer the slate, and set candidates and context of the next request."""


class Visit:
    """One session of the page; not thread-safe.

    Attributes:
      viewer: of the slates.
      position: of the pending request, from 0.
    """

    def __init__(self, viewer: Viewer, slate: int):
        """Begin with the first request of a viewer; `slate` is K."""
        self.viewer, self.position = viewer, 0
        self._slate = slate
        self._last: tuple[list[int], Answer] | None = None

    def step(self, ranker: Ranker, position: int, slate: list[int], reacted: list[int]) -> Answer:
        """Apply the slate shown and advance to the next request; repeating a call returns the same answer.

        Args:
          ranker: the ranker of the service.
          position: of the request.
          slate: videos shown, in order.
          reacted: videos of the slate with any positive reaction.

        Raises:
          Refused: for another request than the pending one, or an impossible slate.
        """
        if self._last is not None and position == self.position - 1 and slate == self._last[0]:
            return self._last[1]
        if position != self.position:
            message = f"request {position} does not wait for an answer, request {self.position} does"
            raise Refused(409, message, ("body", "position"))
        k = min(self._slate, len(self.viewer.candidates))
        if len(slate) != k or len(set(slate)) != k:
            raise Refused(422, f"a slate has {k} different videos, this one {len(set(slate))}", ("body", "slate"))
        if strange := sorted(set(slate) - set(self.viewer.candidates.tolist())):
            raise Refused(422, f"video {strange[0]} is no candidate of the request", ("body", "slate"))
        answer = self.viewer.answer(ranker, slate, reacted)
        self._last, self.position = (slate, answer), self.position + 1
        return answer


class Visitor:
    """A person, known only by the reactions to slates.

    Half of the candidates are from earlier requests and were not shown, a quarter is of topics with a reaction, the
    others are sampled from all items.
    """

    profile: np.ndarray | None = None
    history: tuple[np.ndarray, np.ndarray] | None = None

    def __init__(self, user: int, ranker: Ranker, limit: int):
        """Begin with candidates sampled from all items.

        Args:
          user: id of the visit, which seeds the sampling.
          ranker: the ranker of the service.
          limit: most candidates of a request.
        """
        self._size = min(ranker.spec.candidates, limit, ranker.spec.num_videos)
        self._rng = np.random.default_rng(user)
        self._seen: collections.deque[int] = collections.deque(maxlen=_REMEMBERED)
        self._tags: collections.deque[int] = collections.deque(maxlen=_TASTES)
        self.candidates = np.zeros(0, np.int64)
        self._recall(ranker)

    def answer(self, ranker: Ranker, slate: list[int], reacted: list[int]) -> Answer:
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
        chosen |= dict.fromkeys([*anew, *ids[: self._size].tolist()])  # a small item set may have no others left
        self.candidates = np.array(list(chosen)[: self._size], np.int64)
        self.context = np.zeros(ranker.spec.context - 1, np.float32)


class World:
    """An environment that is asked for one user at a time."""

    def __init__(self, env: Environment, slate: int):
        """Compile its functions, which takes seconds."""
        self.params = env.default_params
        self.reset, self.step = jax.jit(env.reset_env), jax.jit(env.step_env)
        first = SimulatedUser(self, 0, 0, 2**31)
        first.feel(np.arange(min(slate, len(first.candidates))))


class SimulatedUser:
    """A user of the world, who reacts to the slates shown, not to the page's buttons."""

    def __init__(self, world: World, simulated: int, visit: int, limit: int):
        """Reset the simulated user.

        Args:
          world: the world.
          simulated: the world's id of the user.
          visit: number of the visit; each has its own randomness.
          limit: most candidates of a request.
        """
        self._world, self._limit = world, limit
        self._key = jax.random.fold_in(types.make_key(0), visit)
        request, history, self._state = world.reset(self._key, world.params, np.array([simulated], np.int32), 0)
        there = np.asarray(history.mask[0])
        self.history = np.asarray(history.videos[0], np.int64)[there], np.asarray(history.feedback[0])[there]
        self.profile = np.asarray(request.profile[0])
        self._take(request)

    def _take(self, request) -> None:
        self.candidates = np.asarray(request.candidates[0], np.int64)[: self._limit]
        self.context = np.asarray(request.context[0])[:-1]  # the service adds the position

    def answer(self, ranker: Ranker, slate: list[int], reacted: list[int]) -> Answer:
        place = {v: i for i, v in enumerate(self.candidates.tolist())}
        return self.feel(np.array([place[v] for v in slate]))

    def feel(self, shown: np.ndarray) -> Answer:
        """Return the feedback on candidates by position [k]."""
        exposed = shown[None].astype(np.int32)
        result, self._state = self._world.step(self._key, self._state, exposed, self._world.params)
        self._take(result.request)
        over = bool(result.terminated[0] | result.truncated[0])
        return Answer(np.asarray(result.exposure.feedback[0]), over)


def why_not(config: dict[str, Any]) -> str | None:
    """Return why an artefact of this config has no simulated users; None if it has."""
    if config.get("source") == "world" and "world" in config:
        return None
    return f"the ranker was trained on {config.get('source', 'a log')}, whose users cannot be simulated"


def world_of(config: dict[str, Any], slate: int) -> World:
    """Build the world of a run's config."""
    # Imported here, so that only simulated users load all session sources.
    from mmrf_jax.training import configs, restore

    source = restore.open_source(configs.run_of(config), counted)
    assert source.sim is not None
    return World(source.sim, slate)


#: (config of the run, K) -> its world.
MakeWorld = Callable[[dict[str, Any], int], World]
