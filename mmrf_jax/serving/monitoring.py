"""Prometheus metrics of the service."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import prometheus_client as prometheus

from mmrf_jax.serving import ranker
from mmrf_jax.serving.ranker import Ranker


class Metrics:
    """Metrics of a service, for Prometheus."""

    def __init__(self, gauges: dict[str, tuple[str, Callable[[], float]]]):
        """Create the metrics.

        Args:
          gauges: {name: (description, function)} of values that are computed at each scrape.
        """
        self.registry = registry = prometheus.CollectorRegistry()

        def counter(name, what, *labels):
            return prometheus.Counter(name, what, labels, registry=registry)

        self.requests = counter("mmrf_requests", "HTTP requests.", "route", "status")
        self.seconds = prometheus.Histogram(
            "mmrf_request_seconds",
            "From a request's first byte to its answer.",
            ["route"],
            registry=registry,
            buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5),
        )
        self.batch = prometheus.Histogram(
            "mmrf_batch_size", "Requests scored together.", registry=registry, buckets=ranker.BATCHES
        )
        self.scoring = counter("mmrf_scoring_seconds", "Time in which the scoring thread was busy.")
        self.impressions = counter("mmrf_impressions", "Videos shown.")
        self.new_items = counter("mmrf_new_items", "Items taken that the artefacts do not have.")
        self.events = counter("mmrf_feedback_events", "Feedback events.", "kind")
        self.swaps = counter("mmrf_artifact_swaps", "Artefacts swapped in.")
        self.failed_swaps = counter("mmrf_artifact_swap_failures", "Artefacts that could not be used.")
        self.failed_writes = counter("mmrf_store_write_failures", "Passes over changed users that were not written.")
        self.in_flight = prometheus.Gauge("mmrf_in_flight", "Requests being served.", registry=registry)
        for name, (what, value) in gauges.items():
            prometheus.Gauge(name, what, registry=registry).set_function(value)
        self.compilations = prometheus.Gauge(
            "mmrf_compilations", "How often a function of the artefact was compiled.", ["function"], registry=registry
        )
        self.about = prometheus.Info("mmrf_artifact", "The artefact that ranks.", registry=registry)

    def describe(self, rankers: Sequence[Ranker]) -> None:
        """Say which artefacts rank, that of arm a first."""
        about: dict[str, str] = {}
        for arm, one in zip(("", "_b"), rankers, strict=False):
            about[f"id{arm}"] = one.id
            about |= {f"{name}{arm}": one.manifest[name] for name in ("method", "created")}
        self.about.info(about)

        def compiled(name: str) -> int:
            return sum(one.traces[name] for one in rankers)

        for name in rankers[0].traces:
            self.compilations.labels(name).set_function(functools.partial(compiled, name))
