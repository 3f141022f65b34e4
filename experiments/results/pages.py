"""Write the result tables and plots of README.md and docs/ from the finished tables in this folder.

  python -m experiments.results.pages            # writes every table anew
  python -m experiments.results.pages --check    # changes nothing; exits with 1 if a page is stale
  python -m experiments.results.pages --plots    # draws the plots anew

A page has a table between `<!-- table: NAME -->` and `<!-- end of table -->`; `TABLES` defines the names.
NAME/table.json is what `launch.sweep` writes. `world` and `kuairand` have the part of a run's results.json that the
pages print, with its digits; to publish another run, copy its results.json there. `scale` and `speed` have what `mmrf
benchmark` printed into docs/scale.md and docs/performance.md.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmrf_jax.abtest import statistics
from mmrf_jax.metrics import offline
from mmrf_jax.report import plots
from mmrf_jax.signals import SHORT_VIDEO
from mmrf_jax.sweeps import off_policy_study

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "experiments" / "results"
_MARKED = re.compile(r"(<!-- table: (\S+) -->\n)(.*?)(\n?<!-- end of table -->)", re.DOTALL)

_METHODS = ("mmrf", "massa", "tscac", "td3_bc", "iql", "pareto", "deepfm", "wide_deep", "ltr", "bc")
_OTHERS = ("production", "popularity", "random", "oracle_myopic", "oracle_planning")
_SESSION = {
    "watch_time": "watch time, s per session",
    "depth": "depth, videos per session",
    "like": "likes per video",
}
_VISITS = _SESSION | {"return_rate": "return rate"}


@functools.cache
def read(name: str) -> dict[str, Any]:
    """Read a finished study's table.json, or a run's results.json."""
    folder = RESULTS / name
    (path,) = [path for path in (folder / "table.json", folder / "results.json") if path.exists()]
    return json.loads(path.read_text())


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table."""
    lines = ["| " + " | ".join(line) + " |" for line in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def cell(entry: Mapping[str, Any], lower_is_better: bool = False) -> str:
    """Format a metric of an arm as "mean, diff % [low, high]", with "better" or "worse"; of the reference as "mean"."""
    mean = entry["mean"]
    if mean is None:
        return "–"
    text = f"{mean:,.0f}" if abs(mean) >= 1_000 else f"{mean:.4g}"
    if not entry["diff_pct"]:
        return text
    return f"{text}, {difference(entry, lower_is_better)}"


def difference(entry: Mapping[str, Any], lower_is_better: bool = False, digits: int = 2) -> str:
    """Format "diff % [low, high]", with "better" or "worse" if the interval excludes 0."""
    text = f"{entry['diff_pct']:+.{digits}f} %"
    if entry["ci95"] is None:
        return f"{text}, {statistics.reason(entry)}"
    low, high = entry["ci95"]
    text += f" [{low:+.{digits}f}, {high:+.{digits}f}]"
    return f"{text} {statistics.verdict(entry['ci95'], lower_is_better)}".rstrip()


def arms(
    name: str,
    rows: Mapping[str, str] | Sequence[str],
    columns: Mapping[Any, str],
    part: str = "ab_test",
    head: str = "arm",
) -> str:
    """Format arms × metrics.

    Args:
      name: of the study.
      rows: the arms, or {arm: its label}.
      columns: {metric or (part, metric): label}.
      part: of the study's table, for columns that name none.
      head: label of the first column.
    """
    table, labels = read(name), rows if isinstance(rows, Mapping) else {arm: arm for arm in rows}
    lower = statistics.lower_is_better(SHORT_VIDEO)

    def is_error(part: str, metric: str) -> bool:
        return part == "errors" or metric in lower or (part == "unseen" and not metric.endswith("GAUC"))

    keys = [key if isinstance(key, tuple) else (part, key) for key in columns]
    lines = [[label, *(cell(table[p][arm][m], is_error(p, m)) for p, m in keys)] for arm, label in labels.items()]
    return markdown([head, *columns.values()], lines)


def convergence() -> str:
    """Format the watch time of each method after one and two passes."""
    table, lines = read("convergence")["ab_test"], []
    for method in ("mmrf", "massa", "tscac", "td3_bc", "iql", "pareto", "ltr", "wide_deep", "deepfm", "bc"):
        one, two = table[method]["watch_time"], table[f"{method}_twice"]["watch_time"]
        change = table["mmrf_twice"]["watch_time"] if method == "mmrf" else two
        lines.append([method, cell(one | {"diff_pct": 0}), cell(two | {"diff_pct": 0}), difference(change, digits=1)])
    return markdown(["method", "one pass", "two passes", "change"], lines)


def conflict() -> str:
    """Format gradient cosines and attention of each auxiliary agent, by round."""
    lines = []
    for number, row in enumerate(read("conflict")["conflict"]["mmrf"], 1):
        cells = [
            f"{row[f'encoder/{name}']:+.2f} / {row[f'actors/{name}']:+.2f} / {row[f'attention/{name}']:.2f}"
            for name in SHORT_VIDEO.agents[:-1]
        ]
        lines.append([str(number), *cells])
    return markdown(["round", *SHORT_VIDEO.agents[:-1]], lines)


def estimators() -> str:
    """Format errors, coverage and rank correlation of the off-policy estimators for watch time."""
    summary, lines = read("table_estimators")["summary"]["watch_time"], []
    shown = [("ips", "inf"), *(("ncis", cap) for cap in ("2", "10", "50", "inf"))]
    own = (*off_policy_study.WITH_MODEL, *off_policy_study.OF_SLATES)
    for estimator, cap in (*shown, *((name, off_policy_study.DEFAULT) for name in own)):
        cells = [off_policy_study.label(estimator, cap)]
        if estimator in off_policy_study.OF_SLATES:
            cells[0] += ", of slates"
        elif cap.isdigit():
            cells[0] += f", cap {cap}"
        for policies in ("all", "close"):
            found = summary[estimator][cap][policies]
            cells += [f"{100 * found['error']:.2f}", f"{found['coverage']:.3f}"]
        lines.append([*cells, f"{found['rank']:.3f}", f"{found['rank_on_policy']:.3f}"])
    header = [f"{what}, {which}" for which in ("all", "close") for what in ("error, %", "coverage")]
    return markdown(["estimator", *header, "rank, close", "rank (ii), close"], lines)


#: Rankers that KuaiRand's agents are compared with, in results.json and in the tables.
_RANKERS = {
    "critics": "critics",
    "feedback_model": "feedback model",
    "boosting": "LightGBM",
    "logistic": "logistic",
    "popularity": "popularity",
}


def kuairand(log: str, signals: Sequence[str] = (), rankers: Mapping[str, str] = _RANKERS) -> str:
    """Format the GAUC of a run and of other rankers on a held-out log, and the difference to LightGBM."""
    results, lines = read("kuairand"), []
    entries = results[offline.key("offline", log)]
    for name in signals or entries:
        entry = entries[name]
        own, others = entry.get("gauc_agent"), entry["against"]
        scores = [entry["gauc"], own, *(others[ranker]["gauc"] for ranker in rankers)]
        low, high = others["boosting"]["diff_ci95"]
        gauc = ["–" if x is None else f"{x:.4f}" for x in scores]
        lines.append(
            [name, str(entry["eligible_users"]), *gauc, f"{others['boosting']['diff']:+.4f} [{low:+.4f}, {high:+.4f}]"]
        )
    header = ["signal", "users", "served", "own agent", *rankers.values(), "own (or served) − LightGBM"]
    return markdown(header, lines)


_UNCERTAINTY = {
    "mmrf": "mmrf",
    "penalty": "penalty",
    "bonus": "bonus",
    "drawn": "videos drawn by uncertainty",
}
_SAMPLES = {
    "production": "production",
    **{
        f"{arm}_{n}k": f"{1_024 * n:,} sessions, {label}"
        for n in (3, 12)
        for arm, label in (("da", "without"), ("mmrf", "with the model"))
    },
}
_ERRORS = {
    "click, shown": "click, shown",
    "click, not shown": "click, not shown",
    "long_view, not shown": "long_view, not shown",
    "watch_time, not shown": "watch time, not shown, s",
}

TABLES: dict[str, Callable[[], str]] = {
    "world": lambda: arms("world", ("production", "random", "oracle_myopic", "oracle_planning", "mmrf"), _VISITS),
    "ablation": lambda: arms("table_ablation", ("mmrf", "co", "da", "ns", "production"), _SESSION),
    "ablation_errors": lambda: arms(
        "table_ablation",
        ("model of mmrf", "agents of mmrf", "agents of co", "agents of da", "agents of ns"),
        _ERRORS,
        part="errors",
        head="predictor",
    ),
    "model_parts": lambda: arms("model_parts", ("mmrf", "labels_only", "values_only", "da"), _SESSION),
    "collaboration_sparse": lambda: arms(
        "collaboration_sparse",
        {
            **{
                f"{critics}_{name}_1024": f"{critics}, {name}"
                for critics in ("shared", "own")
                for name in ("none", "attention", "massa", "single")
            },
            "production": "production",
            "oracle_planning": "oracle_planning",
        },
        _SESSION,
        head="critics, communication",
    ),
    "single_vs_multi": lambda: arms("single_vs_multi", ("mmrf", "only_watch_time", "sum"), _SESSION),
    "coverage": lambda: arms(
        "bias_coverage",
        ("mmrf", "da", "ns", "production", "random"),
        {
            "watch_time": _SESSION["watch_time"],
            "coverage": "coverage",
            "gini": "Gini",
            "ild": "intra-list diversity",
        },
    ),
    "methods": lambda: arms("table_ab", (*_METHODS, *_OTHERS), _VISITS),
    "methods_shifted": lambda: arms(
        "table_ab",
        (*_METHODS, *_OTHERS),
        {
            ("ab_test_users", "watch_time"): "watch time, other mix of users",
            ("ab_test_exit_hazard", "watch_time"): "watch time, other exit hazard",
        },
    ),
    "methods_offline": lambda: arms(
        "table_offline",
        _METHODS,
        {
            "GAUC long_view": "GAUC long_view",
            "GAUC watch_time_xauc": "GAUC watch_time_xauc",
            "GAUC click": "GAUC click",
            "NCIS watch_time": "NCIS watch time, s per video",
        },
        part="offline",
        head="method",
    ),
    "convergence": convergence,
    "uncertainty": lambda: arms("uncertainty", _UNCERTAINTY, _SESSION),
    "mlp_heads": lambda: arms("mlp_heads", {"mmrf": "mmrf: products", "mlp": "products and MLPs"}, _SESSION),
    "ab_long": lambda: arms(
        "ab_long",
        ("ltr", "production", "da", "mmrf"),
        {
            "watch_time_per_day": "watch time per user and day, s",
            "visits": "share of users who come, of all days",
            "watch_time_per_day, late / early": "watch time, days 9 to 14 / days 2 to 7",
        },
        part="by_day",
    ),
    "conflict": conflict,
    "sample_efficiency": lambda: arms(
        "sample_efficiency", _SAMPLES, {name: _SESSION[name] for name in ("watch_time", "depth")}
    ),
    "estimators": estimators,
    "kuairand_frozen": lambda: kuairand("test_frozen_history"),
    "kuairand": lambda: kuairand("test"),
    "kuairand_random": lambda: kuairand("random_test"),
    "kuairand_summary": lambda: kuairand(
        "test_frozen_history",
        ("click", "like", "long_view", "watch_time_xauc"),
        {name: _RANKERS[name] for name in ("boosting", "logistic", "popularity")},
    ),
    "methods_kuairand": lambda: arms(
        "table_offline_kuairand",
        ("mmrf", "massa", "tscac", "pareto", "td3_bc", "iql", "ltr", "deepfm", "wide_deep", "bc"),
        {
            ("offline_frozen", "GAUC long_view"): "GAUC long_view, frozen",
            ("offline_frozen", "GAUC watch_time_xauc"): "XAUC watch time, frozen",
            ("offline_frozen", "GAUC click"): "GAUC click, frozen",
            ("offline", "GAUC watch_time_xauc"): "XAUC watch time",
            ("offline", "NCIS watch_time"): "NCIS watch time, s per video",
            ("offline_random", "GAUC long_view"): "GAUC long_view, random log",
        },
        head="method",
    ),
}

#: Plots of docs/, by name.
PLOTS: dict[str, Callable[[Path], None]] = {
    "ab.png": lambda path: plots.forest(read("world"), path),
    "scale.png": lambda path: plots.growth(read("scale")["results"], path),
    "speed.png": lambda path: plots.limits(read("speed")["results"], path),
}


def pages(root: Path = ROOT) -> list[Path]:
    """Return the pages that may have tables."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def render(text: str, where: str) -> str:
    """Return a page with its tables written anew.

    Raises:
      ValueError: for a table that is not defined, or a marker without its end.
    """

    def table(found: re.Match) -> str:
        if found[2] not in TABLES:
            raise ValueError(f"{where}: unknown table {found[2]!r}; choose among {', '.join(TABLES)}")
        return f"{found[1]}{TABLES[found[2]]()}\n{found[4].strip()}"

    if text.count("<!-- table:") != len(_MARKED.findall(text)):
        raise ValueError(f"{where}: a table has no <!-- end of table -->; add it")
    return _MARKED.sub(table, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, and exit with 1 if a page is stale")
    parser.add_argument("--plots", action="store_true", help="draw the plots instead of writing tables")
    asked, stale = parser.parse_args(), []
    if asked.plots:
        for name, draw in PLOTS.items():
            draw(ROOT / "docs" / name)
        print(f"{len(PLOTS)} plots drawn")
        return
    for path in pages():
        text = path.read_text()
        if (new := render(text, path.relative_to(ROOT).as_posix())) != text:
            stale.append(path.relative_to(ROOT).as_posix())
            if not asked.check:
                path.write_text(new)
    if stale and asked.check:
        sys.exit(f"stale tables in {', '.join(stale)}; run python -m experiments.results.pages")
    print(f"{len(stale)} pages written" if stale else "all tables are up to date")


if __name__ == "__main__":
    main()
