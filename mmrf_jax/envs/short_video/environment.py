"""The world as a public environment, `mmrf.make("short-video")`."""

from __future__ import annotations

from mmrf_jax.envs.short_video import env
from mmrf_jax.envs.short_video.config import VARIANTS, WorldConfig

#: Names of configs in messages, and those of the arguments.
_ARGUMENTS = {
    "world.candidates": "num_candidates",
    "world.slate": "slate_size",
    "world.history": "history_size",
    "world.": "",
}


def make_short_video(
    num_videos: int = WorldConfig.num_videos,
    num_candidates: int = WorldConfig.candidates,
    slate_size: int = WorldConfig.slate,
    history_size: int = WorldConfig.history,
    max_requests: int = WorldConfig.max_requests,
    variant: str = WorldConfig.variant,
    seed: int = WorldConfig.seed,
) -> env.ShortVideoEnv:
    """Return the short-video world: users with hidden tastes watch, like, get bored and leave.

    Args:
      num_videos: V, videos of the catalogue.
      num_candidates: C of a request; all V if it is `num_videos`.
      slate_size: K, videos shown at a time.
      history_size: H, exposures in `obs.history`.
      max_requests: longer sessions are truncated.
      variant: `base`; `users`: another mix of users and habits; `exit_hazard`: users leave for other reasons; `sparse`:
        watch time is noisy and says little about staying, explicit feedback is frequent and says more.
      seed: of the catalogue and of the users' hidden traits.

    Raises:
      ValueError: for sizes that cannot be.
    """
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant={variant!r}; choose among {', '.join(VARIANTS)}")
    try:
        return env.make_world(
            WorldConfig(
                num_videos=num_videos,
                candidates=num_candidates,
                slate=slate_size,
                history=history_size,
                max_requests=max_requests,
                variant=variant,
                seed=seed,
            )
        )
    except ValueError as error:
        message = str(error)
        for config_name, argument in _ARGUMENTS.items():
            message = message.replace(config_name, argument)
        raise ValueError(message) from None
