"""The HTTP application of the ranking service."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import fastapi
import numpy as np
import prometheus_client as prometheus
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

from mmrf_jax.data.readers import feedback_log
from mmrf_jax.serving import api, guard
from mmrf_jax.serving.service import Asked, Refused, Service, Slate

_DESCRIPTION = """Ranks for the value of whole sessions (MMRF, arXiv 2405.01847).

Ask `/rank` for a slate, show it, and tell `/feedback` what the user did with it; the next slate of that user follows
from it. What was shown and answered is logged, for training."""

_REFUSALS = {
    401: "The token is missing or wrong.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    422: "A field is missing, malformed or out of range; `loc` names it.",
    429: "Too many requests are in flight.",
    503: "Not answered in time, or the feedback log cannot be written.",
}


def _refusals(*more: int) -> dict[int | str, dict[str, Any]]:
    said = _REFUSALS | {404: "There was no such request.", 409: "Too many events or new items."}
    said |= {410: "The session of the request is over."}
    return {status: {"model": api.Error, "description": said[status]} for status in (*_REFUSALS, *more)}


def make_app(service: Service, limits: guard.Limits, routers: Sequence[fastapi.APIRouter] = ()) -> Any:
    """Return the ASGI application of a service; it starts and closes the service.

    Args:
      service: the service.
      limits: limits of requests.
      routers: additional routes, such as those of the page.
    """
    first = service.ranker
    kinds = first.video_ids, first.user_ids, first.names, first.vocabularies
    models = api.models(first.spec, service.settings.max_candidates, *kinds)
    Rank: Any = Annotated[models.rank, fastapi.Body()]
    Feedback: Any = models.feedback
    Items: Any = models.items
    signals = first.spec.signals.names

    app = _new_app(service, limits)

    @app.post("/rank", response_model=api.Ranked | list[api.Ranked], responses=_refusals(409))
    async def rank(asked: Rank) -> Any:
        """Rank candidates for a user, or for several in a list. Slates are logged before the response."""
        several = isinstance(asked, list)
        every = asked if several else [asked]
        places: list[tuple[str | int, ...]] = [("body", i) for i in range(len(every))] if several else [("body",)]
        wanted = [_asked(signals, one, place) for one, place in zip(every, places, strict=True)]
        for one, place in zip(every, places, strict=True):
            if one.items:
                await service.add_items(_described(one.items, (*place, "items")), (*place, "items"))
        slates = await service.rank_all(wanted) if several else [await service.rank(wanted[0])]
        answers = [_answer(slate, one.scores) for slate, one in zip(slates, every, strict=True)]
        return JSONResponse(answers if several else answers[0])

    @app.post("/items", response_model=api.Taken, responses=_refusals(409))
    async def items(given: Items) -> Any:
        """Describe items that the artefact lacks; they are ranked from now on, and on disk when this answers."""
        described = _described(given.items, ("body", "items"))
        new = await service.add_items(described)
        answer: dict[str, list[int | str]] = {"new": [], "known": []}
        for item, is_new in zip(described, new, strict=True):
            answer["new" if is_new else "known"].append(item["id"])
        return JSONResponse(answer)

    @app.post("/feedback", response_model=api.Acknowledged, responses=_refusals(404, 409, 410))
    async def feedback(event: Feedback) -> Any:
        """Record a user's feedback. It is on disk when acknowledged; repeating the event changes nothing."""
        _distinct([v.video for v in event.videos], ("body", "videos"), "video")
        new = await service.feedback(event.event_id, event.request_id, *_table(signals, event.videos), event.left)
        return JSONResponse({"event_id": event.event_id, "duplicate": not new})

    _add_watched(app, service)
    for router in routers:
        app.include_router(router, responses=_refusals())
    return guard.Guard(app, limits, service.metrics)


def _new_app(service: Service, limits: guard.Limits) -> fastapi.FastAPI:
    """Return an application without routes, whose errors are `api.Error` responses."""

    @contextlib.asynccontextmanager
    async def lifespan(_):
        await service.start()
        yield
        await service.close()

    # The guard checks the token; this documents it in OpenAPI. The page /docs loads its script from the internet.
    token = [] if limits.token is None else [fastapi.Depends(HTTPBearer(auto_error=False))]
    app = fastapi.FastAPI(
        title="mmrf_jax",
        description=_DESCRIPTION,
        version="1",
        lifespan=lifespan,
        docs_url="/docs",
        redoc_url=None,
        dependencies=token,
    )

    @app.exception_handler(Refused)
    async def refused(_, error: Refused):
        return _error(error.status, [{"loc": api.untagged(error.field), "msg": error.message, "type": "refused"}])

    @app.exception_handler(RequestValidationError)
    async def malformed(_, error: RequestValidationError):
        # The input is left out, since JSON may not represent it: not a number, half of a surrogate pair.
        every = error.errors()
        return _error(422, [{"loc": api.untagged(e["loc"]), "msg": e["msg"], "type": e["type"]} for e in every])

    @app.exception_handler(HTTPException)
    async def other(_, error: HTTPException):
        if error.status_code == 400:  # a body that is not text
            return _error(422, [{"loc": ["body"], "msg": str(error.detail), "type": "json_invalid"}])
        return _error(error.status_code, [{"loc": [], "msg": str(error.detail), "type": "refused"}], error.headers)

    return app


def _add_watched(app: fastapi.FastAPI, service: Service) -> None:
    """Add the routes of health checks and of Prometheus."""

    @app.get(
        "/healthz", response_model=api.Health, responses={503: {"model": api.Error, "description": "Start it again."}}
    )
    async def healthz() -> Any:
        """Report whether the service works, and which artefact ranks."""
        if service.trouble is not None:
            raise Refused(503, service.trouble)
        about, others = service.ranker.manifest, list(service.rankers.values())[1:]
        return {
            "status": "ok",
            "artifact": service.ranker.id,
            "method": about["method"],
            "expires": about["expires"],
            "artifact_b": others[0].id if others else None,
            "failed_swap": service.failed_swap,
            "warnings": service.warnings,
        }

    @app.get("/metrics", response_class=Response, responses=_refusals())
    async def metrics() -> Response:
        """Return the metrics for Prometheus."""
        return Response(prometheus.generate_latest(service.metrics.registry), media_type=prometheus.CONTENT_TYPE_LATEST)


def _error(status: int, detail: list[dict[str, Any]], headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Return an `api.Error` response."""
    return JSONResponse({"detail": detail}, status, dict(headers or {}))


def _asked(signals: Sequence[str], asked: Any, place: tuple[str | int, ...]) -> Asked:
    """Convert a model of `api.models` to a request of the service."""
    _distinct(asked.candidates, (*place, "candidates"))
    profile, history, context = asked.user.profile, asked.user.history, asked.context
    if isinstance(profile, list):
        profile = np.array(profile, np.float32)
    return Asked(
        user=asked.user.id,
        candidates=feedback_log.ids_of(asked.candidates),
        context=np.array(context, np.float32) if isinstance(context, list) else context,
        k=asked.k,
        profile=profile,
        history=None if not history else _table(signals, history),
        new_session=asked.new_session,
    )


def _described(items: Sequence[Any], field: tuple[str | int, ...]) -> list[dict[str, Any]]:
    _distinct([item.id for item in items], field, "id")
    return [item.model_dump() for item in items]


def _distinct(videos: Sequence[int | str], field: tuple[str | int, ...], *more: str) -> None:
    """Refuse a list with a video twice, naming the second place."""
    if len(set(videos)) < len(videos):
        place = next(i for i, video in enumerate(videos) if video in videos[:i])
        raise Refused(422, f"video {videos[place]} is there twice", (*field, place, *more))


def _answer(ranked: Slate, scores: bool) -> dict[str, Any]:
    """Return an `api.Ranked`."""
    main = list(ranked.scores.values())[-1]

    def known(x):
        return None if math.isnan(x) else x

    every = {name: [known(x) for x in column.tolist()] for name, column in ranked.scores.items()} if scores else None
    pairs = zip(ranked.videos.tolist(), ranked.positions, strict=True)
    return {
        "request_id": ranked.request,
        "artifact": ranked.artifact,
        "arm": ranked.arm,
        "position": ranked.position,
        "slate": [{"video": video, "score": float(main[place])} for video, place in pairs],
        "log_propensity": ranked.log_propensity,
        "unknown": ranked.unknown,
        "unknown_history": ranked.unknown_history,
        "scores": every,
    }


def _table(signals: Sequence[str], given: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Convert models of `api.video_feedback` to videos [m] and their feedback [m, S]."""
    videos = feedback_log.ids_of([v.video for v in given])
    rows = [[getattr(v, name) for name in signals] for v in given]
    return videos, np.array(rows, np.float32).reshape(-1, len(signals))
