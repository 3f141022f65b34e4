"""A/B tests of sums in memory."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmrf_jax.abtest import statistics
from mmrf_jax.signals import Signals


def compare_sums(
    signals: Signals,
    arms: Mapping[str, Mapping[str, np.ndarray]],
    control: str,
    paired: bool,
    covariate: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Any]:
    """The results of arms with these per-user sums, as simulated tests have them."""
    test = statistics.ABTest(signals, tuple(arms), control, paired)
    test.update(arms, covariate)
    return test.results() | {"signals": signals.as_dict()}
