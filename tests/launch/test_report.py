"""`launch.report`, and the page of a finished run as a browser shows it: drawn, without an error, on a phone too."""

import csv
import html
import json
import shutil

import pytest
from processes import HANG, error_line, results
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select, WebDriverWait

from mmrf_jax.training import provenance, run_folder, run_report, train

#: What of the page's charts is drawn: every root's size, and whether its canvases hold anything but nothing.
DRAWN = """
const canvases = (node) => [
  ...(node.shadowRoot ? canvases(node.shadowRoot) : []),
  ...[...node.children].flatMap((child) => [...(child.tagName === "CANVAS" ? [child] : []), ...canvases(child)]),
];
const inked = (canvas) => canvas.width > 0 && canvas.height > 0
  && canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.some((x) => x > 0);
return [...document.querySelectorAll("[data-root-id]")].map((root) => {
  const found = canvases(root);
  const box = found.length ? found[0].getBoundingClientRect() : {width: 0, height: 0};
  return {width: box.width, height: box.height, inked: found.some(inked)};
});
"""


def show(browser, path, width: int, height: int = 800) -> None:
    """Opens a file in a window of that size, a phone's below 500 pixels."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get_log("browser")  # what was said before
    browser.get(path.as_uri())
    browser.execute_script("document.querySelectorAll('details').forEach((more) => { more.open = true; })")


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 390])
def test_the_page_draws_everything_without_an_error(finished, browser, width):
    show(browser, finished / "report.html", width)
    places = len(browser.find_elements(By.CSS_SELECTOR, "[data-root-id]"))
    assert places > 30

    def ready(_):
        return all(chart["inked"] for chart in browser.execute_script(DRAWN))

    WebDriverWait(browser, HANG).until(ready)
    charts = browser.execute_script(DRAWN)
    assert len(charts) == places and all(c["width"] > 100 and c["height"] > 60 for c in charts)
    assert all(c["width"] <= width for c in charts)
    said = [line for line in browser.get_log("browser") if line["source"] != "rendering"]  # that is of reading canvases
    assert said and not [line for line in said if line["level"] in ("SEVERE", "WARNING")], said
    # The page does not scroll sideways; its wide tables do, in boxes of their own.
    wide = "const page = document.documentElement; return page.scrollWidth - page.clientWidth"
    assert browser.execute_script(wide) == 0 and browser.execute_script("return document.body.scrollWidth") <= width
    boxes = "return [...document.querySelectorAll('.scroll')].some((box) => box.scrollWidth > box.clientWidth)"
    assert browser.execute_script(boxes) or width > 500


@pytest.mark.slow
def test_the_session_explorer_responds(finished, browser):
    show(browser, finished / "report.html", 390)

    def text():
        return browser.find_element(By.ID, "session").text

    def rows():
        return [row.text for row in browser.find_elements(By.CSS_SELECTOR, "#candidates tbody tr")]

    users = Select(browser.find_element(By.ID, "user"))
    assert len(users.options) == 12
    first, listed = text(), rows()
    assert first.startswith("User 0:") and "6 videos shown" in first
    shown = browser.find_elements(By.CSS_SELECTOR, "#candidates tr.shown")
    assert len(shown) == 6 and len(listed) > 9 and all(" s of " in row.text for row in shown)
    # What is shown are the best of the main agent, whose scores stand last.
    assert [row.text.split()[-1] for row in shown] == ["1", "2", "3", "4", "5", "6"]
    longest = max(range(12), key=lambda i: int(users.options[i].text.split(": ")[1].split()[0]))
    users.select_by_index(longest)
    assert text().startswith(f"User {longest}:") and (longest == 0 or (text() != first and rows() != listed))
    buttons = browser.find_elements(By.CSS_SELECTOR, "#requests button")
    assert 1 < len(buttons) <= 8 and buttons[0].get_attribute("aria-pressed") == "true"
    before = rows()
    buttons[1].click()
    assert "Request 2:" in text() and rows() != before and buttons[1].get_attribute("aria-pressed") == "true"
    assert buttons[0].get_attribute("aria-pressed") == "false"


@pytest.mark.slow
def test_what_a_run_leaves_for_other_programs_and_for_comparisons(finished, launch, tmp_path):
    with (finished / "metrics.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    logged = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [{name: x for name, x in row.items() if x} for row in table] == [
        {name: str(x) for name, x in row.items() if str(x)} for row in logged
    ]
    (start,) = provenance.read_starts(finished)
    assert start["command"].startswith("python -m launch.train --config=") and start["command"] in (
        html.unescape((finished / "report.html").read_text())
    )
    users, arm = run_folder.read_user_sums(finished), results(finished)["ab_test"]["mmrf"]
    assert users["watch_time"].mean() == pytest.approx(arm["watch_time"]["mean"])
    assert users["like"].sum() / users["depth"].sum() == pytest.approx(arm["like"]["mean"])
    # Compared with itself, user by user, a run is exactly as good.
    other = shutil.copytree(finished, tmp_path / "other")
    done = launch.ok("compare", finished, other, f"--out={tmp_path / 'compare.html'}")
    assert done.stdout.strip() == str(tmp_path / "compare.html")
    page = (tmp_path / "compare.html").read_text()
    assert "user by user" in page and "<small>+0.00 %</small><small>[+0.00, +0.00]</small>" in page
    error_line(launch("compare", finished, f"--out={tmp_path / 'no.html'}"), "1 runs to compare; name 2 to 20")
    error_line(launch("compare", finished, tmp_path / "none"), "none is not a run folder")
    assert not (tmp_path / "no.html").exists()


@pytest.mark.slow
def test_report_of_a_run_by_itself(finished, launch, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    there = (run / "report.html").read_text()
    for name in ("ab-test", "offline", "model-quality", "curves", "attention", "conflict", "explorer", "settings"):
        assert f'<section id="{name}">' in there
    watched = results(run)["ab_test"]["mmrf"]["watch_time"]["diff_pct"]
    assert f"{watched:+.2f} %".replace("-", "−") in there
    (run / "report.html").unlink()
    before = (run / "results.json").read_bytes()
    done = launch.ok("report", f"--workdir={run}")
    assert done.stdout.strip() == str(run / "report.html")

    def data(text):
        return text.split('id="explorer-data">')[1].split("</script>")[0]

    assert data((run / "report.html").read_text()) == data(there)
    assert (run / "results.json").read_bytes() == before
    error_line(launch("report", f"--workdir={tmp_path}"), "is not a run folder", "config.json")


def test_a_report_that_fails_loses_no_results(monkeypatch, capsys, tmp_path):
    def broken(*_, **__):
        raise RuntimeError("no room left")

    monkeypatch.setattr(run_report, "write_report", broken)
    train._report(None, tmp_path)
    reported = capsys.readouterr().err
    assert "no report: RuntimeError: no room left" in reported and f"mmrf report --workdir={tmp_path}" in reported
