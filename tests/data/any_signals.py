"""Signals that are not those of short videos: one, three and twelve, and logs of them."""

import dataclasses

import numpy as np
import random_logs

from mmrf_jax.data.session_log import InputSpec, Sessions
from mmrf_jax.signals import Signal, Signals

#: A shop: purchases, and nothing else.
ONE = Signals((Signal("purchase"),), ("purchase",))
#: Numeric signals before, between and after a binary one; reports are bad.
THREE = Signals(
    (
        Signal("rating", kind="value"),
        Signal("report", sign=-1, weight=3.0),
        Signal("dwell", kind="duration", unit="ms"),
    ),
    ("report", "rating", "dwell"),
)
#: Many of each kind, in any order; the main agent's is a count.
TWELVE = Signals(
    (
        *(Signal(f"flag_{i}") for i in range(3)),
        Signal("seconds", kind="duration"),
        Signal("pages", kind="count"),
        *(Signal(f"flag_{i}", sign=-1 if i == 4 else 1) for i in range(3, 7)),
        Signal("stars", kind="value", weight=0.5),
        Signal("silence", kind="duration", sign=-1),
        Signal("replies", kind="count"),
    ),
    ("flag_0", "flag_4", "stars", "silence", "pages"),
)
ALL = {"one": ONE, "three": THREE, "twelve": TWELVE}


def make_feedback(rng, shape: tuple[int, ...], signals: Signals) -> np.ndarray:
    """Feedback [*shape, S] as its kinds are."""
    draw = {
        "binary": lambda: rng.random(shape) < 0.4,
        "duration": lambda: rng.gamma(1.0, 15.0, shape),
        "count": lambda: rng.poisson(2.0, shape),
        "value": lambda: rng.normal(3.0, 1.5, shape),
    }
    return np.stack([draw[signal.kind]() for signal in signals.signals], axis=-1).astype(np.float32)


def make_spec(signals: Signals, spec: InputSpec = random_logs.SPEC) -> InputSpec:
    return dataclasses.replace(spec, signals=signals)


def make_log(seed: int, sessions: int, signals: Signals, **options) -> Sessions:
    """`random_logs.make_log` with feedback of these signals."""
    log = random_logs.make_log(seed, sessions, spec=make_spec(signals), **options)
    rng = np.random.default_rng([seed, 1])
    there = log.slate >= 0
    return dataclasses.replace(
        log,
        feedback=make_feedback(rng, there.shape, signals) * there[..., None],
        history_feedback=make_feedback(rng, log.history_mask.shape, signals) * log.history_mask[..., None],
    )
