"""The artefacts that a service ranks with: loaded, swapped when their links move, and split among the users."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmrf_jax.abtest import assignment
from mmrf_jax.data.readers import feedback_log
from mmrf_jax.data.readers.feedback_log import Record
from mmrf_jax.io.progress import say
from mmrf_jax.serving import artifact, new_items
from mmrf_jax.serving.ranker import Ranker
from mmrf_jax.serving.requests import Settings

RELOAD_SECONDS, RETRY_SECONDS = 1.0, 10.0


@dataclasses.dataclass
class Arm:
    """An arm of the traffic.

    Attributes:
      name: "a" or "b".
      path: folder of its artefact, or a link to it.
      tried: the last artefact found there.
      ranker: the artefact that ranks.
      failed_swap: why the newest artefact does not rank.
      again: time from which an artefact that failed is tried again.
    """

    name: str
    path: Path
    tried: Path
    ranker: Ranker
    failed_swap: str | None = None
    again: float = math.inf


class Arms:
    """One artefact, or two with the users split between them."""

    def __init__(self, settings: Settings):
        """Load and compile the artefacts.

        Raises:
          ArtifactError: for an unusable artefact, or two for different requests.
        """
        self._settings = settings
        paths = {"a": settings.artifact} | ({} if settings.artifact_b is None else {"b": settings.artifact_b})
        self.all: list[Arm] = []
        for name, path in paths.items():
            tried = path.resolve()
            self.all.append(Arm(name, path, tried, self.loaded(tried)))

    def of(self, user: int | str) -> Arm:
        """Return the arm that a user is assigned to."""
        if len(self.all) == 1:
            return self.all[0]
        number, share = np.array([feedback_log.user_number(user)], np.uint64), self._settings.split
        return self.all[int(assignment.assign(number, (1.0 - share, share), self._settings.experiment)[0])]

    @property
    def rankers(self) -> list[Ranker]:
        return [arm.ranker for arm in self.all]

    @property
    def failed_swap(self) -> str | None:
        """Return why a newest artefact does not rank."""
        return next((arm.failed_swap for arm in self.all if arm.failed_swap is not None), None)

    def loaded(self, folder: Path) -> Ranker:
        """Load and compile an artefact that fits the one that ranks already."""
        first = self.all[0].ranker if self.all else None
        loaded = artifact.load(folder, None if first is None else first.spec)
        made = Ranker(loaded, self._settings.max_candidates, self._settings.max_new_items)
        if first is not None and (made.video_ids, made.user_ids) != (first.video_ids, first.user_ids):
            raise artifact.ArtifactError(
                f"{folder} has {made.video_ids} ids of videos and {made.user_ids} ids of users, not {first.video_ids} "
                f"and {first.user_ids}; export a run that was trained on the same kind of log"
            )
        made.warm()
        return made

    async def changed(self, arm: Arm) -> Ranker | None:
        """Return the ranker of an arm whose link has moved, or of one to be tried again; None if there is none."""
        try:
            there = await asyncio.get_running_loop().run_in_executor(None, arm.path.resolve)
            if there == arm.tried and time.monotonic() < arm.again:
                return None
            arm.tried = there
            new = await asyncio.get_running_loop().run_in_executor(None, self.loaded, there)
        except Exception as error:  # on any error the current artefact keeps ranking
            arm.again = time.monotonic() + RETRY_SECONDS  # it may still be being copied
            said, arm.failed_swap = arm.failed_swap, str(error) or type(error).__name__
            if arm.failed_swap != said:
                say(f"artefact not changed: {arm.failed_swap}")
            raise
        arm.again = math.inf
        return new


def add_stored(serving: Ranker, items: Sequence[Record]) -> None:
    """Add the items of a store to a ranker, and say which of them it cannot take."""
    usable, wrong = [], []
    for item in items:
        try:
            serving.check(item)
            usable.append(item)
        except new_items.Undescribed as error:
            wrong.append(f"item {item['id']!r}: {error}")
    left = serving.add(usable)
    wrong += [f"item {id_!r}: more than max_new_items" for id_ in left]
    if wrong:
        say(f"{len(wrong)} new items are not ranked by artefact {serving.id}, the first: {wrong[0]}")
