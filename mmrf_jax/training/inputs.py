"""What a trained state needs besides its parameters, kept in the run folder: spec, items, and the platform's ids.

    inputs.json    the spec, the sizes of vocabularies, and the version of the code that wrote it
    inputs.npz     arrays by name: the fields of `types.Items`, `video_id` if the platform has its own ids, and
                   `user_id` and `profile` if its users are known, `author_ids` and `tag_ids` if it names those

With them a run folder is ranked with, or exported, without its source of sessions.
"""

from __future__ import annotations

import dataclasses
import zipfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import mmrf_jax
from mmrf_jax import types
from mmrf_jax.data.session_log import InputSpec
from mmrf_jax.io import copies, files
from mmrf_jax.training import run_folder, sources

_ARRAYS = ("author", "tag", "duration", "features", "embedding_id")
_SIZES = ("num_embeddings", "num_authors", "num_tags")
_ABOUT = ("unknown_video", "names", "num_statistics")
_ID, _USERS = "video_id", ("user_id", "profile")
_VOCABULARIES = {"author": "author_ids", "tag": "tag_ids"}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Spec and items of a run.

    Attributes:
      spec: sizes of the agents' inputs.
      items: the items; their features include the newest statistics.
      video_ids: the platform's ids [V]; None if these are the row numbers.
      users: ids and features of the users; see `sources.Source`.
      unknown_video: row of any other video; None if there is none.
      names: encoders of features by name; see `sources.Source`.
      num_statistics: how many features at the end of an item's are running means of feedback.
      vocabularies: ids of authors and tags; see `sources.Source`.
      code: version of the package that trained the run.
    """

    spec: InputSpec
    items: types.Items
    video_ids: np.ndarray | None
    users: dict[str, np.ndarray] | None = None
    unknown_video: int | None = None
    names: dict[str, Any] | None = None
    num_statistics: int = 0
    vocabularies: dict[str, np.ndarray] | None = None
    code: str = mmrf_jax.__version__


def inputs_of_source(source: sources.Source) -> Inputs:
    """Return the inputs of a source whose items are on this process's devices."""
    items = source.items
    added = 0 if items.statistics is None else items.statistics.shape[-1]
    if items.statistics is not None:
        features = items.features_of(jnp.arange(items.num_videos))
        items = dataclasses.replace(items, features=features, dates=None, statistics=None)
    ids = None if source.video_ids is None else source.video_ids()
    known = source.users, source.unknown_video, source.names, added, source.vocabularies
    return Inputs(source.spec, items, ids, *known)


def write_inputs(workdir: Path, inputs: Inputs) -> None:
    """Write the inputs of a run, unless its folder has them."""
    if (workdir / "inputs.json").exists():
        return
    arrays = {name: np.asarray(getattr(inputs.items, name)) for name in _ARRAYS}
    if inputs.video_ids is not None:
        arrays[_ID] = inputs.video_ids
    arrays |= inputs.users or {}
    arrays |= {_VOCABULARIES[name]: ids for name, ids in (inputs.vocabularies or {}).items()}
    files.write_arrays(workdir / "inputs.npz", arrays)
    sizes = {name: getattr(inputs.items, name) for name in _SIZES}
    about: dict[str, Any] = {"spec": dataclasses.asdict(inputs.spec), "sizes": sizes, "code": inputs.code}
    about |= {name: getattr(inputs, name) for name in _ABOUT}
    files.write_json(workdir / "inputs.json", about)  # last: it says that the arrays are complete


def read_inputs(workdir: Path) -> Inputs:
    """Read the inputs of a run.

    Raises:
      ValueError: if there are none, or if they are damaged.
    """
    path = workdir / "inputs.json"
    if not path.exists():
        raise ValueError(
            f"{workdir} has no inputs.json, which a run writes when it starts; mmrf train --workdir={workdir}"
        )
    again = "remove inputs.json, and `mmrf train` with the same --workdir writes both files again"
    about: dict[str, Any] = run_folder.read_json(path, again)
    try:
        with np.load(copies.local(workdir / "inputs.npz"), allow_pickle=False) as kept:
            arrays: dict[str, Any] = {name: jnp.asarray(kept[name]) for name in _ARRAYS}
            ids = kept[_ID] if _ID in kept.files else None
            users = {name: kept[name] for name in _USERS if name in kept.files} or None
            vocabularies = {name: kept[key] for name, key in _VOCABULARIES.items() if key in kept.files} or None
        items, spec = types.Items(**arrays, **about["sizes"]), InputSpec.from_dict(about["spec"])
        known = {name: about[name] for name in _ABOUT if name in about}
        return Inputs(spec, items, ids, users, vocabularies=vocabularies, code=about["code"], **known)
    except (ValueError, KeyError, TypeError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{workdir / 'inputs.npz'} cannot be read ({error}); {again}") from error
