"""A run as one HTML page that opens offline: its setup, training, evaluation and agents.

Pure: dictionaries in, text out. The page is self-contained: Bokeh's script, the style, the data. Its
`Content-Security-Policy` forbids it to fetch anything.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from bokeh.document import Document
from bokeh.embed import components
from bokeh.resources import Resources

from mmrf_jax.abtest import statistics
from mmrf_jax.report import agents, charts, evaluation, labels, markup, palette, sections, speed, training, verdict
from mmrf_jax.report.markup import data, escape, prose

_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:"
)

_EMBED = "root.Bokeh.embed.embed_items(docs_json"  # its argument holds the colours of the charts


def build(run: sections.Run) -> str:
    """Build the page."""
    makers: tuple[Callable[[sections.Run], sections.Part | None], ...] = (
        evaluation.ab_test,
        evaluation.offline,
        evaluation.model_quality,
        training.curves,
        agents.attention,
        agents.conflict,
        agents.explorer,
        speed.speed,
        speed.scale,
        agents.settings,
    )
    parts = [part for make in makers if (part := make(run)) is not None]
    found = verdict.of_run(run.results, run.config)
    title = f"{run.name}: {run.config['method']} on {run.config['source']}"
    top = f'<p class="verdict {found.outcome}">{prose(found.sentence)}</p>\n{_tiles(run, found)}'
    return render(title, _lead(run), top, parts)


def render(title: str, lead: str, top: str, parts: Sequence[sections.Part]) -> str:
    """Return a page.

    Args:
      title: text of the headline.
      lead: text under it.
      top: HTML above the sections.
      parts: the sections.
    """
    figures = {name: figure for part in parts for name, figure in part.figures.items()}
    script, boxes = _embedded(figures) if figures else ("", {})
    body = "\n".join(_section(part, boxes) for part in parts)
    links = "".join(f'<a href="#{part.identity}">{escape(part.title)}</a>' for part in parts)

    def asset(name):
        return (importlib.resources.files("mmrf_jax.report") / "assets" / name).read_text("utf-8")

    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{asset("report.css")}</style>
{Resources(mode="inline", components=["bokeh"]).render_js() if figures else ""}
</head>
<body>
<main>
<h1>{escape(title)}</h1>
<p class="lead">{escape(lead)}</p>
{top}
<nav aria-label="sections">{links}</nav>
<noscript><p class="missing">Charts and the session explorer need JavaScript; the tables do not.</p></noscript>
{body}
</main>
{data("dark-colours", palette.DARK)}
<script>{asset("theme.js")}</script>
{script}
<script>{asset("explorer.js")}</script>
</body>
</html>
"""


def _embedded(figures: Mapping[str, charts.Figure]) -> tuple[str, dict[str, str]]:
    """Return the script of all charts, and each chart's HTML placeholder."""
    document = Document()
    with document.models.freeze():  # otherwise Bokeh rescans all earlier charts for every chart added
        for figure in figures.values():
            document.add_root(figure)
    script, boxes = components(dict(figures))
    if _EMBED not in script:
        raise RuntimeError(f"this version of Bokeh does not call {_EMBED}); use one of requirements.txt")
    return script.replace(_EMBED, "root.Bokeh.embed.embed_items(themed(docs_json)"), boxes


def _section(part: sections.Part, boxes: Mapping[str, str]) -> str:
    body = f'<p class="missing">{escape(part.missing)}</p>' if part.missing else part.body
    for name, box in boxes.items():
        body = body.replace("{{" + name + "}}", f'<div class="chart">{box}</div>')
    caption = f'<p class="caption">{prose(part.caption)}</p>' if part.caption and not part.missing else ""
    return f'<section id="{part.identity}">\n<h2>{escape(part.title)}</h2>\n{caption}{body}\n</section>'


def _lead(run: sections.Run) -> str:
    train, learning = run.results.get("train"), [row for row in run.rows if row["phase"] != "time"]
    said = [f"Seed {run.config['seed']}"]
    if train:
        said.append(f"{train['rounds']} rounds, {train['updates']:,} updates of the agents")
        said.append(f"{train['sessions_of_last_round']:,} sessions in the last round's log")
    else:
        said.append("not finished yet")
    if learning:
        said.append(f"learning took {_duration(learning[-1]['seconds'])}")
    if run.starts:
        first = run.starts[0]
        code = first["commit"] or "unknown"  # or "version X" of an installed package
        code = code if code.startswith("version ") else f"commit {code}"
        said.append(f"started {first['start']} on {first['host']} at {code}")
    return ", ".join(said) + "."


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min" if minutes else "< 1 min"


def _tiles(run: sections.Run, found: verdict.Verdict) -> str:
    """Return a tile for the verdict's main metric and for each guardrail."""
    own = run.results.get("ab_test", {}).get(run.config["method"], {})
    metrics = list(dict.fromkeys((found.metric, *verdict.guardrails(run.signals)))) if found.metric else []
    tiles = _of_arm(run, own, metrics) if found.metric in own else _of_logs(run, metrics)
    lines = [
        f'<div class="tile {outcome}"><span>{escape(name)}</span><b>{escape(figure)}</b>'
        f"<small>{prose(detail)}</small></div>"
        for name, figure, detail, outcome in tiles
    ]
    return f'<div class="tiles">{"".join(lines)}</div>' if lines else ""


def _of_arm(run: sections.Run, own: Mapping[str, Any], metrics: Sequence[str]) -> Iterator[tuple[str, str, str, str]]:
    control, _ = evaluation.arms(run)
    base = run.results["ab_test"][control]
    for metric in (metric for metric in metrics if metric in own):
        cell = evaluation.difference(own[metric], metric in statistics.lower_is_better(run.signals))
        if isinstance(cell.detail, str):  # why there is no interval
            unit, other = labels.units(run.signals, metric)[0], markup.number(base.get(metric, {}).get("mean"))
            means = f"{cell.text} {unit}, {control} {other}"
            yield labels.name(metric), cell.detail, means, ""
        else:
            figure, bounds = labels.show(own[metric]["diff_pct"], "+.1f"), markup.interval(own[metric]["ci95"], "+.1f")
            yield labels.name(metric), f"{figure} %", _compared(cell.outcome, control, bounds), cell.outcome


def _of_logs(run: sections.Run, metrics: Sequence[str]) -> Iterator[tuple[str, str, str, str]]:
    for metric in metrics:
        kind, name = ("XAUC" if metric.endswith("_xauc") else "GAUC"), labels.name(metric.removesuffix("_xauc"))
        for rival, entry in run.results.get("offline", {}).get(metric, {}).get("against", {}).items():
            cell = markup.change("", entry.get("diff"), entry.get("diff_ci95"), "+.4f")
            if rival in verdict.BASELINES and len(cell.detail) > 1:
                figure, bounds = labels.show(entry["diff"], "+.4f"), cell.detail[1]
                yield f"{kind} of {name}", figure, _compared(cell.outcome, rival, bounds), cell.outcome


def _compared(outcome: str, other: str, bounds: str) -> str:
    return f"{outcome} than {other}, {bounds}" if outcome else f"to {other}, {bounds}"
