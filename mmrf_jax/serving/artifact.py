"""A trained ranker as a self-contained folder: exported functions, arrays and a manifest.

    manifest.json        versions, the run's config and metrics, the spec, the signature of each function, and the
                         size and SHA-256 of every other file except
    manifest.sha256      the SHA-256 of the manifest
    functions/NAME.bin   a function serialised by `jax.export`: StableHLO for CPUs, CUDA GPUs and TPUs, with symbolic
                         sizes of batch and candidates
    arrays/GROUP.npz     arrays by name: parameters, embedding tables, items, vocabularies

Nothing in it is pickled: loading it runs no code of its author except those functions. JAX reads its serialised
functions for about six months, so an artefact has an expiry date.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export

import mmrf_jax
from mmrf_jax.data.session_log import InputSpec
from mmrf_jax.io import copies, files

VERSION = 3
MANIFEST = "manifest.json"
PLATFORMS = ("cpu", "cuda", "tpu")
VALID_DAYS = 180
_OF_MANIFEST = "manifest.sha256"
_SOURCE_FILES = "jax_hlo_source_file_canonicalization_regex"  # what JAX removes from the paths of source files
_LIBRARIES = ("jax", "jaxlib", "flax", "numpy")

SEPARATOR = "|"  # between the parts of nested weight names

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Function:
    """A function to export: `call` takes dictionaries and arrays; the shapes of its arguments may be symbolic."""

    call: Callable[..., Any]
    arguments: tuple[Any, ...]  # pytrees of jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A loaded artefact.

    Attributes:
      id: the first 16 digits of the manifest's SHA-256; artefacts with equal ids have equal bytes.
      manifest: the manifest.
      spec: spec of its requests.
      functions: by name; `call` of each, under `jax.jit`, takes arrays of any size that the signature allows.
      arrays: {group: {name: array}}.
    """

    id: str
    manifest: dict[str, Any]
    spec: InputSpec
    functions: Mapping[str, export.Exported | Function]
    arrays: dict[str, Arrays]


class ArtifactError(ValueError):
    """An unusable artefact; the message names it, the problem and the fix."""


def write(
    folder: Path, functions: dict[str, Function], arrays: dict[str, Arrays], spec: InputSpec, about: dict[str, Any]
) -> str:
    """Write an artefact atomically and return its id.

    Args:
      folder: folder to create.
      functions: functions to export, by name.
      arrays: {group: {name: array}}.
      spec: spec of the requests.
      about: additional contents of the manifest: config, training metrics.

    Raises:
      FileExistsError: if the folder exists.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists; remove it or export to another folder")
    now = datetime.datetime.now(datetime.UTC)
    manifest: dict[str, Any] = about | {
        "version": VERSION,
        "created": now.isoformat(timespec="seconds"),
        "expires": (now + datetime.timedelta(days=VALID_DAYS)).isoformat(timespec="seconds"),
        "code": about.get("code", mmrf_jax.__version__),
        "libraries": {name: metadata.version(name) for name in _LIBRARIES},
        "platforms": list(PLATFORMS),
        "spec": dataclasses.asdict(spec),
        "functions": {},
    }
    with files.new_folder(folder) as made:
        (made / "functions").mkdir()
        (made / "arrays").mkdir()
        for name, function in functions.items():
            with _without_folders():
                lowered = export.export(jax.jit(function.call), platforms=PLATFORMS)(*function.arguments)
            (made / "functions" / f"{name}.bin").write_bytes(lowered.serialize())
            manifest["functions"][name] = {
                "calling_convention_version": lowered.calling_convention_version,
                "in": [str(aval) for aval in lowered.in_avals],
                "out": [str(aval) for aval in lowered.out_avals],
            }
        for group, named in arrays.items():
            files.write_arrays(made / "arrays" / f"{group}.npz", named)
        manifest["files"] = {
            str(path.relative_to(made)): {"bytes": path.stat().st_size, "sha256": _digest(path)}
            for path in sorted(made.rglob("*"))
            if path.is_file()
        }
        files.write_json(made / MANIFEST, manifest)
        digest = _digest(made / MANIFEST)
        files.write_text(made / _OF_MANIFEST, f"{digest}\n")
        return digest[:16]


@contextlib.contextmanager
def _without_folders() -> Iterator[None]:
    """Export functions in this block with the bare names of source files, not with paths of this machine."""
    before = getattr(jax.config, _SOURCE_FILES)
    jax.config.update(_SOURCE_FILES, r".*[/\\]")
    try:
        yield
    finally:
        jax.config.update(_SOURCE_FILES, before)


def load(folder: Path, spec: InputSpec | None = None) -> Artifact:
    """Read an artefact and check all of it.

    Args:
      folder: the artefact, or a link to it.
      spec: spec of the caller's requests; None accepts any. Vocabulary sizes and the number of candidates may
        differ, since they do not change the format of a request.

    Raises:
      ArtifactError: if anything is missing, damaged, expired, of another version, or made for other requests.
    """
    folder = folder.resolve()  # a link may be moved to another artefact while this one is read
    manifest = read_manifest(folder)
    again = "export the run again"
    if manifest["version"] != VERSION:
        raise ArtifactError(f"{folder} has version {manifest['version']}, this code reads {VERSION}; {again}")
    expires = datetime.datetime.fromisoformat(manifest["expires"])
    if datetime.datetime.now(datetime.UTC) > expires:
        raise ArtifactError(
            f"{folder} expired on {expires:%Y-%m-%d}: JAX reads what it has exported for {VALID_DAYS} days; {again}"
        )
    found = InputSpec.from_dict(manifest["spec"])
    if spec is not None:
        check_spec(folder, found, spec)
    here = copies.local(folder)
    for name, known in manifest["files"].items():
        path = here / name
        if not path.is_file():
            raise ArtifactError(f"{path} is missing though {MANIFEST} names it; {again}")
        if path.stat().st_size != known["bytes"]:
            raise ArtifactError(f"{path} has {path.stat().st_size} bytes, {MANIFEST} says {known['bytes']}; {again}")
        if _digest(path) != known["sha256"]:
            raise ArtifactError(f"{path} is damaged: its SHA-256 is not the one in {MANIFEST}; {again}")
    try:
        functions = {
            name: export.deserialize(bytearray((here / "functions" / f"{name}.bin").read_bytes()))
            for name in manifest["functions"]
        }
        arrays = {}
        for path in sorted(here / name for name in manifest["files"] if name.startswith("arrays/")):
            with np.load(path, allow_pickle=False) as group:
                arrays[path.stem] = {name: group[name] for name in group.files}
    except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        made_by = manifest["libraries"]
        raise ArtifactError(f"{folder}, written by {made_by}, cannot be read here ({error}); {again}") from error
    return Artifact(_digest(here / MANIFEST)[:16], manifest, found, functions, arrays)


def nested(flat: Arrays) -> dict[str, Any]:
    """Nest the named arrays of a group as the functions expect them."""
    tree: dict[str, Any] = {}
    for name, array in flat.items():
        *path, last = name.split(SEPARATOR)
        branch = tree
        for part in path:
            branch = branch.setdefault(part, {})
        branch[last] = array
    return tree


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest alone.

    Raises:
      ArtifactError: if it is missing or invalid.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtifactError(f"{folder} is no artefact: it has no {MANIFEST}; make one with `mmrf export`")
    needed = ("version", "created", "expires", "libraries", "spec", "functions", "files")
    digest_file = folder / _OF_MANIFEST
    if not digest_file.is_file():
        raise ArtifactError(f"{digest_file} is missing; export the run again")
    if digest_file.read_text().strip() != _digest(path):
        raise ArtifactError(f"{path} is damaged: its SHA-256 is not the one in {_OF_MANIFEST}; export the run again")
    try:
        manifest = json.loads(path.read_text())
        if lacking := [name for name in needed if name not in manifest]:
            raise ValueError(f"it lacks {lacking[0]!r}")
        InputSpec.from_dict(manifest["spec"])
        if datetime.datetime.fromisoformat(manifest["expires"]).tzinfo is None:
            raise ValueError("'expires' has no time zone")
        if not all({"bytes", "sha256"} <= known.keys() for known in manifest["files"].values()):
            raise ValueError("'files' lacks sizes or checksums")
    except (ValueError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} cannot be used ({error}); export the run again") from error
    return manifest


def check_spec(what: object, found: InputSpec, wanted: InputSpec) -> None:
    """Check that an artefact fits the format of the requests.

    Raises:
      ArtifactError: naming the first size that differs, or the signals.
    """
    differing = found.differing(wanted)
    for name in ("profile", "context", "item_features", "slate", "history", "signals"):
        if name in differing:
            have, need = differing[name]
            raise ArtifactError(
                f"{what} was made for another spec: {name}={have}, and {need} is needed; export a run that was "
                "trained on the same kind of log"
            )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
