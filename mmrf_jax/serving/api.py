"""Pydantic models of the service's HTTP requests and responses, built for the artefact's spec."""

from __future__ import annotations

import functools
from typing import Annotated, Any, NamedTuple

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from mmrf_jax.data.session_log import InputSpec
from mmrf_jax.signals import Signals

MAX_USER = 2**31 - 2
_MAX_VIDEO = 2**53 - 1  # the largest integer that every JSON reader preserves
_MAX_SECONDS, _MAX_COUNT = 86_400.0, 2**31 - 1

UserId = Annotated[int, Field(ge=0, le=MAX_USER, strict=True, description="The user's id.")]
VideoId = Annotated[int, Field(ge=0, le=_MAX_VIDEO, strict=True, description="The platform's id of a video.")]
Number = Annotated[float, Field(allow_inf_nan=False, ge=-1e6, le=1e6, strict=True)]
RequestId = Annotated[str, Field(pattern=r"^[0-9]{1,10}-[0-9]{1,10}$", description="As /rank gave it.")]
EventId = Annotated[
    str,
    Field(
        min_length=1,
        max_length=64,
        description="The caller's own id of the event among those of the request; sent again, it counts once.",
    ),
]


class Strict(BaseModel):
    """A part of a request: unknown fields are rejected, not ignored."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


def _answer(kind: str) -> Any:
    """Return the type and the default of a signal."""
    return {
        "binary": (Annotated[int, Field(ge=0, le=1, strict=True)], 0),
        "duration": (Annotated[float, Field(ge=0.0, le=_MAX_SECONDS, strict=True)], 0.0),
        "count": (Annotated[int, Field(ge=0, le=_MAX_COUNT, strict=True)], 0),
        "value": (Number, 0.0),
    }[kind]


@functools.cache
def video_feedback(signals: Signals) -> Any:
    """Return the model of a user's feedback on one video."""
    fields: dict[str, Any] = {signal.name: _answer(signal.kind) for signal in signals.signals}
    made: Any = pydantic.create_model("VideoFeedback", __base__=Strict, video=(VideoId, ...), **fields)
    made.__doc__ = "Feedback on one video: flags 0 or 1, durations in seconds, counts, values; what is left out is 0."
    return made


def _feedback(signals: Signals) -> Any:
    """Return the model of a feedback event."""
    videos: Any = Annotated[list[video_feedback(signals)], Field(max_length=64)]  # type: ignore[misc]
    fields: dict[str, Any] = {
        "event_id": (EventId, ...),
        "request_id": (RequestId, ...),
        "videos": (videos, []),
        "left": (Annotated[bool, Field(strict=True, description="Whether the user has left the session.")], False),
    }
    made: Any = pydantic.create_model("Feedback", __base__=Strict, **fields)
    made.__doc__ = "One feedback event on a request; a request may have several, each with its own id."
    return made


class Acknowledged(BaseModel):
    """The event is on disk."""

    event_id: str
    duplicate: bool = Field(description="Whether it was there already; it then changed nothing.")


class Shown(BaseModel):
    """One video of a slate."""

    video: int
    score: float = Field(description="Of the main agent.")


class Ranked(BaseModel):
    """A slate, in display order."""

    request_id: str
    artifact: str = Field(description="Id of the artefact that ranked.")
    position: int = Field(description="Of the request in the user's session, from 0.")
    slate: list[Shown]
    log_propensity: float = Field(description="Log-probability of the slate; 0 where it is not drawn.")
    unknown_candidates: list[int] = Field(
        description="Candidates that the artefact does not have; they are not ranked."
    )
    scores: dict[str, list[float | None]] | None = Field(
        default=None,
        description="On request: every agent's scores, in the order of the candidates; null for unknown ones.",
    )


class Health(BaseModel):
    """The service responds."""

    status: str
    artifact: str
    method: str
    expires: str
    failed_swap: str | None = Field(description="Why the newest artefact is not the one that ranks.")


class Error(BaseModel):
    """The reason for rejecting a request."""

    class Detail(BaseModel):
        """One reason."""

        loc: list[str | int] = Field(description="The field, such as body, candidates, 3.")
        msg: str
        type: str

    detail: list[Detail]


class Models(NamedTuple):
    """The models that depend on the spec."""

    rank: type[BaseModel]
    feedback: type[BaseModel]


def _numbers(size: int, what: str) -> Any:
    return Annotated[list[Number], Field(min_length=size, max_length=size, description=what)]


def models(spec: InputSpec, max_candidates: int) -> Models:
    """Build the request models of a spec."""
    Profile: Any = _numbers(spec.profile, "Features of the user; left out, those given last, or zeros.")
    Context: Any = _numbers(spec.context - 1, "Of the request; the service adds the position in the session.")
    description = "What a user who is new to the service was shown before, oldest first; else not read."
    History: Any = Annotated[
        list[video_feedback(spec.signals)],  # type: ignore[misc]
        Field(max_length=spec.history, description=description),
    ]
    many = Field(min_length=1, max_length=max_candidates, description="Videos, all different.")
    Candidates: Any = Annotated[list[VideoId], many]
    K: Any = Annotated[int, Field(ge=1, le=spec.slate, strict=True, description="Videos wanted.")]
    Scores: Any = Annotated[bool, Field(strict=True, description="Whether to say every agent's scores.")]
    New: Any = Annotated[bool, Field(strict=True, description="Whether a session begins, however short the pause.")]
    fields: dict[str, Any] = {"id": (UserId, ...), "profile": (Profile | None, None), "history": (History | None, None)}
    user: Any = pydantic.create_model("User", __base__=Strict, **fields)
    fields = {
        "user": (user, ...),
        "context": (Context, ...),
        "candidates": (Candidates, ...),
        "k": (K, spec.slate),
        "new_session": (New, False),
        "scores": (Scores, False),
    }
    rank: Any = pydantic.create_model("Rank", __base__=Strict, **fields)
    user.__doc__, rank.__doc__ = "Who asks.", "A request for a slate."
    return Models(rank, _feedback(spec.signals))
