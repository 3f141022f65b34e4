"""The HTTP application of the ranking service."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import fastapi
import numpy as np
import prometheus_client as prometheus
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

from mmrf_jax.serving import api, guard
from mmrf_jax.serving.service import Asked, Refused, Service

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
    said = _REFUSALS | {404: "There was no such request.", 409: "The request has too many events."}
    said |= {410: "The session of the request is over."}
    return {status: {"model": api.Error, "description": said[status]} for status in (*_REFUSALS, *more)}


def make(service: Service, limits: guard.Limits, routers: Sequence[fastapi.APIRouter] = ()) -> Any:
    """Return the ASGI application of a service; it starts and closes the service.

    Args:
      service: the service.
      limits: limits of requests.
      routers: additional routes, such as those of the page.
    """
    models = api.models(service.ranker.spec, service.settings.max_candidates)
    Rank: Any = models.rank
    Feedback: Any = models.feedback
    signals = service.ranker.spec.signals.names

    @contextlib.asynccontextmanager
    async def lifespan(_):
        await service.start()
        yield
        await service.close()

    # The guard checks the token; this documents it in OpenAPI. The docs pages are off, since they need the internet.
    token = [] if limits.token is None else [fastapi.Depends(HTTPBearer(auto_error=False))]
    app = fastapi.FastAPI(
        title="mmrf_jax",
        description=_DESCRIPTION,
        version="1",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        dependencies=token,
    )

    @app.exception_handler(Refused)
    async def refused(_, error: Refused):
        return _error(error.status, [{"loc": list(error.field), "msg": error.message, "type": "refused"}])

    @app.exception_handler(RequestValidationError)
    async def malformed(_, error: RequestValidationError):
        # The input is left out, since JSON may not represent it: not a number, half of a surrogate pair.
        return _error(422, [{name: one[name] for name in ("loc", "msg", "type")} for one in error.errors()])

    @app.exception_handler(HTTPException)
    async def other(_, error: HTTPException):
        if error.status_code == 400:  # a body that is not text
            return _error(422, [{"loc": ["body"], "msg": str(error.detail), "type": "json_invalid"}])
        return _error(error.status_code, [{"loc": [], "msg": str(error.detail), "type": "refused"}], error.headers)

    @app.post("/rank", response_model=api.Ranked, responses=_refusals())
    async def rank(asked: Rank) -> Any:
        """Rank candidates for a user. The slate is logged before the response."""
        candidates = np.array(asked.candidates, np.int64)
        _, first = np.unique(candidates, return_index=True)
        if len(first) < len(candidates):
            place = int(np.setdiff1d(np.arange(len(candidates)), first)[0])
            raise Refused(422, f"video {candidates[place]} is there twice", ("body", "candidates", place))
        profile, history = asked.user.profile, asked.user.history
        ranked = await service.rank(
            Asked(
                user=asked.user.id,
                candidates=candidates,
                context=np.array(asked.context, np.float32),
                k=asked.k,
                profile=None if profile is None else np.array(profile, np.float32),
                history=None if not history else _table(signals, history),
                new_session=asked.new_session,
            )
        )
        main = list(ranked.scores.values())[-1]
        answer = {
            "request_id": ranked.request,
            "artifact": ranked.artifact,
            "position": ranked.position,
            "slate": [
                {"video": int(v), "score": float(main[p])} for v, p in zip(ranked.videos, ranked.positions, strict=True)
            ],
            "log_propensity": ranked.log_propensity,
            "unknown_candidates": ranked.unknown,
            "scores": None,
        }
        if asked.scores:

            def known(x):
                return None if math.isnan(x) else x

            answer["scores"] = {name: [known(x) for x in column.tolist()] for name, column in ranked.scores.items()}
        return JSONResponse(answer)

    @app.post("/feedback", response_model=api.Acknowledged, responses=_refusals(404, 409, 410))
    async def feedback(event: Feedback) -> Any:
        """Record a user's feedback. It is on disk when acknowledged; repeating the event changes nothing."""
        seen = [v.video for v in event.videos]
        if len(set(seen)) < len(seen):
            place = next(i for i, v in enumerate(seen) if v in seen[:i])
            raise Refused(422, f"video {seen[place]} is there twice", ("body", "videos", place, "video"))
        new = await service.feedback(event.event_id, event.request_id, *_table(signals, event.videos), event.left)
        return JSONResponse({"event_id": event.event_id, "duplicate": not new})

    @app.get(
        "/healthz", response_model=api.Health, responses={503: {"model": api.Error, "description": "Start it again."}}
    )
    async def healthz() -> Any:
        """Report whether the service works, and which artefact ranks."""
        if service.trouble is not None:
            raise Refused(503, service.trouble)
        about = service.ranker.manifest
        return {
            "status": "ok",
            "artifact": service.ranker.id,
            "method": about["method"],
            "expires": about["expires"],
            "failed_swap": service.failed_swap,
        }

    @app.get("/metrics", response_class=Response, responses=_refusals())
    async def metrics() -> Response:
        """Return the metrics for Prometheus."""
        return Response(prometheus.generate_latest(service.metrics.registry), media_type=prometheus.CONTENT_TYPE_LATEST)

    for router in routers:
        app.include_router(router, responses=_refusals())
    return guard.Guard(app, limits, service.metrics)


def _error(status: int, detail: list[dict[str, Any]], headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Return an `api.Error` response."""
    return JSONResponse({"detail": detail}, status, dict(headers or {}))


def _table(signals: Sequence[str], given: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Convert models of `api.video_feedback` to videos [m] and their feedback [m, S]."""
    videos = np.array([v.video for v in given], np.int64)
    rows = [[getattr(v, name) for name in signals] for v in given]
    return videos, np.array(rows, np.float32).reshape(-1, len(signals))
