"""The tables of README.md and docs/ are those of experiments/results."""

import json
import re

import pytest

from experiments.results import pages


def test_every_table_of_the_pages_is_up_to_date():
    found = []
    for path in pages.pages():
        text = path.read_text()
        assert pages.render(text, path.name) == text, f"{path} is stale; run python -m experiments.results.pages"
        found += [part.split(" -->")[0] for part in text.split("<!-- table: ")[1:]]
    assert set(found) == set(pages.TABLES)


def test_cells_by_hand():
    entry = {"mean": 2041.9, "diff_pct": -0.454, "ci95": [-1.049, 0.16]}
    assert pages.cell(entry) == "2,042, -0.45 % [-1.05, +0.16]"
    assert pages.cell(entry | {"mean": 0.0338812, "diff_pct": 0.0}) == "0.03388"
    assert pages.cell({"mean": None, "diff_pct": None, "ci95": None}) == "–"
    fewer = {"mean": 3.0, "diff_pct": -20.0, "ci95": [-30.0, -10.0]}
    assert pages.cell(fewer).endswith(" worse") and pages.cell(fewer, lower_is_better=True).endswith(" better")
    none = {"mean": 3.0, "diff_pct": 1.0, "ci95": None, "note": "too few seeds: 2, an interval needs 3"}
    assert pages.cell(none) == "3, +1.00 %, too few seeds"


def test_arms_by_hand(tmp_path, monkeypatch):
    (tmp_path / "one").mkdir()
    entry = {"mean": 10.0, "diff_pct": 5.0, "ci95": [1.0, 9.0]}
    table = {"ab_test": {"a": {"hate": entry | {"diff_pct": 0.0}, "like": entry}, "b": {"hate": entry, "like": entry}}}
    (tmp_path / "one" / "table.json").write_text(json.dumps(table))
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    assert pages.arms("one", {"b": "other", "a": "a"}, {"hate": "hates", "like": "likes"}).splitlines() == [
        "| arm | hates | likes |",
        "|---|---|---|",
        "| other | 10, +5.00 % [+1.00, +9.00] worse | 10, +5.00 % [+1.00, +9.00] better |",
        "| a | 10 | 10, +5.00 % [+1.00, +9.00] better |",
    ]


def test_a_changed_number_is_found(monkeypatch):
    monkeypatch.setitem(pages.TABLES, "fixed", lambda: "| a |\n|---|\n| 1 |")
    page = "before\n<!-- table: fixed -->\n| a |\n|---|\n| 2 |\n<!-- end of table -->\nafter\n"
    assert pages.render(page, "page") == page.replace("| 2 |", "| 1 |")


def test_check_changes_nothing_and_fails(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(pages.TABLES, "fixed", lambda: "| 1 |")
    page = tmp_path / "README.md"
    page.write_text("<!-- table: fixed -->\n| 2 |\n<!-- end of table -->\n")
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    monkeypatch.setattr(pages, "pages", lambda: [page])
    monkeypatch.setattr("sys.argv", ["pages", "--check"])
    with pytest.raises(SystemExit, match=r"stale tables in README\.md; run python -m experiments\.results\.pages"):
        pages.main()
    assert "| 2 |" in page.read_text()
    monkeypatch.setattr("sys.argv", ["pages"])
    pages.main()
    assert "| 1 |" in page.read_text() and capsys.readouterr().out == "1 pages written\n"


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("<!-- table: nothing -->\n<!-- end of table -->", "unknown table 'nothing'; choose among world"),
        ("<!-- table: world -->\n| a |\n", "a table has no <!-- end of table -->"),
    ],
)
def test_wrong_markers_are_refused(page, message):
    with pytest.raises(ValueError, match=message):
        pages.render(page, "page")


def test_plots_of_benchmarks_are_of_the_numbers_on_their_pages():
    docs = pages.ROOT / "docs"
    numbers = re.findall(r"[\d,.]*\d", (docs / "performance.md").read_text())
    for entry in pages.read("speed")["results"]:
        assert {f"{entry['value']:,}", f"{entry['limit']:,}"} <= set(numbers), entry
        assert entry["fraction_of_limit"] == round(entry["value"] / entry["limit"], 4)
    numbers = {float(x) for x in re.findall(r"[\d.]*\d", (docs / "scale.md").read_text())}
    assert {entry["value"] for entry in pages.read("scale")["results"]} <= numbers
