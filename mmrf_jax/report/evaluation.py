"""Report sections on a run's evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmrf_jax.abtest.statistics import MIN_EVENTS, control_of, lower_is_better, reason, too_small
from mmrf_jax.report import charts
from mmrf_jax.report.markup import NOTHING, Cell, escape, interval, legend, number, significance, table
from mmrf_jax.report.sections import UNFINISHED, Part, Run, grid, label
from mmrf_jax.signals import Signals

_FOREST = ("click", "like", "follow", "hate")  # of short videos
_LOGS = {
    "test": "The held-out days",
    "test_frozen": "The held-out days, with no feedback of those days in what the agents remember",
    "random_test": "The random log of the held-out days",
}
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
    rows: list[list[str | Cell]] = [
        [_label(signals, name), number(entry["mean"])]
        + [_difference(entry=arm.get(name), less=name in lower_is_better(signals)) for arm in others.values()]
        for name, entry in ((name, everyone[control][name]) for name in _metrics(signals) if name in everyone[control])
    ]
    figures = {}
    for name in dict.fromkeys((signals.main, "depth", "return_rate", *signals.choose(_FOREST), "coverage")):
        shown = [
            (arm, m[name]["diff_pct"], *m[name]["ci95"])
            for arm, m in others.items()
            if name in m and m[name]["diff_pct"] is not None and m[name]["ci95"] is not None
        ]
        if shown:
            figures[f"forest-{name}"] = charts.forest(_label(signals, name), shown)
    sessions = run.config["ab_test"]["sessions"]
    caption = (
        f"The same {sessions:,} users in every arm. Differences to {control} in %, with intervals of 95 %: a "
        "filled point, and in the table a bold figure, is one whose interval leaves out 0, better or worse as it says. "
        f"Too few: fewer than {MIN_EVENTS} users of an arm have any, which carries no interval. "
    ) + too_small(everyone, signals.main)
    body = grid(list(figures), "forest") + "<h3>All metrics</h3>" + table(["metric", control, *others], rows)
    return Part("ab-test", "A/B test", caption, body, figures)


def _metrics(signals: Signals) -> tuple[str, ...]:
    """Return the metrics of an A/B test in the order of the report."""
    sums = (*signals.numeric_names, "depth", "requests", "return_rate", *signals.binary_names)
    return tuple(dict.fromkeys((signals.main, *sums, "coverage", "gini", "ild")))


def _label(signals: Signals, metric: str) -> str:
    return label(signals, metric) + (" (less is better)" if metric in lower_is_better(signals) else "")


def _difference(entry: Mapping[str, Any] | None, less: bool) -> Cell:
    """Return a cell with a mean and its difference to the control, or why the difference is unknown."""
    if entry is None:
        return Cell(NOTHING)
    if entry["diff_pct"] is None:
        return Cell(number(entry["mean"]), reason(entry))
    bounds, sure = significance(entry["ci95"], "+.2f", less)
    return Cell(number(entry["mean"]), f"{charts.show(entry['diff_pct'], '+.2f')} % {bounds}", sure)


def _in_order(signals: Signals, entries: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return the entries in the usual order of signals, entries of no signal last."""

    def place(name):
        return signals.index(name) if name in signals.names else len(signals)

    return sorted(entries.items(), key=lambda item: place(item[0]))


def offline(run: Run) -> Part:
    title, identity = "Ranking of held-out sessions", "offline"
    if not run.results:
        return Part(identity, title, "", missing=UNFINISHED)
    logs = {"test": run.results["offline"], **run.results.get("offline_other", {})}
    body = ""

    def gauc(x):
        return NOTHING if x is None else charts.show(x, ".4f")

    for log, entries in logs.items():
        rankers = list(dict.fromkeys(r for entry in entries.values() for r in entry.get("against", {})))
        rows: list[list[str | Cell]] = []
        for signal, entry in _in_order(run.signals, entries):
            row: list[str | Cell] = [signal, f"{entry['eligible_users']:,}"]
            row += [Cell(gauc(entry["gauc"]), interval(entry["ci95"])), gauc(entry.get("gauc_agent"))]
            for ranker in rankers:
                other = entry.get("against", {}).get(ranker, {})
                row.append(Cell(gauc(other.get("gauc")), *significance(other.get("diff_ci95"), "+.4f")))
            rows.append(row)
        head = ["signal", "users", "served ranking", "own agent", *rankers]
        body += (f"<h3>{escape(_LOGS.get(log, log))}</h3>" if len(logs) > 1 else "") + table(head, rows)
    caption = (
        "GAUC: how often a video with the signal stands above one without it, within a user; .5 is chance. "
        "NAME_xauc is the same for pairs of values, such as play times. Small print: intervals of 95 % over users; "
        "under a baseline, of how far the agents are ahead of it, bold and better or worse where that leaves out 0. No "
        "figure for fewer than 200 users."
    )
    return Part(identity, title, caption, body)


def fidelity(run: Run) -> Part:
    title, identity = "Predicted feedback", "fidelity"
    found = run.results.get("fidelity")
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
    for signal, entries in _in_order(run.signals, found):
        series = {r: (i, entries[r]["by_decile"]) for i, r in enumerate(rankers) if r in entries}
        numeric = signal in run.signals.numeric_names
        seconds = numeric and run.signals.signals[run.signals.index(signal)].kind == "duration"
        name = f"reliability-{signal}"
        figures[name] = charts.reliability(f"{signal}, s" if seconds else signal, series, share=not numeric)
        ranking, loss, last = ("xauc", "mae", "rmse") if numeric else ("gauc", "logloss", "ece")
        for ranker, entry in ((r, entries[r]) for r in rankers if r in entries):
            bounds, sure = significance(entry.get("model_minus", {}).get(loss, {}).get("ci95"), "+.4f", less=True)
            rows.append(
                [
                    signal,
                    Cell(ranker, kind="text"),
                    f"{entry['eligible_users']:,}",
                    Cell(number(entry[ranking]), interval(entry[f"{ranking}_ci95"])),
                    number(entry[loss]),
                    number(entry[last]),
                    Cell(bounds or NOTHING, sure=sure),
                ]
            )
    head = ["signal", "predictor", "users", "GAUC / XAUC", "log-loss / MAE", "ECE / RMSE", "model − predictor, loss"]
    caption = (
        "Each point is a tenth of the held-out videos, by what was predicted of them: on the dashed diagonal as much "
        "happens as was predicted, below it less. Bars: intervals of 95 % of the first predictor's shares, as if "
        "exposures were independent."
    )
    body = legend(rankers) + grid(list(figures), "wide") + "<h3>In figures</h3>" + table(head, rows)
    return Part(identity, title, caption, body, figures)
