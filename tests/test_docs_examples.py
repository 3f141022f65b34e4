"""The notebook and the pretrained artefact of examples/."""

import datetime
import json
from pathlib import Path

import pytest

import mmrf_jax as mmrf
from mmrf_jax.serving import artifact

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PRETRAINED = EXAMPLES / "pretrained" / "world"


@pytest.fixture(scope="module")
def valid():
    """Skip once the artefact has expired: JAX reads what it has exported for about six months."""
    expires = datetime.datetime.fromisoformat(artifact.read_manifest(PRETRAINED)["expires"])
    if datetime.datetime.now(datetime.UTC) > expires:
        pytest.skip(f"{PRETRAINED} expired on {expires:%Y-%m-%d}; run make pretrained")


def test_the_artefact_is_whole_and_small(valid):
    loaded = artifact.load(PRETRAINED)
    assert {"encode", "observe", "score"} <= set(loaded.functions) and loaded.manifest["method"] == "mmrf"
    for name in loaded.functions:  # no path of the machine that exported it
        assert b"site-packages" not in (PRETRAINED / "functions" / f"{name}.bin").read_bytes()
    assert sum(path.stat().st_size for path in PRETRAINED.rglob("*") if path.is_file()) <= 5_000_000


@pytest.mark.slow
def test_the_artefact_ranks_and_listens(valid):
    run, candidates = mmrf.load(PRETRAINED), [3, 500, 20, 999, 77]
    before = run.rank(candidates=candidates)
    liked = [(video, {"click": 1, "long_view": 1, "like": 1, "watch_time": 40.0}) for video in (77, 20)]
    after = run.rank(candidates=candidates, history=liked)
    assert sorted(before) == sorted(after) == sorted(candidates) and before != after
    assert run.results["ab_test"]["mmrf"]["watch_time"]["ci95"][0] > 0.0


def test_the_notebook_has_no_outputs():
    cells = json.loads((EXAMPLES / "quickstart.ipynb").read_text())["cells"]
    assert cells and not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


@pytest.mark.slow
def test_the_notebook_runs(valid, monkeypatch):
    import nbclient
    import nbformat

    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    place = {"metadata": {"path": str(EXAMPLES)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=place).execute()
    printed = "".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", ()))
    for start in ("candidates (64, 40)", "watch_time ", "GAUC 0.", "snips 0.", "with history "):
        assert start in printed
