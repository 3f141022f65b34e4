"""Simulated users as HTTP clients of a ranking service: they request slates, send feedback and leave."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import aiohttp
import jax
import numpy as np

from mmrf_jax import types
from mmrf_jax.envs.environment import Environment, StepResult
from mmrf_jax.signals import Signals

_AT_ONCE = 64  # requests in flight
_WAIT = 0.2  # seconds until a rejected request is sent again
_TRIES = 20


@dataclasses.dataclass(frozen=True)
class Visits:
    """Results of the sessions of some users.

    Attributes:
      main: [n] the main signal per session, such as seconds.
      depth: [n] videos per session.
      requests: [n] per session.
      failed: requests without a valid response, after all retries.
      seconds: in total.
    """

    main: np.ndarray
    depth: np.ndarray
    requests: np.ndarray
    failed: int
    seconds: float


class Clients:
    """Users of an environment that use a service over HTTP."""

    def __init__(self, sim: Environment, key: types.Key, day: int, url: str, token: str | None = None):
        """Compile the environment.

        Args:
          sim: environment of the users; its video ids are item rows.
          key: of all randomness.
          day: the simulated day.
          url: of the service, such as http://127.0.0.1:8080.
          token: of the service; None sends none.
        """
        self._sim, self._key, self._day, self._url = sim, key, day, url
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._reset, self._step = jax.jit(sim.reset_env), jax.jit(sim.step_env)

    def visit(
        self,
        first_user: int,
        number: int,
        together: int = 256,
        progress: Callable[[int], None] = lambda done: None,
        until: Callable[[], bool] = lambda: False,
    ) -> Visits:
        """Simulate one session of each of the users `first_user … first_user + number − 1`.

        Args:
          first_user: id of the first user.
          number: number of users.
          together: users simulated at the same time.
          progress: called with the number of finished users.
          until: called before each group of users; True ends early.
        """
        return asyncio.run(self._visit(first_user, number, together, progress, until))

    async def _visit(self, first_user, number, together, progress, until) -> Visits:
        began, parts = time.perf_counter(), []
        self._failed = 0
        self._room = asyncio.Semaphore(_AT_ONCE)
        connector = aiohttp.TCPConnector(limit=_AT_ONCE)
        async with aiohttp.ClientSession(self._url, headers=self._headers, connector=connector) as self._http:
            for start in range(0, number, together):
                if until():
                    break
                parts.append(await self._group(first_user + start, min(together, number - start), together))
                progress(start + len(parts[-1]))
        sums = np.concatenate(parts) if parts else np.zeros((0, 3))
        took = time.perf_counter() - began
        return Visits(sums[:, 0], sums[:, 1], sums[:, 2], self._failed, took)

    async def _group(self, first_user: int, number: int, slots: int) -> np.ndarray:
        """Simulate users who arrive together; return their [number, 3] main signal, videos and requests.

        Slots beyond `number` stay idle.
        """
        users = np.arange(first_user, first_user + slots, dtype=np.int32)
        request, history, state = self._reset(self._key, self._sim.default_params, users, self._day)
        arrived = jax.device_get(history)
        live = np.arange(slots) < number
        sums = np.zeros((slots, 3))
        first, signals = True, self._sim.signals
        while live.any():
            asked = jax.device_get(request)
            bodies = {int(u): _rank(signals, asked, int(u), arrived if first else None) for u in np.flatnonzero(live)}
            answers = zip(bodies, await self._all("/rank", bodies.values()), strict=True)
            slates = {u: answer for u, answer in answers if answer is not None}  # a failure has no slate to answer
            if not slates:
                break
            live = np.isin(np.arange(slots), list(slates))
            exposed = np.zeros((slots, max(len(x["slate"]) for x in slates.values())), np.int32)
            for u, answer in slates.items():
                place = {int(v): i for i, v in enumerate(asked.candidates[u])}
                exposed[u] = [place[shown["video"]] for shown in answer["slate"]]
            result, state = self._step(self._key, state, exposed, self._sim.default_params)
            request, outcome = result.request, jax.device_get(result)
            over = outcome.terminated | outcome.truncated
            await self._all("/feedback", [_feedback(signals, outcome, answer, u) for u, answer in slates.items()])
            main = outcome.exposure.feedback[..., signals.index(signals.main)]
            main = np.where(outcome.exposure.mask, main, 0.0).sum(axis=1)
            shown = outcome.exposure.mask.sum(axis=1)
            sums += np.where(live[:, None], np.stack([main, shown, np.ones(slots)], axis=1), 0.0)
            live = live & ~over
            first = False
        return sums[:number]

    async def _all(self, path: str, bodies) -> list[dict[str, Any] | None]:
        return await asyncio.gather(*(self._post(path, body) for body in bodies))

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        """Post a request and return its response; None on failure.

        Feedback may be sent twice: its id counts once.
        """
        for _ in range(_TRIES):
            try:
                async with self._room, self._http.post(path, json=body) as answer:
                    if answer.status == 200:
                        return await answer.json()
                    if answer.status != 429:
                        break
            except (aiohttp.ClientError, TimeoutError):
                break
            await asyncio.sleep(_WAIT)
        self._failed += 1
        return None


def _rank(signals: Signals, asked: types.Request, u: int, arrived: types.Exposure | None) -> dict[str, Any]:
    """Return the body of a request for a slate; the first one includes the user's history."""
    user: dict[str, Any] = {"id": int(asked.user_id[u])}
    if arrived is not None:
        user["profile"] = asked.profile[u].tolist()
        there = np.flatnonzero(arrived.mask[u])
        user["history"] = [_answers(signals, arrived.videos[u, h], arrived.feedback[u, h]) for h in there]
    return {
        "user": user,
        "context": asked.context[u, :-1].tolist(),
        "candidates": asked.candidates[u].tolist(),
        "new_session": arrived is not None,
    }


def _feedback(signals: Signals, outcome: StepResult, slate: dict[str, Any], u: int) -> dict[str, Any]:
    shown = outcome.exposure
    answers = [
        _answers(signals, v, f) for v, f, m in zip(shown.videos[u], shown.feedback[u], shown.mask[u], strict=True) if m
    ]
    left = bool(outcome.terminated[u])
    return {"event_id": slate["request_id"], "request_id": slate["request_id"], "videos": answers, "left": left}


def _answers(signals: Signals, video, feedback: np.ndarray) -> dict[str, Any]:
    """Return feedback on a video in the service's format; signals that are 0 are left out."""
    row: dict[str, Any] = {"video": int(video)}
    integers = {signal.name for signal in signals.signals if signal.kind in ("binary", "count")}
    for name, value in zip(signals.names, feedback, strict=True):
        if value:
            row[name] = int(value) if name in integers else float(value)
    return row
