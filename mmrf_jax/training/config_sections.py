"""The sections of a run's config, and the fields of studies and searches: the default, range and meaning of each.

This module does not need JAX.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from mmrf_jax import fields
from mmrf_jax.data.readers.kuairand import KuaiRandConfig
from mmrf_jax.fields import field
from mmrf_jax.models.feedback_model.config import FeedbackConfig

_RANDOM = (
    "`train` also learns from what was shown at random on the training days; every request then says in its context "
    "whether it was"
)
_STREAM = "whether logs are read while training; None: those above 2^20 sessions"


@dataclasses.dataclass(frozen=True)
class LogData:
    """Location of logs that are read instead of collected."""

    dir: str = field("", "logs of mmrf collect or mmrf serve to learn from; empty: collect them")
    stream: bool | None = field(None, _STREAM)


@dataclasses.dataclass(frozen=True)
class KuaiRandData(KuaiRandConfig):
    """KuaiRand's logs, and how they are split into sessions."""

    dir: str = field("", "the folder with the CSV files, or its parent")
    cache_dir: str = field("~/.cache/mmrf_jax/kuairand", "where prepared records go")
    session_gap_minutes: float = field(
        0.0, "absence that ends a session; 0: a day for Pure, half an hour for 1K and 27K", fields.NOT_NEGATIVE
    )
    max_sessions: int = field(0, "of training; 0: all", fields.NATURAL)
    statistics: bool = field(
        True, "whether running means of videos, authors and tags up to the day before are features"
    )
    random_log: str = field("off", _RANDOM, among=("off", "train"))
    stream: bool | None = field(None, _STREAM)
    served: str | None = field(None, "feedback log of mmrf serve, to learn from instead of the training days")


@dataclasses.dataclass(frozen=True)
class OwnLogs:
    """Your own log, and what its columns mean (`mmrf_jax.schema`)."""

    path: str = field(
        "",
        "the log: a CSV, Parquet or Arrow file, a folder of them, or a glob such as 'logs/*.parquet'; or the folder "
        "that mmrf prepare wrote",
    )
    schema: str = field("", "a Python file that defines `schema`")
    item_table: str = field("", "table of the items, a path as for the log")
    user_table: str = field("", "table of the users, a path as for the log")
    candidate_table: str = field("", "table of the candidates of requests, a path as for the log")
    cache_dir: str | None = field(None, "where prepared logs go; by default ~/.cache/mmrf_jax/logs")
    slate: int = field(0, "K, the most items of a request; 0: as in the schema or the log", fields.NATURAL)
    candidates: int = field(0, "C, the candidates of a request; 0: as in the schema or the log", fields.NATURAL)
    statistics: bool = field(True, "whether running means of items, authors and tags up to the day before are features")
    random_log: str = field("off", _RANDOM, among=("off", "train"))
    served: str | None = field(None, "feedback log of mmrf serve, to learn from instead of the training part")
    digest: str = field("", "of the log that a run has read; set by the program")
    stream: bool | None = field(None, _STREAM)


#: The section `data` of sources without a world.
LOGS: dict[str, Any] = {"kuairand": KuaiRandData, "logs": OwnLogs}


@dataclasses.dataclass(frozen=True)
class Collect:
    """Logs collected in a simulator."""

    sessions: int = field(8_192, "sessions of each round's log", fields.COUNT)
    test_sessions: int = field(2_048, "sessions of the held-out log", fields.COUNT)
    slots: int = field(
        0, "users in flight on each device; 0: a quarter of the device's sessions, at most 1,024", fields.NATURAL
    )
    random_share: float | None = field(
        None,
        "share of a training log's requests with a random slate; every request then says in its context whether its "
        "slate was random (KuaiRand: 0.0037); None: no such context; 0: the context alone",
        fields.SHARE,
    )


@dataclasses.dataclass(frozen=True)
class Alternation:
    """Rounds of fit, label and update."""

    rounds: int = field(3, "rounds of fit, label and update", fields.COUNT)
    closed_loop: bool = field(True, "after the first round the newest policy serves and collects the round's log")
    temperature: float = field(
        1.0, "of the Plackett–Luce slates of that policy; 0: its best slate", fields.NOT_NEGATIVE
    )
    gap_sessions: int = field(
        0,
        "sessions served after each round both in the model and in the world, to compare the returns; 0 for none",
        fields.NATURAL,
    )
    conflict_batches: int = field(
        0, "batches of each round on which the agents' gradients are compared; 0 for none", fields.NATURAL
    )


@dataclasses.dataclass(frozen=True)
class Feedback(FeedbackConfig):
    """The feedback model and its fit."""

    batch: int = field(32, "segments of a step of the fit", fields.COUNT)
    epochs: int = field(1, "over each round's log", fields.COUNT)
    log_fraction: float = field(
        1.0, "share of the log's sessions to fit on, to see what less data would do", fields.PART
    )


@dataclasses.dataclass(frozen=True)
class Train:
    """Updates of the agents."""

    batch: int = field(32, "segments of an update", fields.COUNT)
    segment: int = field(8, "requests of a segment", fields.COUNT)
    candidates: int = field(
        32,
        "candidates of a request that an update looks at: those shown, and this many others at random; 0: all, as also "
        "when agents.sampling chooses among them or when these are three quarters of all",
        fields.NATURAL,
    )
    epochs: int = field(1, "over each round's log", fields.COUNT)
    log_on_device: bool = field(
        False, "whether a round's log stays on the devices, which then make its batches; for accelerators"
    )


@dataclasses.dataclass(frozen=True)
class ABTest:
    """The A/B test at the end of a run."""

    sessions: int = field(4_096, "sessions per arm", "[2, 2147483647]")
    day: int = field(0, "simulated day", fields.NATURAL)
    arms: tuple[str, ...] = field(
        ("production", "random", "oracle_myopic", "oracle_planning"), "arms in addition to the run's own"
    )


@dataclasses.dataclass(frozen=True)
class Study:
    """Fields that all studies share, in addition to `run`, `variants` or `policies`, and `when_quick`."""

    quick: bool = field(False, "one seed, tiny runs")
    reference: str = field("mmrf", "the variant that others are compared with")
    tables: tuple[str, ...] = field(("ab_test",), "what is measured: see `mmrf_jax.sweeps.measurements`")
    arms: tuple[str, ...] = field(("production",), "of A/B tests, that need no training")
    seeds: int = field(5, "of each variant", fields.COUNT)
    sessions: int = field(20_000, "in each arm and seed", "[2, 2147483647]")
    days: int = field(14, "of tests over days", fields.COUNT)
    holm: tuple[str, ...] = field(
        (), "metrics of the A/B tests with p-values over seeds, adjusted for the number of arms (Holm, 1979)"
    )


@dataclasses.dataclass(frozen=True)
class Search:
    """Fields of a search, in addition to `run`, `space` and `when_quick`.

    `space` has the fields of `run` that differ between trials, nested as in `run`. Each is a range {"low", "high",
    "log"}, where `log` may be absent, or a list of choices.
    """

    quick: bool = field(False, "few trials, tiny runs")
    metric: str = field(
        "ab_test.{method}.watch_time.mean",
        "what decides: a path in results.json below ab_test, {method} is the run's own arm; or, of runs on logs, "
        "valid.SIGNAL.gauc and the like: measured on the validation days",
    )
    direction: str = field("maximize", "of the metric", among=("maximize", "minimize"))
    trials: int = field(20, "in all, by all processes together; more may be added later", fields.COUNT)
    sampler: str = field("tpe", "Optuna's sampler of the space", among=("random", "tpe"))
    pruner: str = field(
        "none", "asha: rounds are added to the best trials only, at 1, reduction, reduction², …", among=("none", "asha")
    )
    reduction: int = field(3, "asha: one trial of so many goes on at each rung", "[2, 2147483647]")
    seed: int = field(0, "of the sampler; the runs have run.seed", fields.NATURAL)


@dataclasses.dataclass(frozen=True)
class EstimatorStudy:
    """Fields of a study of the off-policy estimators, in addition to `run`, `policies` and `when_quick`."""

    quick: bool = field(False, "few and small logs")
    logs: int = field(200, "replicates, of users of their own", "[2, 2147483647]")
    log_users: int = field(100, "of each log", "[2, 2147483647]")
    log_requests: int = field(4, "of each session, the first", fields.COUNT)
    sessions: int = field(16_384, "of each policy in the world", "[2, 2147483647]")
    model_sessions: int = field(2_048, "of production, that the reward model is fitted to", fields.COUNT)


@dataclasses.dataclass(frozen=True)
class MixedPolicy:
    """A policy in a study of the off-policy estimators."""

    ranker: str = field("production", "whose scores are mixed with production's")
    weight: float = field(1.0, "of that ranker; production has the rest", fields.SHARE)
