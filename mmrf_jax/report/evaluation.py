"""Report sections on a run's evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmrf_jax.abtest.statistics import MIN_EVENTS, control_of, lower_is_better, reason, too_small
from mmrf_jax.metrics.offline import by_log
from mmrf_jax.report import charts, labels
from mmrf_jax.report.markup import NOTHING, Cell, change, escape, interval, legend, number, table
from mmrf_jax.report.sections import UNFINISHED, Part, Run, grid, split
from mmrf_jax.signals import Signals

_FOREST = ("click", "like", "follow", "hate")  # of short videos
_LOGS = {
    "test": "The held-out days",
    "test_frozen_history": "The held-out days, with no feedback of those days in what the agents remember",
    "random_test": "The random log of the held-out days",
}
_OWN = ("served ranking", "own agent")
_RANKERS = ("model", "agents", "per_video_mean", "logistic")


def arms(run: Run) -> tuple[str, dict[str, Any]]:
    """Return the control of the A/B test, and the other arms, the run's own first."""
    arms = dict(run.results.get("ab_test", {}))
    control = control_of(arms)
    arms.pop(control, None)
    return control, dict(sorted(arms.items(), key=lambda item: (item[0] != run.config["method"], item[0])))


def ab_test(run: Run) -> Part:
    if not run.results:
        return Part("ab-test", "A/B test", "", missing=UNFINISHED)
    control, others = arms(run)
    if not others:
        return Part(
            "ab-test",
            "A/B test",
            "",
            missing=("There is no A/B test: this run has logs alone and no simulator whose users could be served."),
        )
    everyone, signals = run.results["ab_test"], run.signals
    less = lower_is_better(signals)
    first, *rest = others  # the run's own arm stands next to the names, where a phone shows it
    rows: list[list[str | Cell]] = [
        [
            Cell(labels.name(m), labels.units(signals, m)),
            difference(others[first].get(m), m in less),
            number(everyone[control][m]["mean"]),
            *(difference(others[arm].get(m), m in less) for arm in rest),
        ]
        for m in labels.ordered(signals, everyone[control])
    ]
    figures = {}
    for metric in dict.fromkeys((signals.main, "depth", "return_rate", *signals.choose(_FOREST), "coverage")):
        shown = [
            (arm, m[metric]["diff_pct"], *m[metric]["ci95"])
            for arm, m in others.items()
            if metric in m and m[metric]["diff_pct"] is not None and m[metric]["ci95"] is not None
        ]
        if shown:
            figures[f"forest-{metric}"] = charts.forest(labels.titled(signals, metric), shown, control, metric in less)
    sessions = run.config["ab_test"]["sessions"]
    caption = (
        f"The same {sessions:,} users in every arm. Differences to {control} in %, with 95 % intervals. Blue triangles "
        "that point up are better, orange ones that point down worse; a hollow circle has an interval that contains 0. "
        f"Too few: fewer than {MIN_EVENTS} users of an arm have any, which is not enough for an interval. "
    ) + too_small(everyone, signals.main)
    head = ["metric", first, control, *rest]
    body = split(table(head, rows), grid(list(figures), "forest"))
    return Part("ab-test", "A/B test", caption, body, figures)


def difference(entry: Mapping[str, Any] | None, less: bool) -> Cell:
    """Return a cell with a mean and its difference to the control, or why the difference is unknown.

    Args:
      entry: of a metric of an arm.
      less: whether less of it is better.
    """
    if entry is None:
        return Cell(NOTHING)
    if entry["diff_pct"] is None:
        return Cell(number(entry["mean"]), reason(entry))
    return change(number(entry["mean"]), entry["diff_pct"], entry["ci95"], "+.2f %", less)


def in_order(signals: Signals, entries: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return the entries in the usual order of signals, entries of no signal last."""

    def place(name):
        return signals.index(name) if name in signals.names else len(signals)

    return sorted(entries.items(), key=lambda item: place(item[0]))


def offline(run: Run) -> Part:
    title, identity = "Ranking of held-out sessions", "offline"
    if not run.results:
        return Part(identity, title, "", missing=UNFINISHED)
    logs = by_log(run.results, "offline")
    body, figures = "", {}
    for log, entries in logs.items():
        ordered = in_order(run.signals, entries)
        rankers = list(dict.fromkeys(r for entry in entries.values() for r in entry.get("against", {})))
        rows: list[list[str | Cell]] = []
        for signal, entry in ordered:
            row: list[str | Cell] = [labels.name(signal), f"{entry['eligible_users']:,}"]
            row += [Cell(_gauc(entry["gauc"]), interval(entry["ci95"])), _gauc(entry.get("gauc_agent"))]
            for ranker in rankers:
                other = entry.get("against", {}).get(ranker, {})
                row.append(change(_gauc(other.get("gauc")), other.get("diff"), other.get("diff_ci95"), "+.4f"))
            rows.append(row)
        figures[f"gauc-{log}"] = _ranked(dict(ordered), rankers)
        shown = legend([*_OWN, *rankers]) + grid([f"gauc-{log}"], "whole")
        head = ["signal", "users", *_OWN, *rankers]
        body += f"<h3>{escape(_LOGS.get(log, log))}</h3>" if len(logs) > 1 else ""
        body += split(table(head, rows), shown)
    caption = (
        "GAUC: how often a video with the signal stands above one without it, within a user; .5 is chance. "
        "XAUC is the same for pairs of values, such as play times. Small print: 95 % intervals over users; under "
        "another ranker, how far the agents are ahead of it, in colour where the interval excludes 0. No figure for "
        "fewer than 200 users."
    )
    return Part(identity, title, caption, body, figures)


def _gauc(x: float | None) -> str:
    return NOTHING if x is None else labels.show(x, ".4f")


def _ranked(entries: Mapping[str, Any], rankers: Sequence[str]) -> charts.Figure:
    """Return the chart of {signal: entry} of a log: the run's two rankings, and those it is compared with."""
    own = zip(_OWN, ("gauc", "gauc_agent"), strict=True)
    found = {name: {signal: entry.get(key) for signal, entry in entries.items()} for name, key in own}
    for ranker in rankers:
        found[ranker] = {signal: e.get("against", {}).get(ranker, {}).get("gauc") for signal, e in entries.items()}
    series = {
        ranker: [(labels.name(signal), x) for signal, x in values.items() if x is not None]
        for ranker, values in found.items()
    }
    intervals = [(labels.name(signal), *e["ci95"]) for signal, e in entries.items() if e["ci95"] is not None]
    names = [
        name for name in map(labels.name, entries) if any(name == there for x in series.values() for there, _ in x)
    ]
    return charts.ranked("GAUC and XAUC", names, series, intervals)


def model_quality(run: Run) -> Part:
    title, identity = "Predicted feedback", "model-quality"
    found = run.results.get("model_quality")
    if not found:
        why = (
            UNFINISHED
            if not run.results
            else (f"method={run.config['method']} predicts no feedback beyond the score it ranks by.")
        )
        return Part(identity, title, "", missing=why)
    there = dict.fromkeys(r for entry in found.values() for r in entry)
    rankers = [*(r for r in _RANKERS if r in there), *(r for r in there if r not in _RANKERS)]
    figures: dict[str, charts.Figure] = {}
    rows: list[list[str | Cell]] = []
    for signal, entries in in_order(run.signals, found):
        series = {r: (i, entries[r]["by_decile"]) for i, r in enumerate(rankers) if r in entries}
        numeric = signal in run.signals.numeric_names
        kind = run.signals.signals[run.signals.index(signal)].kind
        unit = {"duration": "seconds", "binary": "share of videos"}.get(kind, kind)
        figures[f"reliability-{signal}"] = charts.reliability(labels.name(signal), series, unit, share=not numeric)
        ranking, loss, last = ("xauc", "mae", "rmse") if numeric else ("gauc", "logloss", "ece")
        for ranker, entry in ((r, entries[r]) for r in rankers if r in entries):
            minus = entry.get("model_minus", {}).get(loss, {})
            rows.append(
                [
                    labels.name(signal),
                    Cell(ranker, kind="text"),
                    f"{entry['eligible_users']:,}",
                    Cell(number(entry[ranking]), interval(entry[f"{ranking}_ci95"])),
                    number(entry[loss]),
                    number(entry[last]),
                    change(NOTHING if not minus else "", minus.get("diff"), minus.get("ci95"), "+.4f", less=True),
                ]
            )
    columns: list[str | Cell] = [
        "signal",
        Cell("predictor", kind="text"),
        "users",
        "GAUC / XAUC",
        "log-loss / MAE",
        "ECE / RMSE",
        "model − predictor, loss",
    ]
    caption = (
        "Each point is a tenth of the held-out videos, by their prediction: on the dashed diagonal as much happens as "
        "was predicted, below it less. Bars: 95 % intervals of the first predictor's shares, as if exposures were "
        "independent."
    )
    body = split(table(columns, rows), legend(rankers) + grid(list(figures), "wide"))
    return Part(identity, title, caption, body, figures)
