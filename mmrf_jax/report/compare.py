"""Several runs on one page that opens offline: their verdicts, configs, metrics and curves.

Pure: dictionaries in, text out. Every run is compared with the first.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmrf_jax.abtest import statistics
from mmrf_jax.report import charts, evaluation, labels, page, training, verdict
from mmrf_jax.report.markup import NOTHING, Cell, change, escape, flat, interval, legend, number, plain, table
from mmrf_jax.report.sections import Part, grid, split

#: Sections of a config that decide the users whom a run is tested on; runs that differ there are not paired.
_WORLD = ("source", "simulator", "simulator_checkpoint", "world", "data")
_TEST = ("seed", "ab_test.sessions", "ab_test.day")
_FEW = 4  # runs; the curves of more have no raw values behind them
_PHASES = {"train": "agents", "fit": "feedback model"}


@dataclasses.dataclass(frozen=True)
class Run:
    """One of the runs.

    Attributes:
      name: on the page, different for every run.
      config: nested.
      results: of results.json, empty if the run is not finished.
      rows: of metrics.jsonl.
      starts: as in `sections.Run`.
      users: per-user sums of its arm in its A/B test, {name: [n]}; empty if it has none.
    """

    name: str
    config: Mapping[str, Any]
    results: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    starts: Sequence[Mapping[str, str]] = ()
    users: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def arm(self) -> Mapping[str, Any]:
        """Entries of the run's own arm in its A/B test, by metric."""
        return self.results.get("ab_test", {}).get(self.config["method"], {})


def build(runs: Sequence[Run], notes: Sequence[str] = ()) -> str:
    """Build the page.

    Args:
      runs: at least two; the others are compared with the first.
      notes: sentences on how the runs were chosen.
    """
    said = [
        *notes,
        *_unequal(runs),
        *(f"{run.name} has not ended, so it has no results." for run in runs if not run.results),
    ]
    top = "".join(f'<p class="verdict">{escape(note)}</p>' for note in said)
    parts = (_overview(runs), _metrics(runs), _offline(runs), *_curves(runs), _configs(runs))
    return page.render(
        f"{len(runs)} runs compared",
        f"Differences are to {runs[0].name}, the first.",
        top,
        [part for part in parts if part],
    )


def _unequal(runs: Sequence[Run]) -> list[str]:
    """Return a sentence for every run whose world is not the first's."""
    said = []
    for run in runs[1:]:
        if fields := _differing(runs[0], run, _WORLD):
            shown = ", ".join(fields[:3]) + (f" and {len(fields) - 3} more" if len(fields) > 3 else "")
            said.append(
                f"{run.name} is of another world than {runs[0].name} ({shown}): a difference between them is also one "
                "between the worlds."
            )
    return said


def _differing(one: Run, other: Run, among: Sequence[str]) -> list[str]:
    """Return the fields of a config, among those that start with one of these names, that differ."""
    first, second = dict(flat(one.config)), dict(flat(other.config))
    names = [name for name in first | second if any(name == x or name.startswith(f"{x}.") for x in among)]
    return [name for name in names if first.get(name) != second.get(name)]


def paired(one: Run, other: Run) -> bool:
    """Return whether both runs served the same users with the same random numbers, and kept their sums."""
    same = not _differing(one, other, (*_WORLD, *_TEST)) and bool(one.users) and bool(other.users)
    return same and np.array_equal(one.users["user_id"], other.users["user_id"])


def differences(one: Run, other: Run) -> dict[str, tuple[float, tuple[float, float], str]]:
    """Compare the A/B metrics of two runs.

    With per-user sums the intervals are of an A/B test between the two: paired by user where both served the same
    users, else of independent users. Other metrics, and runs without these sums, are compared by their differences to
    their own controls, as if independent.

    Returns:
      {metric: (other − one in % of one, its 95 % interval, "paired", "independent" or "by control")}, without metrics
      that have no interval.
    """
    found = {}
    for metric in one.arm.keys() & other.arm.keys():
        mine, bounds = _log_ratio(one.arm[metric]), _log_ratio(other.arm[metric])
        if mine and bounds:
            value, half = bounds[0] - mine[0], math.hypot(mine[1], bounds[1])
            percents = [100.0 * math.expm1(x) for x in (value, value - half, value + half)]
            found[metric] = (percents[0], (percents[1], percents[2]), "by control")
    if one.users and other.users and one.users.keys() == other.users.keys():
        alike = paired(one, other)
        test = statistics.ABTest(statistics.signals_of(one.results), ("one", "other"), control="one", paired=alike)
        test.update({"one": one.users, "other": other.users})
        for metric, entry in test.ratios()["other"].items():
            found.pop(metric, None)
            if (bounds := verdict.bounds_of(entry)) is not None:
                found[metric] = (entry["diff_pct"], bounds, "paired" if alike else "independent")
    return found


def _log_ratio(entry: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return the logarithm of an arm's ratio to its control and half the width of its interval, if it has one."""
    bounds = verdict.bounds_of(entry)
    if bounds is None or min(bounds) <= -100.0:
        return None
    low, high = (math.log1p(x / 100.0) for x in bounds)
    return math.log1p(entry["diff_pct"] / 100.0), (high - low) / 2.0


def _overview(runs: Sequence[Run]) -> Part:
    rows: list[list[str | Cell]] = []
    for run in runs:
        found = verdict.of_run(run.results, run.config)
        start = run.starts[0] if run.starts else {}
        rows.append(
            [
                run.name,
                Cell(found.sentence, kind="text wrap"),
                Cell(run.config["method"], kind="text"),
                str(run.config["seed"]),
                Cell(start.get("commit", NOTHING), kind="text"),
                Cell(start.get("host", NOTHING), kind="text"),
                Cell(start.get("start", NOTHING), kind="text"),
            ]
        )
    names = ("method", "verdict", "commit", "host", "start")
    text = {name: Cell(name, kind="text") for name in names}
    head: list[str | Cell] = [
        "run",
        text["verdict"],
        text["method"],
        "seed",
        text["commit"],
        text["host"],
        text["start"],
    ]
    return Part("runs", "Runs", "Each run's own verdict, against what it was tested with.", table(head, rows))


def _metrics(runs: Sequence[Run]) -> Part:
    title, first = "A/B metrics", runs[0]
    compared = {run.name: differences(first, run) for run in runs[1:]}
    present = dict.fromkeys(metric for run in runs for metric in run.arm)
    signals = statistics.signals_of(first.results)
    metrics, lower = labels.ordered(signals, present), statistics.lower_is_better(signals)
    if not metrics:
        return Part("metrics", title, "", missing="None of these runs has an A/B test.")
    rows: list[list[str | Cell]] = []
    figures = {}
    for metric in metrics:
        less = metric in lower
        row: list[str | Cell] = [Cell(labels.name(metric), labels.units(signals, metric))]
        shown = []
        for run in runs:
            mean = number(run.arm.get(metric, {}).get("mean"))
            if metric in compared.get(run.name, {}):
                diff, bounds, _ = compared[run.name][metric]
                row.append(change(mean, diff, bounds, "+.2f %", less))
                shown.append((run.name, diff, *bounds))
            else:
                row.append(Cell(mean))
        rows.append(row)
        if shown:
            figures[f"difference-{metric}"] = charts.forest(labels.titled(signals, metric), shown, first.name, less)
    kinds = dict.fromkeys(kind for found in compared.values() for *_, kind in found.values())
    said = ["Small print: the difference to the first run, with its 95 % interval.", *(_HOW[kind] for kind in kinds)]
    if any(len(found) < len(metrics) for found in compared.values()):
        said.append(f"No difference is given where fewer than {statistics.MIN_EVENTS} users of a run have any.")
    caption = " ".join(said)
    body = split(table(["metric", *(run.name for run in runs)], rows), grid(list(figures), "forest"))
    return Part("metrics", title, caption, body, figures)


_HOW = {
    "paired": "Runs that served the same users are compared user by user.",
    "independent": "Runs that served other users are compared as independent.",
    "by control": "Metrics without sums per user are compared by their differences to each run's own control, as if "
    "independent: wider than need be if the control served the same users.",
}


def _offline(runs: Sequence[Run]) -> Part | None:
    present = dict.fromkeys(signal for run in runs for signal in run.results.get("offline", {}))
    if not present:
        return None
    rows: list[list[str | Cell]] = []
    for signal, _ in evaluation.in_order(statistics.signals_of(runs[0].results), present):
        row: list[str | Cell] = [labels.name(signal)]
        base = runs[0].results.get("offline", {}).get(signal, {})
        for run in runs:
            entry = run.results.get("offline", {}).get(signal, {})
            value = entry.get("gauc")
            text = NOTHING if value is None else labels.show(value, ".4f")
            mine, other = verdict.bounds_of(base), verdict.bounds_of(entry)
            if run is runs[0] or mine is None or other is None:
                row.append(Cell(text, interval(entry.get("ci95"))))
                continue
            diff, half = value - base["gauc"], math.hypot(mine[1] - mine[0], other[1] - other[0]) / 2.0
            row.append(change(text, diff, (diff - half, diff + half), "+.4f"))
        rows.append(row)
    caption = (
        "GAUC of the served ranking; XAUC is the same for pairs of values, such as play times. Small print: for the "
        "first run its 95 % interval, for the others the difference to it, as if their users were independent: wider "
        "than need be for the same log."
    )
    return Part("offline", "Ranking of held-out sessions", caption, table(["signal", *(r.name for r in runs)], rows))


def _curves(runs: Sequence[Run]) -> list[Part]:
    """Return the overlaid curves, by what learned."""
    parts, ends = [], {run.name: training.round_ends(run.rows) for run in runs}
    signals = statistics.signals_of(runs[0].results)
    for phase, title in _PHASES.items():
        by_run = {run.name: [row for row in run.rows if row["phase"] == phase] for run in runs}
        names = dict.fromkeys(name for rows in by_run.values() for row in rows for name in row)
        figures = {}
        for name in (name for name in names if name not in ("step", "seed", "phase", "seconds")):
            series = {}
            for index, run in enumerate(runs):
                if points := [(row["step"], row[name]) for row in by_run[run.name] if name in row]:
                    steps, values = map(list, zip(*points, strict=True))
                    series[run.name] = (index, steps, values, ends[run.name])
            figures[name] = charts.curves(*training.titled(signals, name), series, raw=len(runs) <= _FEW)
        if not figures:
            continue
        body = legend([run.name for run in runs]) + training.grouped(signals, figures, phase)
        raw = ", the raw values behind them" if len(runs) <= _FEW else ""
        caption = f"Moving means over a tenth of a round{raw}."
        drawn = {f"{phase}-{name}": figure for name, figure in figures.items()}
        parts.append(Part(f"curves-{phase}", f"Training of the {title}", caption, body, drawn))
    return parts


def _configs(runs: Sequence[Run]) -> Part:
    found = [dict(flat(run.config)) for run in runs]
    names = list(dict.fromkeys(name for config in found for name in config))
    differ = [name for name in names if any(config.get(name) != found[0].get(name) for config in found)]
    if not differ:
        return Part("configs", "Config differences", "", missing="All of these runs have the same config.")
    rows: list[list[str | Cell]] = [
        [name, *(Cell(plain(config.get(name, NOTHING)), kind="text") for config in found)] for name in differ
    ]
    head: list[str | Cell] = ["field", *(Cell(run.name, kind="text") for run in runs)]
    caption = f"{len(differ)} of {len(names)} fields."
    return Part("configs", "Config differences", caption, table(head, rows))
