"""Speed of the ranking service: slates per second, latency at two lower rates, the bare scoring call, memory.

The service runs in a separate process, and this process is its client over the loopback interface. Every slate gets
feedback, which is on disk before it is acknowledged, and every session ends after some requests.
"""

from __future__ import annotations

import asyncio
import gc
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil

from mmrf_jax.cli import serving
from mmrf_jax.cli.benchmarks import speed
from mmrf_jax.io.progress import counted, say
from mmrf_jax.serving import artifact, export, ranker

CANDIDATES = 400
_USERS, _REQUESTS = 1_000, 15  # concurrent users in a session, and requests per session
_IN_MEMORY = 2_000  # users; the service reads the others from its store
_BODIES = 512  # candidate sets, prepared in advance so that the client costs little
_AT_ONCE = 32  # requests in flight at the maximum rate
_STEADY = 150.0  # slates per second at which latency is measured, in addition to half of the maximum rate
_WARM = 2 * _USERS * _REQUESTS  # warm-up requests: by then as many users as fit are in memory


def serve(repeats: int, requests: int) -> list[dict[str, Any]]:
    """Return the results of the suite.

    Args:
      repeats: timings of the rate; the median is reported.
      requests: number over which memory is watched, after the warm-up.
    """
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        run = speed.fresh_run(**{"world.candidates": CANDIDATES, "collect.sessions": 256})
        export.export_run(folder / "artifact", run.plan, run.source.spec, run.source.items, None, run.state, {})
        results = _bare(folder / "artifact")
        flags = ("--temperature=0.25", f"--users_in_memory={_IN_MEMORY}")
        with serving.service(folder / "artifact", folder / "log", folder / "serve.log", *flags) as server:
            load = _Load(server.url, run.source.spec)
            del run
            gc.collect()
            gc.freeze()
            gc.disable()  # the client's garbage collection would count as the service's latency
            try:
                results += asyncio.run(load.measured(psutil.Process(server.process.pid), repeats, requests))
            finally:
                gc.enable()
    return results


def _bare(folder: Path) -> list[dict[str, Any]]:
    """Time a scoring call of each batch size in milliseconds, including host-device transfers, in this process."""
    made = ranker.Ranker(artifact.load(folder), CANDIDATES)
    made.warm()
    spec, rng = made.spec, np.random.default_rng(0)
    memory = made.run([_job(spec, rng, None)])[0][1]
    results = []
    for batch in ranker.BATCHES:
        jobs = [_job(spec, rng, memory) for _ in range(batch)]
        times = []
        for _ in range(30):
            start = time.perf_counter()
            made.run(jobs)
            times.append(1000.0 * (time.perf_counter() - start))
        results.append({"name": f"serve/scoring_call/batch={batch}", "value": statistics.median(times), "unit": "ms"})
    return results


def _job(spec, rng, memory) -> ranker.Job:
    nothing = np.zeros((spec.slate, len(spec.signals)), np.float32)
    return ranker.Job(
        0,
        np.zeros(spec.profile, np.float32),
        np.zeros(spec.context, np.float32),
        rng.integers(0, spec.num_videos, CANDIDATES),
        memory,
        [ranker.Seen(rng.integers(0, spec.num_videos, spec.slate), nothing, np.zeros(spec.context, np.float32))],
    )


class _Load:
    """A client that requests slates and sends feedback on them."""

    def __init__(self, url: str, spec):
        self._url, rng = url, np.random.default_rng(1)
        profile = rng.normal(size=spec.profile).tolist()
        self._head = '{"user": {"profile": ' + json.dumps(profile) + ', "id": '
        self._tails = [
            f'}}, "context": {json.dumps([0.5] * (spec.context - 1))}, "candidates": '
            + json.dumps(rng.choice(spec.num_videos, CANDIDATES, replace=False).tolist())
            + "}"
            for _ in range(_BODIES)
        ]
        self._next = 0
        self._errors = 0

    async def measured(self, process: psutil.Process, repeats: int, requests: int) -> list[dict[str, Any]]:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(
            self._url, connector=connector, headers={"content-type": "application/json"}
        ) as http:
            self._http = http
            progress = counted("serve", _WARM + requests)
            await self._all_it_can(_WARM)
            before, compiled = process.memory_info().rss, await self._compilations()
            each = max(requests // (repeats + 2), 1_000)
            rates = []
            for _ in range(repeats):
                start = time.perf_counter()
                await self._all_it_can(each)
                rates.append(each / (time.perf_counter() - start))
                progress(self._next)
            rate = statistics.median(rates)
            say(f"serve: {rate:,.0f} slates/s; now {_STEADY:,.0f} and half of it")
            latency: dict[str, tuple[float, str]] = {}
            for name, asked in (("steady", _STEADY), ("half", rate / 2.0)):
                took = await self._at(asked, each)
                latency |= {
                    f"latency/{name}/rate": (asked, "slates/s"),
                    f"latency/{name}/p50": (float(np.percentile(took, 50)), "ms"),
                    f"latency/{name}/p99": (float(np.percentile(took, 99)), "ms"),
                }
                progress(self._next)
            progress(_WARM + requests)
            after = process.memory_info().rss
            figures = {
                "rate": (rate, "slates/s"),
                **latency,
                "memory/before": (before / 2**30, "GiB"),
                "memory/after": (after / 2**30, "GiB"),
                "requests": (self._next, "slates"),
                "errors": (self._errors, "requests"),
                "compilations_under_load": (await self._compilations() - compiled, "compilations"),
            }
        return [{"name": f"serve/{name}", "value": value, "unit": unit} for name, (value, unit) in figures.items()]

    async def _all_it_can(self, number: int) -> None:
        """Request `number` slates, `_AT_ONCE` in flight."""
        last = self._next + number

        async def one_after_another() -> None:
            while self._next < last:
                await self._one()

        await asyncio.gather(*(one_after_another() for _ in range(_AT_ONCE)))

    async def _at(self, rate: float, number: int) -> list[float]:
        """Return the milliseconds of `number` slates, requested at Poisson times without waiting for answers."""
        rng, tasks = np.random.default_rng(2), []
        due = time.perf_counter()
        for _ in range(number):
            due += rng.exponential(1.0 / rate)
            await asyncio.sleep(max(due - time.perf_counter(), 0.0))
            tasks.append(asyncio.create_task(self._one(due)))
        return list(await asyncio.gather(*tasks))

    async def _one(self, due: float | None = None) -> float:
        """Request a slate and send feedback; return the milliseconds from the request's due time to the slate."""
        number, self._next = self._next, self._next + 1
        # Each generation of users takes turns for as many requests as a session has; then a new generation follows.
        generation, turn = divmod(number, _USERS * _REQUESTS)
        visit, user = divmod(turn, _USERS)
        user += generation * _USERS
        body = f"{self._head}{user}{self._tails[number % _BODIES]}"
        start = time.perf_counter() if due is None else due
        async with self._http.post("/rank", data=body) as answer:
            slate = await answer.json()
            took = 1000.0 * (time.perf_counter() - start)
            if answer.status != 200:
                self._errors += 1
                return took
        videos = [{"video": shown["video"], "click": 1, "watch_time": 12.5} for shown in slate["slate"]]
        event = {"event_id": slate["request_id"], "request_id": slate["request_id"], "videos": videos}
        async with self._http.post("/feedback", json=event | {"left": visit == _REQUESTS - 1}) as answer:
            self._errors += answer.status != 200
        return took

    async def _compilations(self) -> float:
        async with self._http.get("/metrics") as answer:
            lines = (await answer.text()).splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("mmrf_compilations{"))
