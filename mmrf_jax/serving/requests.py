"""What the service is asked and answers, checked by its caller."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


class Refused(Exception):
    """A rejected request, with its HTTP status."""

    def __init__(self, status: int, message: str, field: tuple[str | int, ...] = ()):
        super().__init__(message)
        self.status, self.message, self.field = status, message, field


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a service.

    Attributes:
      artifact: the folder of the artefact, or a link to it; when the link moves, the service swaps artefacts.
      log: the folder of the feedback log and the users' store.
      temperature: 0 serves the K best; above 0 samples Plackett–Luce on standardised scores divided by it, so that the
        log contains exploration.
      max_candidates: of one request.
      session_gap: seconds after which a user's next request begins a new session; a clock set back by more than that
        does too.
      users_in_memory: users whose state stays in memory, some 20 kB each; others are read from the store.
      seed: of the sampling, with user and request.
      max_new_items: items that arrive after the export and are ranked all the same.
      artifact_b: the artefact of arm b of a traffic split, likewise; None for no split.
      split: share of the users in arm b, by a hash of their ids.
      experiment: name of the split; splits of different names are independent.
    """

    artifact: Path
    log: Path
    temperature: float = 0.0
    max_candidates: int = 400
    session_gap: float = 1_800.0
    users_in_memory: int = 20_000
    seed: int = 0
    max_new_items: int = 4_096
    artifact_b: Path | None = None
    split: float = 0.0
    experiment: str = "split"


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request for a slate; the caller has checked it against the spec, including ids and values.

    Attributes:
      user: id of the user.
      candidates: [c] the platform's ids, int64 or strings, all different.
      context: [Dx − 1], or {name: value} where the artefact knows names; the service adds the position in the session.
      k: number of videos wanted.
      profile: [Du] or {name: value}, likewise; None for the last one received.
      history: (videos [h], feedback [h, S]) of a user unknown to the service, oldest first.
      new_session: whether a session begins, however short the pause.
    """

    user: int | str
    candidates: np.ndarray
    context: np.ndarray | Mapping[str, Any]
    k: int
    profile: np.ndarray | Mapping[str, Any] | None = None
    history: tuple[np.ndarray, np.ndarray] | None = None
    new_session: bool = False


@dataclasses.dataclass(frozen=True)
class Slate:
    """A slate and all scores.

    Attributes:
      request: id of the request.
      artifact: id of the artefact that ranked.
      arm: "a" or "b" of a traffic split; "a" without one.
      position: of the request in the session.
      videos: [k] in order.
      positions: [k] of the videos among the requested candidates.
      log_propensity: of the slate.
      scores: {agent: [c]}, NaN for a candidate unknown to the artefact.
      unknown: those candidates.
      unknown_history: videos of the history in the request that are unknown to the artefact.
    """

    request: str
    artifact: str
    arm: str
    position: int
    videos: np.ndarray
    positions: np.ndarray
    log_propensity: float
    scores: dict[str, np.ndarray]
    unknown: list[int | str]
    unknown_history: list[int | str]
