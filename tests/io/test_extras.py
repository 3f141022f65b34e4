"""What is said where an extra is absent."""

import json
import sys

import pytest

from mmrf_jax.data import records
from mmrf_jax.io import extras, trackers
from mmrf_jax.io.metric_writer import MetricsWriter
from mmrf_jax.report import plots
from mmrf_jax.training import run_report


@pytest.fixture
def without(monkeypatch):
    """Makes packages as if they were not installed."""

    def block(*names: str) -> None:
        for name in names:
            monkeypatch.setitem(sys.modules, name, None)

    return block


def test_the_package_and_its_extra_are_named(without):
    without("polars")
    with pytest.raises(extras.MissingExtra) as missing, extras.needed("data"):
        import polars  # noqa: F401
    assert str(missing.value) == "polars is not installed; pip install 'mmrf_jax[data]'"
    assert isinstance(missing.value, ImportError) and missing.value.name == "polars"


@pytest.mark.parametrize(
    ("error", "library", "fix"),
    [
        (OSError("libgomp.so.1: cannot open shared object file: No such file or directory"), "libgomp.so.1", "apt-get"),
        (ImportError("libx.so.2: cannot open shared object file: No such file or directory"), "libx.so.2", "install"),
    ],
)
def test_a_missing_system_library_is_named(error, library, fix):
    said = rf"^this system has no {library}, .*\[baselines\] needs; {fix}"
    with pytest.raises(extras.MissingExtra, match=said), extras.needed("baselines"):
        raise error


def test_other_errors_pass():
    with pytest.raises(PermissionError), extras.needed("data"):
        raise PermissionError("x")
    with pytest.raises(ModuleNotFoundError, match=r"mmrf_jax\.nosuch"), extras.needed("data"):
        import mmrf_jax.nosuch  # noqa: F401
    with pytest.raises(ZeroDivisionError), extras.needed("data"):
        _ = 1 / 0


@pytest.mark.parametrize(
    ("package", "extra", "call"),
    [
        ("array_record.python", "data", records.array_records),
        ("matplotlib.figure", "report", plots.require),
    ],
)
def test_features_name_their_extra(package, extra, call, without):
    without(package)
    with pytest.raises(extras.MissingExtra, match=rf"{package} is not installed; pip install 'mmrf_jax\[{extra}\]'"):
        call()


def test_the_report_says_why_it_cannot_be(without):
    assert run_report.missing_for_report() is None
    without("bokeh")
    assert str(run_report.missing_for_report()) == "bokeh is not installed; pip install 'mmrf_jax[report]'"


def test_metrics_are_written_without_events(without, tmp_path, capsys):
    without("tensorboardX")
    trackers._say_once.cache_clear()
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, "train", {"loss": 0.5})
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == 0.5
    assert not (tmp_path / "tensorboard").exists()
    assert (
        "no TensorBoard events: tensorboardX is not installed; pip install 'mmrf_jax[report]'" in capsys.readouterr()[1]
    )
