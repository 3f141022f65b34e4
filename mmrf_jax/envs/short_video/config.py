"""Static sizes of the short-video simulator (the world)."""

from __future__ import annotations

import dataclasses

from mmrf_jax import fields
from mmrf_jax.fields import field

VARIANTS = ("base", "users", "exit_hazard", "sparse")


@dataclasses.dataclass(frozen=True)
class WorldConfig:
    """Static sizes. `variant` selects another world: two shifted ones, which are for testing only, and `sparse`."""

    num_videos: int = field(100_000, "V, videos of the catalogue", fields.COUNT)
    candidates: int = field(100, "C; equal to num_videos: every request ranks the whole catalogue", fields.COUNT)
    slate: int = field(6, "K, videos of a slate", fields.COUNT)
    history: int = field(30, "H, exposures that a user arrives with", fields.COUNT)
    max_requests: int = field(64, "T; longer sessions are cut and count as truncated", fields.COUNT)
    seed: int = field(0, "of the catalogue and of the users' hidden traits", fields.NATURAL)
    variant: str = field(
        "base",
        "base; users, exit_hazard: shifted worlds, for testing only; sparse: watch time says little about staying, "
        "likes and other signals say more",
        among=VARIANTS,
    )

    def __post_init__(self):
        fields.check(self, "world")
        if self.candidates > self.num_videos or self.candidates < self.slate:
            raise ValueError(
                f"world.candidates={self.candidates} must lie between world.slate={self.slate} and "
                f"world.num_videos={self.num_videos}"
            )
