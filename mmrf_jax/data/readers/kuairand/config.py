"""Configuration of the conversion of KuaiRand's logs to sessions: splits, days, sizes and gaps."""

from __future__ import annotations

import dataclasses

from mmrf_jax import fields
from mmrf_jax.data.splits import SplitDates
from mmrf_jax.fields import field

_DAY, _MINUTES = "[0, 99991231]", "(0, inf)"
#: By release; see `KuaiRandConfig`.
SESSION_GAP_MINUTES = {"pure": 24 * 60, "1k": 30, "27k": 30}


@dataclasses.dataclass(frozen=True)
class KuaiRandConfig:
    """How logs are converted to sessions.

    `session_gap_minutes` of None is a day for Pure, which contains few videos of each feed, and half an hour for 1K and
    27K.

    Raises:
      ValueError: for invalid values, alone or in combination.
    """

    train_until: int = field(20220502, "last day of training, such as 20220502", _DAY)
    valid_until: int = field(20220503, "last day of validation", _DAY)
    test_from: int = field(20220504, "first day of the test", _DAY)
    candidates: int = field(100, "C, candidates of a request", fields.COUNT)
    slate: int = field(6, "K, the most videos of a request", fields.COUNT)
    history: int = field(32, "H, exposures of a history", fields.COUNT)
    session_gap_minutes: float | None = field(None, "absence that ends a session", _MINUTES)
    request_gap_minutes: float = field(30.0, "the most minutes between two videos of a request", _MINUTES)
    seed: int = field(0, "of the candidates", fields.NATURAL, internal=True)

    def __post_init__(self):
        fields.check(self, "data")
        self.dates  # noqa: B018 validates
        if self.candidates < self.slate:
            raise ValueError(f"candidates={self.candidates} is less than slate={self.slate}; raise candidates")

    @property
    def dates(self) -> SplitDates:
        return SplitDates(self.train_until, self.valid_until, self.test_from)
