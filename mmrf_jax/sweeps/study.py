"""A study of many runs: its variants, and the folder of each run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections

from mmrf_jax.training import configs, run_folder


class Study(NamedTuple):
    """A study's config, its output folder, and the folder of its runs."""

    config: Any
    out: Path
    runs_dir: Path

    def names(self) -> list[str]:
        """Return the variants, the reference first."""
        return sorted(self.config.variants, key=lambda name: (name != self.config.reference, name))

    def against(self) -> dict[str, str]:
        """Return the references of the variants that are not compared with the study's reference."""
        return dict(self.config.get("against", {}))

    def arms(self) -> list[str]:
        """Return the arms of the A/B tests, in the order of the tables."""
        return [*self.names(), *self.config.arms]

    def configs(self, seed: int) -> dict[str, configs.Run]:
        return {name: run_config(self.config, name, seed) for name in self.names()}


def run_config(config, variant: str, seed: int) -> configs.Run:
    """Return the config of one run of a study.

    Raises:
      ValueError: if a variant sets a field that runs do not have.
    """
    run = ml_collections.ConfigDict(config.run.to_dict()).lock()
    for name, value in run_folder.flat_config(config.variants[variant].to_dict()).items():
        try:
            run.update_from_flattened_dict({name: value})
        except (AttributeError, KeyError) as error:
            raise ValueError(
                f"variant {variant} sets {name}, which runs do not have; the fields are those of config.run"
            ) from error
    return dataclasses.replace(configs.run_of(run.to_dict()), seed=seed, seeds=1)


def run_place(config, runs_dir: Path) -> Path:
    """Return the folder of a config's run, which all studies share."""
    fixed = {
        name: value
        for name, value in run_folder.flat_config(configs.as_dict(config)).items()
        if not run_folder.is_free(name)
    }
    return runs_dir / hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:16]


def free_programs() -> None:
    """Free compiled programs: each holds memory maps, and many runs in one process would exceed the system's limit."""
    jax.clear_caches()
