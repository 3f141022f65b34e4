"""Always-valid intervals for any number of interim analyses: asymptotic confidence sequences.

Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas, "Time-uniform central limit theory and asymptotic confidence
sequences" (Annals of Statistics, 2024; arXiv 2103.06476), Theorem 2.2: Robbins' normal mixture with the standard
deviation estimated. It is the boundary of the mixture SPRT (Johari et al., "Peeking at A/B tests", KDD 2017).
"""

from __future__ import annotations

import numpy as np
from scipy import special


def quantile(fraction: float, alpha: float = 0.05) -> float:
    """Return the half-width of the sequence in standard errors; for a single analysis it would be 1.96.

    √((1 + 1/x) log((1 + x) / α²)) with x = t ρ²; ρ is chosen so that the sequence is narrowest at `fraction` = 1.

    Args:
      fraction: users so far / planned users; may exceed 1. The plan is fixed before the first interim analysis.
      alpha: probability that any interval of the sequence misses the true value.

    Raises:
      ValueError: for a fraction that is not above 0, or alpha outside (0, 1).
    """
    x = _mixture(fraction, alpha)
    return float(np.sqrt((1.0 + 1.0 / x) * (np.log1p(x) - 2.0 * np.log(alpha))))


def p_value(z: float, fraction: float, alpha: float = 0.05) -> float:
    """Return the always-valid p-value: the least alpha whose sequence, with the same mixture ρ, excludes 0.

    min(1, √(1 + x) exp(−z² x / (2 (1 + x)))), one over the mixture of likelihood ratios (Johari et al., KDD 2017).

    Args:
      z: the difference in standard errors.
      fraction: as in `quantile`.
      alpha: as in `quantile`; it fixes ρ. The p-value is below it exactly where |z| is above `quantile`.

    Raises:
      ValueError: as `quantile`.
    """
    x = _mixture(fraction, alpha)
    return float(np.exp(min(0.0, 0.5 * np.log1p(x) - 0.5 * z * z * x / (1.0 + x))))


def _mixture(fraction: float, alpha: float) -> float:
    """Return x = t ρ² of the mixture whose sequence is narrowest at `fraction` = 1."""
    if not fraction > 0 or not 0 < alpha < 1:
        raise ValueError(f"fraction {fraction} must be above 0 and alpha {alpha} in (0, 1)")
    # The derivative vanishes where x = log((1 + x) / α²).
    return (-1.0 - float(special.lambertw(-(alpha**2) / np.e, k=-1).real)) * fraction


def bonferroni_quantile(analyses: int, alpha: float = 0.05) -> float:
    """Return the half-width for a fixed number of interim analyses under any dependence: Bonferroni's normal quantile.

    Raises:
      ValueError: for fewer than one interim analysis.
    """
    if analyses < 1:
        raise ValueError(f"{analyses} interim analyses: there must be at least 1")
    return float(-special.ndtri(alpha / (2 * analyses)))
