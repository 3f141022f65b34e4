"""A run as one HTML page that opens offline: its setup, training, evaluation and agents.

Pure: dictionaries in, text out. The page is self-contained: Bokeh's script, the style, the data. Its
`Content-Security-Policy` forbids it to fetch anything.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable, Mapping

from bokeh.document import Document
from bokeh.embed import components
from bokeh.resources import Resources

from mmrf_jax.report import agents, charts, evaluation, sections, speed, training
from mmrf_jax.report.markup import escape, interval

_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:"
)


def build(run: sections.Run) -> str:
    """Build the page."""
    makers: tuple[Callable[[sections.Run], sections.Part | None], ...] = (
        evaluation.ab_test,
        evaluation.offline,
        evaluation.fidelity,
        training.curves,
        agents.attention,
        agents.conflict,
        agents.explorer,
        speed.speed,
        speed.scale,
        agents.settings,
    )
    parts = [part for make in makers if (part := make(run)) is not None]
    figures = {name: figure for part in parts for name, figure in part.figures.items()}
    script, boxes = _embedded(figures) if figures else ("", {})
    body = "\n".join(_section(part, boxes) for part in parts)
    links = "".join(f'<a href="#{part.identity}">{escape(part.title)}</a>' for part in parts)

    def asset(name):
        return (importlib.resources.files("mmrf_jax.report") / "assets" / name).read_text("utf-8")

    title = f"{run.name}: {run.config['method']} on {run.config['source']}"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{asset("report.css")}</style>
{Resources(mode="inline", components=["bokeh"]).render_js() if figures else ""}
</head>
<body>
<main>
<h1>{escape(title)}</h1>
<p class="lead">{escape(_lead(run))}</p>
{_tiles(run)}
<nav aria-label="sections">{links}</nav>
<noscript><p class="missing">Charts and the session explorer need JavaScript; the tables do not.</p></noscript>
{body}
</main>
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
    return components(dict(figures))


def _section(part: sections.Part, boxes: Mapping[str, str]) -> str:
    body = f'<p class="missing">{escape(part.missing)}</p>' if part.missing else part.body
    for name, box in boxes.items():
        body = body.replace("{{" + name + "}}", f'<div class="chart">{box}</div>')
    text = escape(part.caption).replace(" %", "&nbsp;%")
    caption = f'<p class="caption">{text}</p>' if text and not part.missing else ""
    return f'<section id="{part.identity}">\n<h2>{escape(part.title)}</h2>\n{caption}{body}\n</section>'


def _lead(run: sections.Run) -> str:
    train, learning = run.results.get("train"), [row for row in run.rows if row["phase"] != "time"]
    seconds = learning[-1]["seconds"] if learning else None
    said = [f"Seed {run.config['seed']}"]
    if train:
        said.append(f"{train['rounds']} rounds, {train['updates']:,} updates of the agents")
        said.append(f"{train['sessions_of_last_round']:,} sessions in the last round's log")
    else:
        said.append("not finished yet")
    if seconds:
        said.append(f"learning took {_duration(seconds)}")
    return ", ".join(said) + "."


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min" if minutes else "< 1 min"


def _tiles(run: sections.Run) -> str:
    """Return the tiles with the headline results."""
    tiles = []
    control, arms = evaluation.arms(run)
    own = arms.get(run.config["method"], {})
    signals = run.signals
    for name in (signals.main, "depth", "return_rate", *signals.choose(("like",))[:1]) if own else ():
        entry = own.get(name, {})
        if entry.get("diff_pct") is not None:
            tiles.append(
                (
                    f"{charts.show(entry['diff_pct'], '+.1f')} %",
                    sections.label(signals, name),
                    f"{interval(entry['ci95'], '+.1f')} to {control}",
                )
            )
    if not own:
        for signal in signals.choose(("click", "long_view", "watch_time"))[:3]:
            name = signal if signal in signals.binary_names else f"{signal}_xauc"
            entry = run.results.get("offline", {}).get(name, {})
            if entry.get("gauc") is not None:
                kind = "XAUC" if name.endswith("xauc") else "GAUC"
                label = name.removesuffix("_xauc").replace("_", " ")
                tiles.append((f"{entry['gauc']:.4f}", f"{kind} of {label}", interval(entry["ci95"])))
    lines = [
        f'<div class="tile"><span>{escape(b)}</span><b>{escape(a)}</b><small>{escape(c)}</small></div>'
        for a, b, c in tiles
    ]
    return f'<div class="tiles">{"".join(lines)}</div>' if lines else ""
