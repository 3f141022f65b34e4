"""The page of a report: no text becomes markup, nothing is fetched, no section is silently empty."""

import functools
import json
import math

import pytest
from pages import NASTY, Page

from mmrf_jax.report import charts, evaluation, page, palette, sections
from mmrf_jax.signals import SHORT_VIDEO

SECTIONS = ["ab-test", "offline", "model-quality", "curves", "attention", "conflict", "explorer", "settings"]


def make_run(**changes) -> sections.Run:
    same = {"mean": 900.0, "diff_pct": 0.0, "ci95": [0.0, 0.0]}
    other = {"mean": 990.0, "diff_pct": 10.0, "ci95": [-1.5, 21.5]}
    surely = {"mean": 0.5, "diff_pct": -20.0, "ci95": [-21.0, -19.0]}
    bins = [{"predicted": 0.1, "actual": 0.2, "rows": 50}, {"predicted": 0.5, "actual": 0.4, "rows": 50}]
    figure = {"eligible_users": 300, "gauc": 0.61, "gauc_ci95": [0.6, 0.62], "logloss": 0.5, "ece": 0.01}
    video = {"video": 7, "duration": 20.0, "slot": 0, "scores": [1.0, 2.0], "ranks": [1, 2], "signals": ["click"]}
    user = {"user": 3, "date": 0, "requests": 1, "videos": 1, "seconds": 9.0, "left": True}
    losses = {"loss/click": 0.5, "objective/click": 1.0, "grad_norm": 2.0, "seed": 0, "seconds": 61.0}
    matrix = {"matrix": [[1.0, -0.25], [-0.25, 1.0]], "requests": 1234}
    fields = {
        "name": "run",
        "config": {"method": "mmrf", "source": "world", "seed": 0, "ab_test": {"sessions": 64}},
        "versions": {"jax": "1.2.3"},
        "rows": [{"step": i, "phase": "fit" if i < 3 else "train"} | losses for i in range(1, 6)],
        "results": {
            "train": {"rounds": 1, "updates": 3, "sessions_of_last_round": 200},
            "ab_test": {
                "production": {"watch_time": same, "depth": same, "like": same},
                "mmrf": {
                    "watch_time": other,
                    "depth": surely,
                    "like": {"mean": 0.0, "diff_pct": None, "ci95": None, "note": "too few: 3 users of mmrf"},
                },
            },
            "offline": {"click": {"gauc": 0.6282, "gauc_agent": 0.6264, "ci95": [0.61, 0.64], "eligible_users": 4045}},
            "model_quality": {"click": {"model": figure | {"by_decile": bins}, "agents": figure | {"by_decile": bins}}},
        },
        "source": {},
        "explained": {
            "attention": {"matrix": [[0.0, 1.0], [1.0, 0.0]], "requests": 1234},
            "actors": matrix | {"itself": [0.9, 0.8]},
            "encoder": matrix | {"itself": None},
            "sessions": {
                "served": True,
                "agents": ["click", "watch_time"],
                "users": [user | {"shown": [[video | {"seconds": 9.0}]]}],
            },
        },
    }
    return sections.Run(**({"signals": SHORT_VIDEO} | fields | changes))


@functools.cache
def plain() -> str:
    """The page of a run as it is made above; Bokeh takes a third of a second for one."""
    return page.build(make_run())


def test_every_section_is_there_and_figures_are_the_results():
    found = Page(plain())
    assert list(found.sections) == SECTIONS
    assert sum(a.get("class") == "missing" for _, a in found.elements) == 2  # of starts, and of scripts
    ab, offline = found.sections["ab-test"], found.sections["offline"]
    cells = [a.get("class") for tag, a in found.elements if tag == "td"]
    assert cells.count("worse") == 1 and cells.count("better") == 0  # depth alone differs from production
    # The run's own arm stands next to the names, before production.
    assert "metricmmrfproductionwatch timeseconds per session990+10.00 %[−1.50, +21.50]900" in ab
    assert "depthvideos per session0.5−20.00 % worse[−21.00, −19.00]900" in ab
    assert "0too few" in ab and "Too few: fewer than 25 users of an arm have any" in ab
    said = "Too small to tell mmrf from production by watch_time: the true difference may be 0, and as large as 22 %;"
    assert said in ab.replace("\xa0", " ")
    assert "0.6282[0.6100, 0.6400]0.6264" in offline and "4,045" in offline
    assert "1,234" in found.sections["attention"] and "1,234" in found.sections["conflict"]
    assert "1.2.3" in found.sections["settings"] and "before its folder recorded" in found.sections["settings"]
    viewport = next(a for tag, a in found.elements if tag == "meta" and a.get("name") == "viewport")
    assert "width=device-width" in viewport["content"]


def test_bold_is_better_or_worse_by_metric_and_section():
    results = json.loads(json.dumps(make_run().results))
    more = {"mean": 2.0, "diff_pct": 20.0, "ci95": [10.0, 30.0]}
    for name in ("hate", "gini", "follow"):
        results["ab_test"]["production"][name] = {"mean": 1.0, "diff_pct": 0.0, "ci95": [0.0, 0.0]}
        results["ab_test"]["mmrf"][name] = more
    results["offline"]["click"]["against"] = {"popularity": {"gauc": 0.6, "diff": 0.02, "diff_ci95": [0.01, 0.03]}}
    minus = {"logloss": {"diff": -0.1, "ci95": [-0.2, -0.1]}}
    results["model_quality"]["click"]["agents"]["model_minus"] = minus
    found = Page(page.build(make_run(results=results, rows=[])))
    ab = found.sections["ab-test"]
    assert "followsper video2+20.00 % better[+10.00, +30.00]1" in ab
    assert "hatesper videoless is better2+20.00 % worse[+10.00, +30.00]1" in ab
    assert "Gini indexof exposuresless is better2+20.00 % worse[+10.00, +30.00]1" in ab
    assert "0.6000+0.0200 better[+0.0100, +0.0300]" in found.sections["offline"]
    assert "−0.1000 better[−0.2000, −0.1000]" in found.sections["model-quality"]
    cells = [a.get("class") for tag, a in found.elements if tag == "td"]
    assert cells.count("better") == 3 and cells.count("worse") == 3


def test_the_verdict_stands_on_top_with_its_tiles():
    found = plain()
    sentence = "mmrf is not distinguishable from production: watch time +10.0&nbsp;% [−1.5,&nbsp;+21.5]"
    assert f'<p class="verdict unclear">{sentence}' in found and found.index("verdict unclear") < found.index("<nav")
    small = "<small>to production, [−1.5,&nbsp;+21.5]</small>"
    assert f'<div class="tile "><span>watch time</span><b>+10.0 %</b>{small}</div>' in found
    results = json.loads(json.dumps(make_run().results))
    results["ab_test"]["production"]["click"] = {"mean": 0.5, "diff_pct": 0.0, "ci95": [0.0, 0.0]}
    results["ab_test"]["mmrf"] |= {
        "watch_time": {"mean": 2.0, "diff_pct": 20.0, "ci95": [10.0, 30.0]},
        "hate": {"mean": 2.0, "diff_pct": 20.0, "ci95": [10.0, 30.0]},
        "click": {"mean": 0.25, "diff_pct": None, "ci95": None, "note": "too few: 3 users"},
    }
    found = page.build(make_run(results=results, rows=[]))
    assert '<p class="verdict better">mmrf is better than production' in found
    assert '<div class="tile better"><span>watch time</span>' in found
    worse = "<b>+20.0 %</b><small>worse than production, [+10.0,&nbsp;+30.0]</small>"
    assert f'<div class="tile worse"><span>hates</span>{worse}' in found
    means = "<small>0.25 per video, production 0.5</small>"
    assert f'<div class="tile "><span>clicks</span><b>too few</b>{means}' in found
    assert '<p class="verdict none">No verdict yet' in page.build(make_run(results={}, rows=[]))


def test_tiles_of_logs_are_the_baselines():
    against = {
        "popularity": {"gauc": 0.6, "diff": 0.02, "diff_ci95": [0.01, 0.03]},
        "boosting": {"gauc": 0.6, "diff": None, "diff_ci95": None},
        "logistic": {"gauc": 0.6, "diff": 0.02, "diff_ci95": [0.01, 0.03]},
    }
    results = json.loads(json.dumps(make_run().results))
    del results["ab_test"]
    results["offline"]["watch_time_xauc"] = results["offline"]["click"] | {"against": against}
    found = page.build(make_run(results=results, rows=[]))
    assert "By watch time (XAUC), mmrf is better than popularity (+0.0200 [+0.0100,&nbsp;+0.0300]) and not" in found
    tile = "<b>+0.0200</b><small>better than popularity, [+0.0100,&nbsp;+0.0300]</small></div>"
    assert f'<div class="tile better"><span>XAUC of watch time</span>{tile}' in found
    assert found.count('<div class="tile ') == 1


def test_what_was_run_is_said():
    start = {"start": "2026-01-02 03:04 UTC", "host": "h1", "commit": "abc", "command": f"python -m x --a='{NASTY}'"}
    times = {"step": 9, "phase": "time", "seconds": 50.0, "seconds_compiling": 30.0, "seconds_training": 10.0}
    run = make_run(starts=[start, start | {"host": "h2"}])
    text = page.build(make_run(starts=run.starts, rows=[*run.rows, times]))
    found = Page(text).sections["settings"]
    assert "2026-01-02 03:04 UTCh1abcpython -m x" in found and "UTCh2abc" in found
    assert "compiling30.075%" in found and "training10.025%" in found
    assert "started 2026-01-02 03:04 UTC on h1 at commit abc" in text
    installed = page.build(make_run(starts=[start | {"commit": "version 0.2.0"}], rows=[], results={}))
    assert "started 2026-01-02 03:04 UTC on h1 at version 0.2.0" in installed


def drawn(found: Page) -> int:
    return sum("data-root-id" in a for _, a in found.elements)


def test_each_chart_has_a_place():
    # Two differences, one ranking, one reliability, three curves, attention and two conflicts.
    assert drawn(Page(plain())) == 2 + 1 + 1 + 3 + 1 + 2


def test_signals_that_nothing_ranked_are_not_in_the_chart_of_rankings():
    entries = {
        "click": {"gauc": 0.61, "gauc_agent": 0.6, "ci95": [0.6, 0.62], "against": {"popularity": {"gauc": 0.55}}},
        "like": {"gauc": 0.7, "ci95": None},
        "hate": {"gauc": None, "ci95": None},
    }
    chart = evaluation._ranked(entries, ["popularity"])
    assert list(chart.y_range.factors) == ["likes", "clicks"]
    assert chart.x_range.start < 0.5 < 0.7 < chart.x_range.end
    points = {
        r.data_source.data["ranker"][0]: r.data_source.data for r in chart.renderers if "ranker" in r.data_source.data
    }
    assert {name: list(data["share"]) for name, data in points.items()} == {
        "served ranking": [0.61, 0.7],
        "own agent": [0.6],
        "popularity": [0.55],
    }


def test_what_a_run_does_not_have_is_explained():
    run = make_run()
    missing = {"missing": "because of co"}
    alone = run.explained | {"attention": missing, "actors": missing}
    found = Page(page.build(make_run(explained=alone)))
    assert "because of co" in found.sections["attention"] and "because of co" in found.sections["conflict"]
    assert drawn(found) == drawn(Page(plain())) - 2  # the critics' conflict stays

    alone = run.explained | {name: {"missing": "a single ranker"} for name in ("attention", "actors", "encoder")}
    results = {name: value for name, value in run.results.items() if name not in ("ab_test", "model_quality")}
    config = run.config | {"method": "myopic", "source": "kuairand"}
    found = Page(page.build(make_run(explained=alone, results=results, config=config)))
    assert "logs alone" in found.sections["ab-test"] and "method=myopic" in found.sections["model-quality"]
    assert "a single ranker" in found.sections["attention"] and "a single ranker" in found.sections["conflict"]

    found = Page(page.build(make_run(results={}, rows=[])))
    assert list(found.sections) == SECTIONS
    for name in ("ab-test", "offline", "model-quality"):
        assert "results.json is not there yet" in found.sections[name]
    assert "no steps" in found.sections["curves"]


def test_text_is_never_markup():
    run = make_run()
    sessions = json.loads(json.dumps(run.explained["sessions"]))
    sessions["agents"][0] = NASTY
    sessions["users"][0]["shown"][0][0]["signals"] = [NASTY]
    results = json.loads(json.dumps(run.results))
    results["ab_test"][NASTY] = results["ab_test"]["mmrf"]
    results["offline"][NASTY] = results["offline"]["click"]
    nasty = make_run(
        name=NASTY,
        config=run.config | {NASTY: NASTY},
        versions={NASTY: NASTY},
        rows=[row | {NASTY: 1.0} for row in run.rows],
        results=results,
        explained=run.explained | {"sessions": sessions, "attention": {"missing": NASTY}},
        source={NASTY: 1},
    )
    before, after = Page(plain()), Page(page.build(nasty))

    def count(found, tag):
        return sum(name == tag for name, _ in found.elements)

    assert count(after, "script") == count(before, "script") and count(after, "img") == 0
    assert not any("onerror" in attributes for _, attributes in after.elements)
    assert "<img src=http" in after.sections["settings"] and "<img src=http" in after.sections["attention"]
    data = json.loads(next(text for text in after.scripts if text.startswith('{"users"')))
    assert data["users"][0]["shown"][0][0]["signals"] == [NASTY]


def test_nothing_is_fetched():
    found = Page(plain())
    for tag, attributes in found.elements:
        for name in ("src", "href", "data", "action", "poster", "srcset"):
            where = attributes.get(name, "#")
            assert where.startswith("#") or where == "data:,", (tag, where)
    policy = next(a["content"] for _, a in found.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';") and "http" not in policy and "*" not in policy


def test_curves_are_means_of_neighbours_with_a_gap_between_rounds():
    x, y = charts.thinned([1, 2, 3, 4], [10.0, 20.0, 30.0, 50.0], [2])
    assert x[:2] == [1, 2] and math.isnan(x[2]) and x[3:] == [3, 4]
    assert y[:2] == [10, 20] and math.isnan(y[2]) and y[3:] == [30, 50]
    many = [float(i) for i in range(1000)]
    x, y = charts.thinned(many, many, [499])
    assert len(x) <= 125 and x[0] == 4.0 and y == pytest.approx(x, nan_ok=True)  # the mean of 0 … 8


def test_smoothing_is_a_centred_mean_within_a_round():
    values = [0.0] * 20 + [100.0] * 20  # a reach of 1 on both sides
    found = charts.smoothed(range(40), values, [19])
    assert found == values
    spike = [0.0] * 10 + [30.0] + [0.0] * 10
    assert charts.smoothed(range(21), spike, [])[8:13] == [0.0, 10.0, 10.0, 10.0, 0.0]
    assert charts.smoothed(range(21), [4.0, *[1.0] * 20], [])[:3] == [2.5, 2.0, 1.0]  # fewer at an end


def test_curves_have_the_raw_values_behind_and_units():
    plot = charts.curves("clicks", "nats", {"agents": (0, [1, 2, 3], [3.0, 1.0, 2.0], [2])})
    raw, smooth = plot.renderers[:2]
    assert raw.glyph.line_alpha == 0.3 and smooth.glyph.line_alpha == 1.0
    assert raw.data_source.data["y"][0][:2] == [3.0, 1.0] and smooth.data_source.data["name"] == ["agents"]
    assert len(charts.curves("clicks", "nats", {"agents": (0, [1], [3.0], [])}, raw=False).renderers) == 2
    assert plot.xaxis.axis_label == "step" and plot.yaxis.axis_label == "nats"


def test_wilson_by_hand():
    low, high = charts.wilson(0.5, 100)
    assert (low, high) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert charts.wilson(0.0, 10)[0] == 0.0 and charts.wilson(0.0, 10)[1] == pytest.approx(0.2775, abs=1e-3)


def test_a_forest_holds_the_differences_and_their_directions():
    rows = [("a", 5.0, 4.0, 6.0), ("b", -1.0, -3.0, 1.0), ("c", -5.0, -6.0, -4.0)]
    for less in (False, True):
        plot = charts.forest("depth", rows, "production", less)
        data = plot.renderers[0].data_source.data
        assert data["text"] == ["+5.0 %", "−1.0 %", "−5.0 %"] and data["low"] == [4.0, -3.0, -6.0]
        assert data["filled"] == [1.0, 0.0, 1.0]
        order = ["worse", "", "better"] if less else ["better", "", "worse"]
        wanted = [palette.DIRECTIONS[outcome] for outcome in order]
        assert list(zip(data["colour"], data["marker"], strict=True)) == wanted
    assert list(plot.y_range.factors) == ["c", "b", "a"]  # from below
    assert plot.xaxis.axis_label == "difference to production, %"


def test_shares_are_dots_on_their_logarithmic_axis():
    plot = charts.shares("s", [("a", 0.5, "1 x/s"), ("b", 20.0, "2 x/s")])
    kinds = [type(renderer.glyph).__name__ for renderer in plot.renderers]
    assert kinds == ["Scatter", "Text"] and plot.renderers[0].data_source.data["share"] == [0.5, 20.0]


def test_series_differ_without_colour():
    styles = [palette.style(i) for i in range(20)]
    assert len({look["marker"] for look in styles[:4]}) == len({look["dash"] for look in styles[:4]}) == 4
    assert len({tuple(look.values()) for look in styles}) == 20


def test_a_dark_page_has_a_colour_for_each_that_would_not_show():
    text = plain()
    data = text.split('id="dark-colours">')[1].split("</script>")[0]
    assert json.loads(data) == palette.DARK and palette.DARK["#000000"] == "#ffffff"
    assert "embed_items(themed(docs_json)" in text
    assert text.index("const themed") < text.index("themed(docs_json)")


def test_signs_differ_in_a_matrix_and_the_empty_stay_out():
    plot = charts.heat("m", ["a", "b"], ["a", "b"], [[None, -1.0], [0.5, None]], -1.0, 1.0)
    data = plot.renderers[0].data_source.data
    assert data["text"] == ["−1.00", "0.50"] and list(zip(data["row"], data["column"], strict=True)) == [
        ("a", "b"),
        ("b", "a"),
    ]
    assert len(set(data["fill"])) == 2 and data["ink"][0] == "#ffffff"


def test_what_the_machine_did_is_shown_where_it_was_measured():
    machine = {"cores": 2, "devices": ["cpu:0"], "jax": "1.2.3"}
    limited = {"name": "world/random", "value": 250_435.4, "unit": "requests/s", "limit": 309_144.0}
    speed = [{"name": "world/memory", "value": 1.85, "unit": "GiB"}, limited | {"fraction_of_limit": 0.81}]
    scale = [{"name": f"tables/update/{rows}", "value": 2.5, "unit": "ms"} for rows in (10**5, 10**8)]
    scale.append({"name": "tables/update/growth", "value": 1.1, "unit": "ratio"})
    measured = {"speed": {"results": speed, "machine": machine}, "scale": {"results": scale, "machine": machine}}
    found = Page(page.build(make_run(measured=measured)))
    assert list(found.sections) == [*SECTIONS[:-1], "speed", "scale", SECTIONS[-1]]
    assert "1.85 GiB" in found.sections["speed"] and "2 cores, cpu:0" in found.sections["speed"]
    script = "".join(found.scripts)
    assert "250,435 requests/s" in script and "number of tables" in script and '"ratio"' not in script
