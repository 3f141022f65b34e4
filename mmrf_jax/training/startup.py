"""JAX's settings for a run: those that decide its numbers, and the cache of compiled programs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from mmrf_jax.io.progress import say

#: Settings that affect a run's numbers, or only check the style of code. They override the environment's values, so
#: that a run gives the same numbers everywhere.
NUMBERS = {
    "jax_enable_x64": False,
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
}
_CACHE = "jax_compilation_cache_dir"


def start_jax() -> None:
    """Import JAX with the settings of a run and a persistent compilation cache.

    Raises:
      ValueError: if JAX cannot read a setting of the environment.
    """
    try:
        import jax
    except ValueError as error:
        given = " ".join(f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("JAX_"))
        raise ValueError(f"JAX does not start with {given} ({error}); correct or unset it") from error
    for name, value in NUMBERS.items():
        if getattr(jax.config, name) != value:
            say(f"{name.upper()} is {getattr(jax.config, name)} here; runs compute with {value}")
            jax.config.update(name, value)
    if getattr(jax.config, _CACHE) and not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return  # the calling program has chosen its cache
    if (cache := cache_folder()) is None:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    jax.config.update(_CACHE, cache)
    if not os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@contextlib.contextmanager
def run_settings(quick: bool) -> Iterator[None]:
    """Compute with the settings of a run in this block; afterwards the caller's own settings hold again.

    Args:
      quick: whether the run's config is a quick one, which compiles for fewer calls.
    """
    import jax

    from mmrf_jax.parallel import programs

    before = {name: getattr(jax.config, name) for name in NUMBERS}
    start_jax()
    compiled = programs.compile_quickly(quick)
    try:
        yield
    finally:
        programs.compile_quickly(compiled)
        for name, value in before.items():
            if getattr(jax.config, name) != value:
                jax.config.update(name, value)


def cache_folder() -> str | None:
    """Return the folder of compiled programs; None if there is none, as for a user without a home directory."""
    given = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if given and "://" in given:
        return given
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
        folder = Path(given) if given else root.expanduser() / "mmrf_jax" / "xla"
        folder.mkdir(parents=True, exist_ok=True)
    except (RuntimeError, OSError):
        return None
    return str(folder) if os.access(folder, os.R_OK | os.W_OK | os.X_OK) else None
