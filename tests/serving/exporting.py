"""Small artefacts of runs with random parameters."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from mmrf_jax.agents import registry
from mmrf_jax.data import named_features
from mmrf_jax.serving import export
from mmrf_jax.signals import SHORT_VIDEO
from mmrf_jax.training import steps
from mmrf_jax.training.train_state import TrainState

PLAN = steps.TrainConfig("mmrf", tiny.CONFIG, tiny.FEEDBACK, rounds=1, closed_loop=False, slates=1)
VIDEO_IDS = 7 * np.arange(tiny.SPEC.num_videos, dtype=np.int64) + 1_000_000_000_000


def run_state(plan: steps.TrainConfig) -> TrainState:
    """A state of random parameters and rows; all else is ones. Nothing is compiled for it."""
    ones = jnp.ones(len(SHORT_VIDEO))

    def start():
        return steps.init_train_state(jax.random.key(0), plan, tiny.SPEC, tiny.make_items(), ones, ones, ones)

    rng = np.random.default_rng(0)

    def fill(path, x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        learned = {"params", "tables"} & {getattr(part, "name", None) for part in path}
        return jnp.asarray(0.3 * rng.normal(size=x.shape) if learned else np.ones(x.shape), x.dtype)

    return jax.tree_util.tree_map_with_path(fill, jax.eval_shape(start))


def planned(method: str = "mmrf", feedback=tiny.FEEDBACK, **fields) -> tuple[steps.TrainConfig, TrainState]:
    agents = registry.configured(method, dataclasses.replace(tiny.CONFIG, **fields))
    plan = dataclasses.replace(PLAN, method=method, agents=agents, feedback=feedback, slates=int(method == "mmrf"))
    return plan, run_state(plan)


def exported(folder: Path, method: str = "mmrf", **fields) -> tuple[steps.TrainConfig, TrainState, Path]:
    plan, state = planned(method, **fields)
    export.export_run(folder, plan, tiny.SPEC, tiny.make_items(), VIDEO_IDS, state, {"config": {"method": method}})
    return plan, state, folder


NAMES = np.array(["", *(f"item {n}" for n in range(1, tiny.SPEC.num_videos))])
VOCABULARIES = {"author": np.array(["shop a", "shop b", "shop c", "shop d", "shop e"]), "tag": np.array([10, 20, 30])}
USERS = {"user_id": np.array(["", "ann", "bob-1"]), "profile": np.float32([[0, 0, 0], [1, 2, 3], [3, 1, -2]])}


def encoder(name: str, kind: str = "number", mean=(), std=(), log: bool = False, vocabulary=()) -> dict:
    """An encoder as a log's tables give it."""
    return {"name": name, "kind": kind, "mean": mean, "std": std, "log": log, "vocabulary": vocabulary}


def exported_with_names(folder: Path) -> Path:
    """An artefact of string ids whose features have names."""
    plan, state = planned()
    names = {
        "item": [encoder("price", mean=[2.0], std=[4.0]), encoder("age", mean=[0.0], std=[2.0], log=True)],
        "profile": [encoder("points", mean=[1.0], std=[1.0]), encoder("sex", "category", vocabulary=["f"])],
        "context": named_features.plain_encoders(["hour"]),
    }
    about = {"config": {"method": "mmrf"}, "unknown_video": 0, "names": names}
    export.export_run(folder, plan, tiny.SPEC, tiny.make_items(), NAMES, state, about, USERS, VOCABULARIES)
    return folder
