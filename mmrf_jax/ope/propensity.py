"""Slate probabilities under the stochastic ranker of any method, and importance weights between two policies.

The weight of an exposed video is the ratio of its conditional Plackett–Luce probabilities given the videos above it.
This module uses float64 NumPy; `ops.plackett_luce_log_prob` is the float32 version on the device.
Letters: r requests, and C, K, S of `types`.
"""

from __future__ import annotations

import numpy as np


def standardised(scores: np.ndarray) -> np.ndarray:
    """Standardise scores [..., C] to mean 0 and standard deviation 1 per request; zeros if all are equal."""
    scores = np.asarray(scores, np.float64)
    centred = scores - scores.mean(axis=-1, keepdims=True)
    spread = centred.std(axis=-1, keepdims=True)
    equal = spread <= 1e-12 * np.abs(scores).max(axis=-1, keepdims=True)
    return np.where(equal, 0.0, centred / np.where(equal, 1.0, spread))


def log_prob(scores: np.ndarray, slate: np.ndarray) -> np.ndarray:
    """Return the Plackett–Luce log-probability [r, K] of each slot given the slots above it; 0 where nothing was shown.

    Args:
      scores: [r, C], already divided by the temperature.
      slate: [r, K] positions in the candidates, in order; −1 where fewer than K were shown.

    Raises:
      ValueError: for inconsistent shapes, scores that are not finite, or positions outside the candidates.
    """
    chosen, rest, _, _ = _slots(scores, slate)
    below = _from_below(chosen, _logsumexp(rest), np.logaddexp)
    return np.where(np.isneginf(chosen), 0.0, chosen - below)


def expectation(scores: np.ndarray, slate: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the mean [r, K, S] of `values` over Plackett–Luce's choice for each slot, given the slots above it.

    Args:
      scores: as in `log_prob`; odds within a request may differ by up to e^700.
      slate: as in `log_prob`; a slot where nothing was shown gets the mean over the candidates left.
      values: [r, C, S].
    """
    chosen, rest, position, largest = _slots(scores, slate)
    odds, rest_odds = np.exp(chosen - largest), np.exp(rest - largest)
    values = np.asarray(values, np.float64)
    shown = np.take_along_axis(values, position[..., None], axis=1) * odds[..., None]
    # A slot may hold the videos shown in it and below it, or the rest. Summing from below avoids cancellation.
    total = _from_below(odds, rest_odds.sum(axis=-1), np.add)
    weighted = np.flip(np.cumsum(np.flip(shown, 1), axis=1), 1) + np.einsum("rc,rcs->rs", rest_odds, values)[:, None]
    return weighted / np.maximum(total, np.finfo(np.float64).tiny)[..., None]


def log_ratio(log_probability: np.ndarray, log_propensity: np.ndarray) -> np.ndarray:
    """Return the log importance weights [n].

    Raises:
      ValueError: for inconsistent shapes, or a propensity that is zero, above one or unknown.
    """
    log_probability, log_propensity = np.asarray(log_probability, np.float64), np.asarray(log_propensity, np.float64)
    if log_probability.shape != log_propensity.shape:
        raise ValueError(
            f"log-probabilities {log_probability.shape} and log-propensities {log_propensity.shape} must be of the "
            "same decisions; compute both from one log"
        )
    bad = np.flatnonzero(~(np.isfinite(log_propensity) & (log_propensity <= 1e-6)).ravel())
    if len(bad):
        raise ValueError(
            f"the propensity of row {bad[0]} is exp({log_propensity.ravel()[bad[0]]}), and no probability in (0, 1]; "
            "leave such rows out, or fit a behaviour model to the log"
        )
    return log_probability - log_propensity


def _slots(scores: np.ndarray, slate: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return scores of slots [r, K] and of unslotted candidates [r, C] (−inf elsewhere), positions, and best score."""
    scores, slate = np.asarray(scores, np.float64), np.asarray(slate)
    if scores.ndim != 2 or slate.ndim != 2 or len(scores) != len(slate):
        raise ValueError(
            f"scores {scores.shape} and slates {slate.shape} must be [r, C] and [r, K] of the same requests"
        )
    if not np.isfinite(scores).all():
        raise ValueError(f"{int((~np.isfinite(scores)).sum())} scores are not finite; give each candidate a finite one")
    if slate.size and not (slate.min() >= -1 and slate.max() < scores.shape[1]):
        raise ValueError(
            f"slates have positions in [{slate.min()}, {slate.max()}], requests have {scores.shape[1]} candidates; "
            "give positions in the candidates, −1 for none"
        )
    shown, position = slate >= 0, np.maximum(slate, 0)
    chosen = np.where(shown, np.take_along_axis(scores, position, axis=1), -np.inf)
    row, slot = np.nonzero(shown)
    rest = scores.copy()
    rest[row, slate[row, slot]] = -np.inf
    return chosen, rest, position, scores.max(axis=1, keepdims=True)


def _from_below(chosen: np.ndarray, rest: np.ndarray, add: np.ufunc) -> np.ndarray:
    """Reduce `rest` [r] and the slots [r, K], from the last slot up to each, by `add`; returns [r, K]."""
    stacked = np.concatenate([rest[:, None], np.flip(chosen, 1)], axis=1)
    return np.flip(add.accumulate(stacked, axis=1)[:, 1:], 1)


def _logsumexp(x: np.ndarray) -> np.ndarray:
    largest = np.maximum(x.max(axis=1), np.finfo(np.float64).min)
    with np.errstate(divide="ignore"):  # no candidate is left if all were shown
        return np.log(np.exp(x - largest[:, None]).sum(axis=1)) + largest
