"""The sizes needed to build an agent, and the session log that every source produces."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmrf_jax.signals import SHORT_VIDEO, Signals


@dataclasses.dataclass(frozen=True)
class InputSpec:
    """Sizes of all inputs of an agent, and the signals; equal specs can share a checkpoint.

    Attributes:
      num_videos: V.
      num_authors, num_tags: vocabulary sizes, including out-of-vocabulary rows.
      num_users: ids below it may have a user embedding; 0 if there are too many users or each comes only once.
      item_features: Di.
      profile: Du.
      context: Dx.
      candidates: C of a request.
      slate: K.
      history: H.
      signals: the S signals of feedback arrays, and those with an agent.
    """

    num_videos: int
    num_authors: int
    num_tags: int
    num_users: int
    item_features: int
    profile: int
    context: int
    candidates: int
    slate: int
    history: int
    signals: Signals = SHORT_VIDEO

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> InputSpec:
        """Make a spec from its fields, as `dataclasses.asdict` and JSON give them.

        Raises:
          TypeError: for a missing or unknown field.
          ValueError: for signals that cannot be.
        """
        given = {"signals": Signals.from_dict(values["signals"])} if "signals" in values else {}
        return cls(**{**values, **given})

    def differing(self, other: InputSpec) -> dict[str, tuple[Any, Any]]:
        """Return the fields in which two specs differ, with both values; of signals, their names and kinds."""

        def plain(value: Any) -> Any:
            return value.described if isinstance(value, Signals) else value

        names = [field.name for field in dataclasses.fields(self)]
        pairs = {name: (plain(getattr(self, name)), plain(getattr(other, name))) for name in names}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


@dataclasses.dataclass
class Sessions:
    """Sessions of a log in host memory, one row per session or per request (NumPy, never padded).

    Sessions are in log order; the requests of session n are rows `offsets[n]:offsets[n + 1]` of the request arrays.
    """

    # one row per session, [n, ...]
    user_id: np.ndarray  # [n] int32
    date: np.ndarray  # [n] int32: 20220502 for KuaiRand, the simulated day for the world
    profile: np.ndarray  # [n, Du] float32
    history_videos: np.ndarray  # [n, H] int32, oldest first, aligned to the right end
    history_feedback: np.ndarray  # [n, H, S] float32
    history_mask: np.ndarray  # [n, H] bool
    terminated: np.ndarray  # [n] bool, the user left after the last request
    truncated: np.ndarray  # [n] bool, the log was cut after the last request
    offsets: np.ndarray  # [n + 1] int64
    # one row per request, [r, ...]
    context: np.ndarray  # [r, Dx] float32
    candidates: np.ndarray  # [r, C] int32, all different
    slate: np.ndarray  # [r, K] int32 positions in candidates; -1 where fewer than K were shown
    feedback: np.ndarray  # [r, K, S] float32
    log_propensity: np.ndarray  # [r] float32, NaN where the logging policy is unknown
    scores: np.ndarray | None  # [r, C] float32 of the logging policy, None where unknown

    @property
    def num_sessions(self) -> int:
        return len(self.user_id)

    @property
    def num_requests(self) -> int:
        return len(self.context)

    def validate(self, spec: InputSpec) -> None:
        """Raise ValueError, naming the field and both shapes, if the log does not fit the spec."""
        n, r, c, k, h, s = (
            self.num_sessions,
            self.num_requests,
            spec.candidates,
            spec.slate,
            spec.history,
            len(spec.signals),
        )
        expected = {
            "profile": (n, spec.profile),
            "history_videos": (n, h),
            "history_feedback": (n, h, s),
            "history_mask": (n, h),
            "offsets": (n + 1,),
            "context": (r, spec.context),
            "candidates": (r, c),
            "slate": (r, k),
            "feedback": (r, k, s),
            "log_propensity": (r,),
        }
        for name, shape in expected.items():
            got = getattr(self, name).shape
            if got != shape:
                raise ValueError(f"log field {name!r} has shape {got}, the spec asks for {shape}; rebuild the log")
        if r and (self.candidates.min() < 0 or self.candidates.max() >= spec.num_videos):
            raise ValueError(f"log has a candidate outside [0, {spec.num_videos}); it was made with another catalogue")
