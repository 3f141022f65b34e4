"""Pydantic models of the service's HTTP requests and responses, built for the artefact's spec."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from mmrf_jax.data.session_log import InputSpec
from mmrf_jax.signals import Signals

MAX_USER = 2**31 - 2
_MAX_ID = 2**63 - 1
MOST_TOGETHER = 64  # requests or items in one body
_MAX_SECONDS, _MAX_COUNT = 86_400.0, 2**31 - 1

Number = Annotated[float, Field(allow_inf_nan=False, ge=-1e6, le=1e6, strict=True)]
RequestId = Annotated[str, Field(max_length=220, pattern=r"^[^\x00]+-[0-9]{1,10}$", description="As /rank gave it.")]
EventId = Annotated[
    str,
    Field(
        min_length=1,
        max_length=64,
        description="The caller's own id of the event among those of the request; sent again, it counts once.",
    ),
]


def id_type(kind: str, of: str) -> Any:
    """Return the type of ids that are of a kind of `Ranker`: "string", "integer" or "number"."""
    described = f"The platform's id of {of}."
    if kind == "string":
        return Annotated[
            str, Field(min_length=1, max_length=200, pattern=r"^[^\x00]+$", strict=True, description=described)
        ]
    low, high = (0, MAX_USER) if kind == "number" else (-_MAX_ID, _MAX_ID)
    return Annotated[int, Field(ge=low, le=high, strict=True, description=described)]


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
def video_feedback(signals: Signals, video_ids: str = "integer") -> Any:
    """Return the model of a user's feedback on one video."""
    fields: dict[str, Any] = {signal.name: _answer(signal.kind) for signal in signals.signals}
    made: Any = pydantic.create_model(
        "VideoFeedback", __base__=Strict, video=(id_type(video_ids, "a video"), ...), **fields
    )
    made.__doc__ = "Feedback on one video: flags 0 or 1, durations in seconds, counts, values; what is left out is 0."
    return made


def _feedback(signals: Signals, video_ids: str) -> Any:
    """Return the model of a feedback event."""
    videos: Any = Annotated[list[video_feedback(signals, video_ids)], Field(max_length=64)]  # type: ignore[misc]
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


class ShownVideo(BaseModel):
    """One video of a slate."""

    video: int | str
    score: float = Field(description="Of the main agent.")


class Ranked(BaseModel):
    """A slate, in display order."""

    request_id: str
    artifact: str = Field(description="Id of the artefact that ranked.")
    arm: str = Field(description="Of the traffic split: a, or b.")
    position: int = Field(description="Of the request in the user's session, from 0.")
    slate: list[ShownVideo]
    log_propensity: float = Field(description="Log-probability of the slate; 0 where it is not drawn.")
    unknown: list[int | str] = Field(
        description="Candidates that the artefact does not have and nothing was said of; they are not ranked."
    )
    unknown_history: list[int | str] = Field(description="Videos of the history in the request, likewise; not read.")
    scores: dict[str, list[float | None]] | None = Field(
        default=None,
        description="On request: every agent's scores, in the order of the candidates; null for unknown ones.",
    )


class Taken(BaseModel):
    """What became of described items."""

    new: list[int | str] = Field(description="Those that are ranked from now on.")
    known: list[int | str] = Field(description="Those that were known; the first description stays.")


class Health(BaseModel):
    """The service responds."""

    status: str
    artifact: str
    method: str
    expires: str
    artifact_b: str | None = Field(description="That of arm b of a traffic split.")
    failed_swap: str | None = Field(description="Why the newest artefact is not the one that ranks.")
    warnings: list[str]


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

    rank: Any
    feedback: type[BaseModel]
    items: type[BaseModel]


def either(one: Any, tag: str, other: Any, other_tag: str, is_other: type) -> Any:
    """Return a union chosen by JSON type; `untagged` takes the tags out of the fields of errors."""

    def which(value: Any) -> str:
        return f"<{other_tag}>" if isinstance(value, is_other) else f"<{tag}>"

    union: Any = Annotated[one, pydantic.Tag(f"<{tag}>")] | Annotated[other, pydantic.Tag(f"<{other_tag}>")]
    return Annotated[union, pydantic.Discriminator(which)]


def untagged(field: Sequence[str | int]) -> list[str | int]:
    """Return the field of an error as the caller knows it."""
    return [part for part in field if not (isinstance(part, str) and part.startswith("<"))]


def _features(described: str, names: Sequence[Mapping[str, Any]] | None, most: int, least: int = 0) -> Any:
    """Return the type of features: numbers, or values by name where there are names."""
    numbers = Annotated[list[Number], Field(min_length=least, max_length=most, description=described)]
    if not names:
        return numbers
    said = f"{described} By name: {', '.join(one['name'] for one in names)}."
    by_name = Annotated[dict[str, pydantic.JsonValue], Field(max_length=len(names), description=said)]
    return either(numbers, "numbers", by_name, "names", dict)


def _value_type(kind: str | None, of: str) -> Any:
    """Return the type of authors or tags: texts or integers as in the log, or row numbers where no kind is known."""
    if kind is None:
        return Annotated[int, Field(ge=0, le=2**31 - 1, strict=True)]
    described = f"The platform's id of {of}; a new one counts as unknown."
    integer = Annotated[int, Field(ge=-_MAX_ID, le=_MAX_ID, strict=True, description=described)]
    if kind == "integer":
        return integer
    text = Annotated[str, Field(max_length=200, strict=True, description=described)]
    return either(text, "text", integer, "integer", int)


def _item(spec: InputSpec, video_ids: str, names: Mapping[str, Any], vocabularies: Mapping[str, str]) -> Any:
    """Return the model of an item that the artefact does not have."""
    features = _features("Of the item; left out, the average.", names.get("item"), spec.item_features)
    author = _value_type(vocabularies.get("author"), "the author")
    tag = _value_type(vocabularies.get("tag"), "the tag")
    seconds = Annotated[float, Field(ge=0.0, le=_MAX_SECONDS, strict=True, description="Seconds.")]
    fields: dict[str, Any] = {
        "id": (id_type(video_ids, "a video"), ...),
        "features": (features | None, None),
        "author": (author | None, None),
        "tag": (tag | None, None),
        "duration": (seconds, 0.0),
    }
    made: Any = pydantic.create_model("Item", __base__=Strict, **fields)
    made.__doc__ = "An item that arrived after the export: it is ranked from what is said of it, and logged."
    return made


def models(
    spec: InputSpec,
    max_candidates: int,
    video_ids: str = "integer",
    user_ids: str = "number",
    names: Mapping[str, Any] | None = None,
    vocabularies: Mapping[str, str] | None = None,
) -> Models:
    """Build the request models of a spec; kinds of ids and names of features are those of a `Ranker`."""
    names = names or {}
    profile = "Features of the user; left out, those given last, or those of the training, or zeros."
    Profile: Any = _features(profile, names.get("profile"), spec.profile, spec.profile)
    context = "Of the request; the service adds the position in the session."
    Context: Any = _features(context, names.get("context"), spec.context - 1, spec.context - 1)
    description = "What a user who is new to the service was shown before, oldest first; else not read."
    History: Any = Annotated[
        list[video_feedback(spec.signals, video_ids)],  # type: ignore[misc]
        Field(max_length=spec.history, description=description),
    ]
    many = Field(min_length=1, max_length=max_candidates, description="Videos, all different.")
    Candidates: Any = Annotated[list[id_type(video_ids, "a video")], many]  # type: ignore[misc]
    Item: Any = _item(spec, video_ids, names, vocabularies or {})
    K: Any = Annotated[int, Field(ge=1, le=spec.slate, strict=True, description="Videos wanted.")]
    Scores: Any = Annotated[bool, Field(strict=True, description="Whether to say every agent's scores.")]
    New: Any = Annotated[bool, Field(strict=True, description="Whether a session begins, however short the pause.")]
    some = Field(max_length=MOST_TOGETHER, description="What the service must know of videos that the artefact lacks.")
    fields: dict[str, Any] = {
        "id": (id_type(user_ids, "the user"), ...),
        "profile": (Profile | None, None),
        "history": (History | None, None),
    }
    user: Any = pydantic.create_model("User", __base__=Strict, **fields)
    fields = {
        "user": (user, ...),
        "context": (Context, ...),
        "candidates": (Candidates, ...),
        "items": (Annotated[list[Item], some], []),
        "k": (K, spec.slate),
        "new_session": (New, False),
        "scores": (Scores, False),
    }
    rank: Any = pydantic.create_model("Rank", __base__=Strict, **fields)
    user.__doc__, rank.__doc__ = "Who asks.", "A request for a slate."
    described = Annotated[list[Item], Field(min_length=1, max_length=MOST_TOGETHER)]
    items: Any = pydantic.create_model("Items", __base__=Strict, items=(described, ...))
    items.__doc__ = "Items that the artefact does not have."
    several = Annotated[list[rank], Field(min_length=1, max_length=MOST_TOGETHER)]
    return Models(either(rank, "one", several, "several", list), _feedback(spec.signals, video_ids), items)
