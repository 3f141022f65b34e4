"""Random ragged session logs, and items for them."""

import jax
import numpy as np

from mmrf_jax import types
from mmrf_jax.data.session_log import InputSpec, Sessions

SPEC = InputSpec(
    num_videos=50,
    num_authors=5,
    num_tags=4,
    num_users=0,
    item_features=3,
    profile=4,
    context=2,
    candidates=10,
    slate=3,
    history=5,
)


def make_items() -> types.Items:
    rng, v = np.random.default_rng(3), SPEC.num_videos
    return types.Items(
        author=rng.integers(0, 5, v),
        tag=rng.integers(0, 4, v),
        duration=rng.uniform(5, 60, v).astype(np.float32),
        features=rng.normal(size=(v, 3)).astype(np.float32),
        embedding_id=np.arange(v),
        num_embeddings=v,
        num_authors=5,
        num_tags=4,
    )


def make_log(seed: int, sessions: int, scores: bool = True, spec: InputSpec = SPEC, longest: int = 9) -> Sessions:
    rng = np.random.default_rng(seed)
    s = len(spec.signals)
    lengths = rng.integers(1, longest + 1, sessions)
    r = int(lengths.sum())
    candidates = rng.random((r, spec.num_videos)).argsort(1)[:, : spec.candidates].astype(np.int32)
    slate = rng.random((r, spec.candidates)).argsort(1)[:, : spec.slate].astype(np.int32)
    slate[np.arange(spec.slate) >= rng.integers(1, spec.slate + 1, r)[:, None]] = -1
    mask = np.arange(spec.history) >= rng.integers(0, spec.history + 1, sessions)[:, None]
    terminated = rng.random(sessions) < 0.6
    return Sessions(
        user_id=rng.integers(0, 1000, sessions).astype(np.int32),
        date=rng.integers(20220430, 20220432, sessions).astype(np.int32),
        profile=rng.normal(size=(sessions, spec.profile)).astype(np.float32),
        history_videos=np.where(mask, rng.integers(0, spec.num_videos, mask.shape), 0).astype(np.int32),
        history_feedback=(rng.random((sessions, spec.history, s)) * mask[..., None]).astype(np.float32),
        history_mask=mask,
        terminated=terminated,
        truncated=~terminated,
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        context=rng.normal(size=(r, spec.context)).astype(np.float32),
        candidates=candidates,
        slate=slate,
        feedback=(rng.random((r, spec.slate, s)) * (slate >= 0)[..., None]).astype(np.float32),
        log_propensity=np.where(rng.random(r) < 0.2, np.nan, -rng.random(r)).astype(np.float32),
        scores=rng.normal(size=(r, spec.candidates)).astype(np.float32) if scores else None,
    )


def same_bits(here, there) -> None:
    """Trees of arrays with equal shapes, types and bits."""
    assert jax.tree.structure(here) == jax.tree.structure(there)
    for (path, x), y in zip(jax.tree.leaves_with_path(here), jax.tree.leaves(there), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.shape, x.dtype) == (y.shape, y.dtype), jax.tree_util.keystr(path)
        assert x.tobytes() == y.tobytes(), jax.tree_util.keystr(path)
