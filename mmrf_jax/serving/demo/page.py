"""The demo page of the service: a feed, and routes that replace a recall stage and an app.

The page itself requests slates and sends feedback by POST /rank and POST /feedback, as any app does.
"""

from __future__ import annotations

import asyncio
import base64
import collections
import hashlib
import importlib.resources
import secrets
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import fastapi
import numpy as np
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel, Field

from mmrf_jax.serving import api
from mmrf_jax.serving.demo import visits
from mmrf_jax.serving.service import Refused, Service
from mmrf_jax.signals import Signals

FIRST_USER, _USERS = 2_000_000_000, 147_000_000  # ids of visits: far from those of an app and of the world's logs
_MOST_VISITS = 256
_PATIENCE = 1.0  # seconds that a request waits for the world before it reports that it is still being created

VideoId = Annotated[int, Field(ge=0, lt=2**63, strict=True, description="The platform's id of a video.")]
UserId = Annotated[int, fastapi.Path(ge=FIRST_USER, le=api.MAX_USER, description="Of the visit.")]


class Start(api.Strict):
    """The viewer of a new visit."""

    simulated: Annotated[int, Field(ge=0, le=api.MAX_USER, strict=True)] | None = Field(
        default=None, description="Id of a simulated user; left out, it is a visitor of whom nothing is known."
    )


class Videos(BaseModel):
    """Item data of videos, column by column."""

    video: list[int]
    tag: list[int]
    author: list[int]
    duration: list[float] = Field(description="Seconds.")


class Turn(BaseModel):
    """A request to rank."""

    position: int
    context: list[float]
    candidates: list[int]
    videos: Videos = Field(description="Of the candidates, and with the first request of the history.")


class Visit(BaseModel):
    """A new visit."""

    user: int = Field(description="Id to ask /rank with.")
    simulated: int | None
    profile: list[float] | None
    history: list[dict[str, float]] = Field(description="What the user was shown before, oldest first.")
    turn: Turn


class Preparing(BaseModel):
    """Not ready yet: try again later."""

    preparing: str


class ShownSlate(api.Strict):
    """The slate of a request."""

    position: Annotated[int, Field(ge=0, le=2**31, strict=True, description="Of the request.")]
    slate: Annotated[list[VideoId], Field(min_length=1, max_length=64, description="In the order shown.")]
    reacted: list[VideoId] = Field(default=[], max_length=64, description="Videos of it that a visitor was taken by.")


class Answered(BaseModel):
    """A simulated user's feedback, and the next request to rank."""

    answers: list[dict[str, float]] | None = Field(description="Of the slate, in its order; null for a visitor.")
    leaves: bool
    turn: Turn


class About(BaseModel):
    """Information for the page."""

    artifact: str
    method: str
    agents: list[str] = Field(description="The last one ranks.")
    slate: int
    candidates: int
    no_simulated: str | None = Field(description="Why there are no simulated users; null where there are.")


class Demo:
    """Visits, and the world of the simulated users, which is created at the first request for one of them."""

    def __init__(self, service: Service, make_world: visits.MakeWorld):
        self._service, self._make_world = service, make_world
        self._visits: collections.OrderedDict[int, visits.Visit] = collections.OrderedDict()
        self._begun = 0
        self._world: tuple[Any, asyncio.Future[visits.World]] | None = None
        self._thread = ThreadPoolExecutor(1, "demo")  # runs the visits' computations, one after another

    def about(self) -> dict[str, Any]:
        ranker = self._service.ranker
        return {
            "artifact": ranker.id,
            "method": ranker.manifest["method"],
            "agents": ranker.agents,
            "slate": ranker.spec.slate,
            "candidates": self._candidates,
            "no_simulated": visits.why_not(self._config),
        }

    @property
    def _config(self) -> dict[str, Any]:
        return self._service.ranker.manifest.get("config", {})

    @property
    def _candidates(self) -> int:
        return min(self._service.ranker.spec.candidates, self._service.settings.max_candidates)

    async def begin(self, simulated: int | None) -> dict[str, Any] | None:
        """Begin a visit; return None while the world is being created."""
        user, ranker, most = FIRST_USER + secrets.randbelow(_USERS), self._service.ranker, self._candidates
        if simulated is None:
            viewer = await self._run(visits.Visitor, user, ranker, most)
        else:
            world = await self._ready_world()
            if world is None:
                return None
            self._begun += 1
            viewer = await self._run(visits.SimulatedUser, world, simulated, self._begun, most)
        self._visits[user] = visit = visits.Visit(viewer, ranker.spec.slate)
        while len(self._visits) > _MOST_VISITS:
            self._visits.popitem(last=False)
        none = np.zeros(0, np.int64), np.zeros((0, len(ranker.spec.signals)), np.float32)
        videos, feedback = viewer.history or none
        return {
            "user": user,
            "simulated": simulated,
            "history": _answers(ranker.spec.signals, videos, feedback),
            "profile": None if viewer.profile is None else viewer.profile.tolist(),
            "turn": self._turn(visit, videos),
        }

    async def step(self, user: int, shown: ShownSlate) -> dict[str, Any]:
        """Return the feedback on a slate, and the next request."""
        visit = self._visits.get(user)
        if visit is None:
            raise Refused(404, f"there is no visit of user {user} any more; begin another", ("path", "user"))
        self._visits.move_to_end(user)
        answer = await self._run(visit.step, self._service.ranker, shown.position, shown.slate, shown.reacted)
        answers = (
            None
            if answer.feedback is None
            else _answers(self._service.ranker.spec.signals, np.array(shown.slate), answer.feedback)
        )
        return {"answers": answers, "leaves": answer.leaves, "turn": self._turn(visit)}

    def _turn(self, visit: visits.Visit, more: np.ndarray | tuple = ()) -> dict[str, Any]:
        ranker, viewer = self._service.ranker, visit.viewer
        ids = np.unique(np.concatenate([viewer.candidates, np.array(more, np.int64)]))
        rows = ranker.rows_of(ids)
        columns = {name: ranker.catalogue[name][rows[rows >= 0]].tolist() for name in ("tag", "author", "duration")}
        return {
            "position": visit.position,
            "context": viewer.context.tolist(),
            "candidates": viewer.candidates.tolist(),
            "videos": columns | {"video": ids[rows >= 0].tolist()},
        }

    async def _ready_world(self) -> visits.World | None:
        config, slate = self._config, self._service.ranker.spec.slate
        if (why := visits.why_not(config)) is not None:
            raise Refused(409, f"there are no simulated users: {why}", ("body", "simulated"))
        key = config["world"]
        if self._world is None or self._world[0] != key:  # the artefact may have been swapped for one of another world
            making = asyncio.get_running_loop().run_in_executor(None, self._make_world, config, slate)
            self._world = key, making
        world = self._world[1]
        await asyncio.wait({world}, timeout=_PATIENCE)
        if not world.done():
            return None
        try:
            return world.result()
        except Exception as error:  # on any error; visitors need no world
            raise Refused(409, f"there are no simulated users: {error}", ("body", "simulated")) from error

    async def _run(self, function, *arguments) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)


def _answers(signals: Signals, videos: np.ndarray, feedback: np.ndarray) -> list[dict[str, Any]]:
    """Convert videos [m] and feedback [m, S] to the form of `api.video_feedback`, without signals that are 0."""

    def value(name, x):
        return int(x) if name in signals.binary_names else float(x)

    return [
        {"video": int(v)} | {name: value(name, x) for name, x in zip(signals.names, row, strict=True) if x}
        for v, row in zip(videos, feedback, strict=True)
    ]


def page() -> tuple[str, str]:
    """Return the page, one document that fetches only the service's responses, and its Content-Security-Policy."""
    folder = importlib.resources.files("mmrf_jax.serving.demo") / "assets"
    html, script, style = ((folder / f"feed.{kind}").read_text("utf-8") for kind in ("html", "js", "css"))

    def digest(text):
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    policy = (
        f"default-src 'none'; script-src {digest(script)}; style-src {digest(style)}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html.replace("/* style */", style).replace("/* script */", script), policy


def router(service: Service, make_world: visits.MakeWorld = visits.world_of) -> fastapi.APIRouter:
    """Return the routes of a service's page."""
    routes, demo, (html, policy) = fastapi.APIRouter(tags=["page"]), Demo(service, make_world), page()

    @routes.get("/", response_class=HTMLResponse)
    async def feed() -> HTMLResponse:
        """Show the feed."""
        return HTMLResponse(html, headers={"content-security-policy": policy, "cache-control": "no-cache"})

    @routes.get("/demo/about", response_model=About)
    async def about() -> Any:
        """Return what the page must know of the artefact."""
        return JSONResponse(demo.about())

    again = {"model": Preparing, "description": "The world is being made, which takes seconds; ask again."}
    none = {"model": api.Error, "description": "The artefact has no simulated users."}

    @routes.post("/demo/visits", response_model=Visit, responses={202: again, 409: none})
    async def begin(start: Start) -> Any:
        """Begin a visit, of a visitor or of a simulated user."""
        visit = await demo.begin(start.simulated)
        if visit is None:
            return JSONResponse({"preparing": "the world of the simulated users"}, 202, {"retry-after": "1"})
        return JSONResponse(visit)

    gone = {"model": api.Error, "description": "There is no such visit any more."}
    other = {"model": api.Error, "description": "Another request of the visit waits for an answer."}

    @routes.post("/demo/visits/{user}/steps", response_model=Answered, responses={404: gone, 409: other})
    async def step(user: UserId, shown: ShownSlate) -> Any:
        """Take the slate shown; return a simulated user's feedback and the candidates of the next request."""
        return JSONResponse(await demo.step(user, shown))

    return routes
