"""Flattening of a state to a dictionary of named arrays, and the checks that make restoring bit-exact."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from etils import epath

from mmrf_jax.types import PyTree

Spec = dict[str, list]  # leaf name -> [dtype, shape]


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Return the leaves of a tree by path, such as `params/dense/kernel`, in tree order.

    Raises:
      ValueError: if two paths have the same spelling, for example from the keys "a/b" and "a" → "b".
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/") or "state": leaf for path, leaf in flat}
    if len(named) != len(flat):
        raise ValueError("two leaves of the state have the same path; keep '/' out of the keys of its dictionaries")
    return named


def to_arrays(tree: PyTree) -> dict[str, jax.Array | np.ndarray]:
    """Return `named_leaves` with Python scalars converted to arrays of JAX's default width.

    Raises:
      TypeError: for a leaf that is not a number, or that JAX would silently truncate to 32 bits.
    """
    arrays = {}
    for name, leaf in named_leaves(tree).items():
        if isinstance(leaf, bool | int | float):
            leaf = np.asarray(leaf, jax.dtypes.canonicalize_dtype(np.result_type(leaf)))
        if not isinstance(leaf, jax.Array):
            leaf = np.asarray(leaf)
            narrow = jax.dtypes.canonicalize_dtype(leaf.dtype) if leaf.dtype.kind in "biufcV" else None
            if narrow != leaf.dtype:
                raise TypeError(
                    f"the state's leaf {name} has dtype {leaf.dtype}, which JAX cannot hold; "
                    f"store it as {narrow or 'a number'} (large counters as two int32)"
                )
        arrays[name] = leaf
    return arrays


def spec_of(arrays: dict[str, Any]) -> Spec:
    """Return the dtype and shape of each leaf, in a form that survives a JSON round trip."""
    return {name: [str(leaf.dtype), list(leaf.shape)] for name, leaf in arrays.items()}


def targets(tree: PyTree, sharding: jax.sharding.Sharding | None = None) -> PyTree:
    """Return the `ShapeDtypeStruct`s to restore onto.

    Args:
      tree: arrays, or the output of `jax.eval_shape`.
      sharding: sharding of every leaf; with None each leaf retains its sharding.
    """
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding or getattr(leaf, "sharding", None)),
        tree,
    )


def check_targets(wanted: dict[str, Any], saved: Spec, step: int, directory: epath.Path) -> None:
    """Check that the checkpoint fills the targets exactly; orbax would cast a dtype silently.

    Raises:
      ValueError: for a leaf without sharding, missing, left over, or of another shape or dtype.
    """
    for name, leaf in wanted.items():
        if getattr(leaf, "sharding", None) is None:
            raise ValueError(f"the target of {name} has no sharding; build it with `targets(shapes, sharding)`")
    here = spec_of(wanted)
    wrong = [
        f"{n} is {saved[n]} in the checkpoint and {here[n]} here" for n in here if n in saved and saved[n] != here[n]
    ]
    wrong += [f"{n} is not in the checkpoint" for n in here if n not in saved]
    wrong += [f"{n} is in the checkpoint only" for n in saved if n not in here]
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise ValueError(
            f"checkpoint {step} in {directory} holds another state: {'; '.join(wrong[:3])}{more}; "
            "resume with the config that it was saved with, or choose another workdir"
        )


def empty(leaf: Any) -> bool:
    """Return whether a leaf has no elements; orbax rejects such leaves, and they contain nothing to save."""
    return 0 in leaf.shape


def fill_empty(target: jax.ShapeDtypeStruct) -> jax.Array:
    """Return the array without elements that a target describes."""
    return jax.make_array_from_callback(target.shape, target.sharding, lambda _: np.zeros(target.shape, target.dtype))
