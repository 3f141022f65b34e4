"""Propensities of a log with an unknown ranker: a behaviour model fitted to its exposures, and the model's calibration.

The model is a conditional logit over the candidates of each request (McFadden 1974), with one hidden layer. Each slot
chooses among the candidates that the slots above it left, which is Plackett–Luce. A fitted share of the slots is filled
at random: without it single propensities are far too small, and the weights of those videos dominate. KuaiRand's
candidates are the exposed videos and uniform samples of the live ones. With such sampled alternatives the likelihood
among them estimates the choice among all (McFadden 1978), and propensities are relative to the set, as are the
probabilities of the evaluated ranker.
The model is cross-fitted: a user's propensities come from a model fitted without that user's requests.
Letters: r requests, F features, and C, K, V of `types`.
"""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mmrf_jax import ops, types
from mmrf_jax.data import statistics
from mmrf_jax.data.session_log import Sessions
from mmrf_jax.io import tables
from mmrf_jax.metrics import ranking
from mmrf_jax.ope import propensity
from mmrf_jax.signals import Signals

_HIDDEN, _BATCH, _EPOCHS, _RATE, _DECAY = 32, 256, 5, 0.01, 1e-3
_OPTIMISER = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(_DECAY))
_MAX_REQUESTS = 20_000  # upper limit for the fit and for the calibration
_BLOCK = 4_096  # requests whose features are held at a time


def log_propensities(
    log: Sessions, items: types.Items, signals: Signals, past: list[Sessions], folds: int = 3, seed: int = 0
) -> tuple[np.ndarray, dict[str, Any]]:
    """Fit the behaviour policy of a log, cross-fitted over folds of users.

    Args:
      past: logs of earlier days, for the running means; the log's own earlier days are added.
      folds: of users, at least 2.
      seed: of the folds, of the sample that is fitted on, and of the order of batches.

    Returns:
      Log-propensity [r, K] of each slot given the slots above it, 0 where nothing was shown; and {"nats": mean
      −log-propensity of an exposure, "nats_uniform": the same for equal scores, "random": share of slots filled at
      random, "requests_fitted", "by_decile": [{"predicted", "actual": mean propensity and share that was exposed,
      "rows"}]}. The deciles are of the predicted propensities of all candidates that could fill a slot.

    Raises:
      ValueError: for fewer than 2 folds, or fewer users than folds.
    """
    users, user = np.unique(log.user_id, return_inverse=True)
    if not 2 <= folds <= len(users):
        raise ValueError(f"{folds} folds of {len(users)} users; use at least 2 folds and as many users")
    rng = np.random.default_rng(seed)
    fold = (rng.permutation(len(users)) % folds)[user][np.repeat(np.arange(log.num_sessions), np.diff(log.offsets))]
    videos = _VideoTables(log, items, signals, past)
    fitted = np.sort(rng.permutation(log.num_requests)[:_MAX_REQUESTS])
    x = videos.features(fitted)
    mean, std = x.mean(axis=(0, 1)), x.std(axis=(0, 1)) + 1e-6
    x = (x - mean) / std
    models = [_fit(x[fold[fitted] != f], log.slate[fitted[fold[fitted] != f]], rng) for f in range(folds)]
    parts, block = [], min(_BLOCK, log.num_requests)
    for first in range(0, log.num_requests, block):
        rows = np.arange(first, first + block) % log.num_requests  # equal block sizes need one compilation
        each = np.stack([_scores(model, (videos.features(rows) - mean) / std) for model in models])
        parts.append(each[fold[rows], np.arange(block)])
    scores = np.concatenate(parts)[: log.num_requests]
    random = np.array([1.0 / (1.0 + np.exp(-float(model["random"]))) for model in models])
    result = {"requests_fitted": len(fitted), "random": float(random.mean())}
    random = random[fold]
    return log_prob(scores, log.slate, random), result | calibration(scores, log.slate, random)


def log_prob(scores: np.ndarray, slate: np.ndarray, random: np.ndarray) -> np.ndarray:
    """Return `propensity.log_prob` [r, K] if a share `random` [r] of slots is filled uniformly from the videos left."""
    shown = slate >= 0
    return _mixed(np, propensity.log_prob(scores, slate), shown, random[:, None], scores.shape[1])


def calibration(scores: np.ndarray, slate: np.ndarray, random: np.ndarray) -> dict[str, Any]:
    """Compute the calibration of `log_prob` on slates [r, K]; see `log_propensities`."""
    scores, slate, random = np.array(scores[:_MAX_REQUESTS], np.float64), slate[:_MAX_REQUESTS], random[:_MAX_REQUESTS]

    def of(scores):
        return float(-log_prob(scores, slate, random)[slate >= 0].mean())

    predicted, actual = [], []
    result: dict[str, Any] = {"nats": of(scores), "nats_uniform": of(np.zeros_like(scores))}
    odds, taken = np.exp(scores - scores.max(axis=1, keepdims=True)), np.zeros(scores.shape, bool)
    for slot in range(slate.shape[1]):
        rows = np.flatnonzero(slate[:, slot] >= 0)
        left = ~taken[rows]
        chosen = slate[rows, slot][:, None] == np.arange(odds.shape[1])
        by_score = np.where(left, odds[rows], 0.0)
        share = random[rows, None]
        p = (1.0 - share) * by_score / by_score.sum(axis=1, keepdims=True) + share / left.sum(axis=1, keepdims=True)
        predicted.append(p[left])
        actual.append(chosen[left])
        taken[rows, slate[rows, slot]] = True
    p, shown = np.concatenate(predicted), np.concatenate(actual)

    def means(groups, scores, part):
        return {
            "predicted": float(p[part].mean()),
            "actual": float(shown[part].mean()),
            "rows": len(part),
        }

    rows = np.arange(len(p))
    result["by_decile"] = [decile.metric for decile in ranking.by_decile(p, rows, p, rows, means)]
    return result


def format_calibration(result: dict[str, Any]) -> str:
    """Format the result of `calibration` as a Markdown table, one row per propensity decile."""
    rows = []
    for i, entry in enumerate(result["by_decile"], 1):
        predicted, actual = entry["predicted"], entry["actual"]
        rows.append([str(i), f"{predicted:.5f}", f"{actual:.5f}", f"{actual / predicted:.3f}"])
    table = tables.markdown(["decile", "mean propensity", "share exposed", "ratio"], rows)
    nats = f"mean −log-propensity of an exposure {result['nats']:.4f}, uniform {result['nats_uniform']:.4f}"
    return f"{table}\n{nats}; slots filled at random {100 * result['random']:.2f} %"


class _VideoTables:
    """Features of a log's candidates: of the video on the request's day, and of its match with the user."""

    def __init__(self, log: Sessions, items: types.Items, signals: Signals, past: list[Sessions]):
        self._log, self._signals = log, signals
        self._keys = [np.arange(items.num_videos), np.asarray(items.author), np.asarray(items.tag)]
        self._session = np.repeat(np.arange(log.num_sessions), np.diff(log.offsets))
        self._days, day = np.unique(log.date, return_inverse=True)
        self._day = day[self._session]
        seen = statistics.exposures([*past, log], signals)
        seen = seen._replace(label=seen.label[:, :2])  # of short videos, clicks and long views
        known = [np.log1p(np.asarray(items.duration))[:, None], np.asarray(items.features)]
        every = np.arange(items.num_videos)
        self._tables = []  # [V, ...] per day
        for date in self._days:
            today = np.full(len(every), date)
            means = [
                statistics.running_means(seen, key[seen.video], today, key[every], int(key.max()) + 1)
                for key in self._keys
            ]
            self._tables.append(np.concatenate([*means, *known], axis=1).astype(np.float32))

    def features(self, requests: np.ndarray) -> np.ndarray:
        """Return features [r, C, F] float32 of the requests' candidates.

        They are running means and counts over earlier days by video, author and tag; the static features of the video;
        and how often the user has seen, and liked, the same video, author and tag.
        """
        videos, session = self._log.candidates[requests], self._session[requests]
        own = np.empty((*videos.shape, self._tables[0].shape[1]), np.float32)
        for i, table in enumerate(self._tables):
            now = self._day[requests] == i
            own[now] = table[videos[now]]
        seen = self._log.history_videos[session]
        mask = self._log.history_mask[session].astype(bool)
        liked = _liked(self._signals, self._log.history_feedback, self._log.history_mask)[session]
        columns = [own]
        for key in self._keys:
            same = (key[videos][:, :, None] == key[seen][:, None]) & mask[:, None]  # [r, C, H]
            columns += [np.log1p(x.sum(axis=-1, dtype=np.float32))[..., None] for x in (same, same & liked[:, None])]
        return np.concatenate(columns, axis=-1)


def _liked(signals: Signals, feedback: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return which exposures [..., S] were liked: long views, or else the main signal, if numeric above its mean."""
    name = "long_view" if "long_view" in signals.binary_names else signals.main
    values = feedback[..., signals.index(name)]
    if name in signals.binary_names:
        return values > 0.5
    seen = values[mask.astype(bool)]
    return values > (seen.mean() if len(seen) else 0.0)


def _mixed(xp, log_prob, shown, random, candidates: int):
    """Return log((1 − random) exp(log_prob) + random / candidates left), in NumPy or JAX; 0 where nothing was shown."""
    left = candidates - xp.cumsum(shown, axis=-1) + shown
    return xp.where(shown, xp.logaddexp(xp.log1p(-random) + log_prob, xp.log(random / left)), 0.0)


@jax.jit
def _scores(params: Any, x: chex.Array) -> chex.Array:
    """Return scores [r, C] of features [r, C, F]; there is no bias, as a constant within a request has no effect."""
    hidden = jax.nn.gelu(x @ params["in"] + params["shift"])
    return hidden @ params["out"] + x @ params["line"]


def _fit(x: np.ndarray, slate: np.ndarray, rng: np.random.Generator) -> Any:
    """Fit parameters by maximum likelihood, using Adam with weight decay and a cosine learning-rate schedule."""
    features = x.shape[-1]
    params = {
        "in": jnp.asarray(rng.normal(size=(features, _HIDDEN)) / np.sqrt(features), jnp.float32),
        "shift": jnp.zeros(_HIDDEN),
        "out": jnp.zeros(_HIDDEN),
        "line": jnp.zeros(features),
        "random": jnp.asarray(-4.0),  # log-odds that a slot is filled at random
    }
    batch = min(_BATCH, len(x))
    state = _OPTIMISER.init(params)
    order = np.concatenate([rng.permutation(len(x))[: len(x) // batch * batch] for _ in range(_EPOCHS)])
    batches = order.reshape(-1, batch)
    for i, rows in enumerate(batches):
        rate = _RATE * 0.5 * (1.0 + np.cos(np.pi * i / len(batches)))
        params, state = _step(params, state, x[rows], slate[rows], rate)
    return params


@jax.jit
def _step(params: Any, state: Any, x: chex.Array, slate: chex.Array, rate: chex.Numeric):
    def loss(params):
        shown = slate >= 0
        each = ops.plackett_luce_log_prob(_scores(params, x), jnp.maximum(slate, 0), shown)
        return -_mixed(jnp, each, shown, jax.nn.sigmoid(params["random"]), x.shape[1]).sum() / shown.sum()

    updates, state = _OPTIMISER.update(jax.grad(loss)(params), state, params)
    return jax.tree.map(lambda p, u: p - rate * u, params, updates), state
