"""One sentence on a run: whether it beats what it is compared with, and which guardrails fell.

With a simulator it is compared with the control of its A/B test, usually production; on logs with popularity and
boosting. The terminal and the page print the same sentence.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from mmrf_jax.abtest import statistics
from mmrf_jax.report.labels import joined, name, show
from mmrf_jax.signals import Signals

#: Rankers without trained agents that a run on logs should beat.
BASELINES = ("popularity", "boosting")
#: An interval around 0 that stays within ± this many % shows that there is no difference of practical size.
PRECISE_PCT = 1.0


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a run did what it is for.

    Attributes:
      outcome: "better", "worse" (than any that it is compared with), "unclear", or "none" if nothing was compared.
      sentence: the same in words, with intervals and guardrails.
      metric: key of the main metric in the results; "" if there is none.
      fallen: guardrails that are significantly worse.
      unknown: guardrails without an interval.
    """

    outcome: str
    sentence: str
    metric: str = ""
    fallen: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()


def guardrails(signals: Signals) -> tuple[str, ...]:
    """Return the metrics that a better main metric should not cost."""
    usual = dict.fromkeys((*signals.choose(("click", "long_view")), "coverage", *signals.choose(("hate",))))
    return tuple(name for name in usual if name != signals.main)


def of_results(results: Mapping[str, Any], method: str) -> Verdict:
    """Return the verdict on a run's results.

    Args:
      results: of results.json; parts may be missing and intervals may be None or NaN.
      method: of the run, which names its arm.
    """
    if not results:
        return Verdict("none", "No verdict yet: the run has not ended.")
    arms, signals = results.get("ab_test") or {}, statistics.signals_of(results)
    control = statistics.control_of(arms)
    if control and method in arms and control != method:
        return _of_ab_test(arms[method], control, method, signals)
    offline = results.get("offline") or {}
    metric = next((key for key in (f"{signals.main}_xauc", signals.main) if key in offline), "")
    rivals = [name for name in BASELINES if name in offline.get(metric, {}).get("against", {})]
    if rivals:
        return _of_logs(offline, rivals, method, metric, signals)
    return Verdict("none", f"No verdict: {method} was not compared with production, {' or '.join(BASELINES)}.")


def of_run(results: Mapping[str, Any], config: Mapping[str, Any]) -> Verdict:
    """Return the verdict on the results of a run with this config, as in config.json."""
    return of_results(results, config["method"])


def bounds_of(entry: Mapping[str, Any] | None, key: str = "ci95") -> tuple[float, float] | None:
    """Return an entry's interval; None if it is missing or not finite."""
    found = (entry or {}).get(key)
    if found is None or any(x is None or not math.isfinite(x) for x in found):
        return None
    return found[0], found[1]


def _of_ab_test(arm: Mapping[str, Any], control: str, method: str, signals: Signals) -> Verdict:
    main, lower = signals.main, statistics.lower_is_better(signals)
    entry = arm.get(main)
    bounds = bounds_of(entry)
    outcome = statistics.verdict(bounds, main in lower) or "unclear"
    fallen, unknown, said = [], [], []
    measured = [metric for metric in guardrails(signals) if metric in arm]
    for metric in measured:
        there = bounds_of(arm[metric])
        if there is None:
            unknown.append(metric)
        elif statistics.verdict(there, metric in lower) == "worse":
            fallen.append(metric)
            said.append(f"{name(metric)} {show(arm[metric]['diff_pct'], '+.1f')} %")
    if bounds is None:
        why = (entry or {}).get("note") or "it has no interval"
        text = f"{method} is not distinguishable from {control}: too small to compare {name(main)} ({why})"
    else:
        figures = f"{name(main)} {show(entry['diff_pct'], '+.1f')} % {_interval(bounds, '+.1f')}"  # type: ignore[index]
        text = f"{method} is {outcome} than {control}: {figures}"
        if outcome == "unclear":
            text = f"{method} is not distinguishable from {control}: {figures}{_size(bounds)}"
    return Verdict(outcome, f"{text}; {_guardrails(measured, said, unknown)}.", main, tuple(fallen), tuple(unknown))


def _size(bounds: tuple[float, float]) -> str:
    """Return what an interval around 0 leaves open."""
    most = max(abs(x) for x in bounds)
    if most <= PRECISE_PCT:
        return f", so any difference is below {PRECISE_PCT:.0f} %"
    return f", too small to tell differences below {most:.2g} %, use more sessions"


def _of_logs(offline: Mapping[str, Any], rivals: Sequence[str], method: str, metric: str, signals: Signals) -> Verdict:
    outcomes, parts = [], []
    for rival in rivals:
        entry = offline[metric]["against"][rival]
        bounds = bounds_of(entry, "diff_ci95")
        outcome = statistics.verdict(bounds) or "unclear"
        outcomes.append(outcome)
        start = "not distinguishable from" if outcome == "unclear" else f"{outcome} than"
        figures = "too few users" if bounds is None else f"{show(entry['diff'], '+.4f')} {_interval(bounds, '+.4f')}"
        parts.append(f"{start} {rival} ({figures})")
    outcome = next(x for x in ("worse", "unclear", "better") if x in outcomes)
    fallen, unknown, said = [], [], []
    measured = [signal for signal in guardrails(signals) if offline.get(signal, {}).get("against") and signal != metric]
    for signal in measured:
        against = offline[signal]["against"]
        found = {rival: bounds_of(against[rival], "diff_ci95") for rival in rivals if rival in against}
        lost = [rival for rival, bounds in found.items() if statistics.verdict(bounds) == "worse"]
        if lost:
            fallen.append(signal)
            said.append(f"GAUC of {name(signal)} (than {joined(lost)})")
        elif None in found.values():
            unknown.append(signal)
    kind = "XAUC" if metric.endswith("_xauc") else "GAUC"
    what = f"{name(metric.removesuffix('_xauc'))} ({kind})"
    text = f"By {what}, {method} is {joined(parts)}; {_guardrails(measured, said, unknown)}."
    return Verdict(outcome, text, metric, tuple(fallen), tuple(unknown))


def _guardrails(measured: Sequence[str], said: Sequence[str], unknown: Sequence[str]) -> str:
    if not measured:
        return "no guardrail was measured"
    text = f"worse on guardrails: {', '.join(said)}" if said else "no guardrail is significantly worse"
    return text + (f" (too few events for {joined([name(metric) for metric in unknown])})" if unknown else "")


def _interval(bounds: tuple[float, float], form: str) -> str:
    return f"[{', '.join(show(x, form) for x in bounds)}]"
