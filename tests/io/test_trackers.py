"""Trackers get each row once, whatever was restarted; Weights & Biases and MLflow where they are installed."""

import csv
import json

import pytest

from mmrf_jax.io import trackers
from mmrf_jax.io.metric_writer import MetricsWriter


class Service:
    """A service in memory: {id: its rows}."""

    runs: dict = {}  # noqa: RUF012

    def open(self, workdir, config, identity):
        self.id = identity or f"run {len(self.runs)}"
        self.runs.setdefault(self.id, [])
        return self.id

    def log(self, step, values):
        self.runs[self.id].append((step, values))

    def summarise(self, values):
        self.runs[self.id].append(values)

    def close(self, status):
        self.runs[self.id].append(status)


@pytest.fixture
def service(monkeypatch):
    monkeypatch.setattr(Service, "runs", {})
    monkeypatch.setitem(trackers.SERVICES, "service", Service)
    return Service


def log(workdir, steps, start_step=None, track=("csv",), **kwargs):
    with MetricsWriter(workdir, start_step, track=track, clock=lambda: 0.0, **kwargs) as writer:
        for step in steps:
            writer.write(step, "train", {"loss": {"click": step / 2}})


def table(workdir):
    with (workdir / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_csv_has_a_column_per_metric_and_is_complete_after_each_row(tmp_path):
    with MetricsWriter(tmp_path, seed=7, track=["csv"], clock=lambda: 0.0) as writer:
        assert (tmp_path / "metrics.csv").read_text() == ""
        writer.write(5, "fit", {"loss": {"click": 0.5, "a, b": 2.0}})
        assert (tmp_path / "metrics.csv").read_text() == (
            'step,seed,phase,seconds,loss/click,"loss/a, b"\n5,7,fit,0.0,0.5,2.0\n'
        )
        writer.write(6, "train", {"norm": 3})
        writer.write(7, "train", {"norm": 4})
        assert (tmp_path / "metrics.csv").read_text() == (
            'step,seed,phase,seconds,loss/click,"loss/a, b",norm\n'
            "5,7,fit,0.0,0.5,2.0,\n6,7,train,0.0,,,3\n7,7,train,0.0,,,4\n"
        )


def test_csv_of_a_resumed_run_has_each_row_once(tmp_path):
    log(tmp_path, range(0, 60, 10))
    whole = (tmp_path / "metrics.csv").read_text()
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("60,0,tra")  # a torn last line
    log(tmp_path, (40, 50), start_step=30)
    assert (tmp_path / "metrics.csv").read_text() == whole
    assert [row["step"] for row in table(tmp_path)] == ["0", "10", "20", "30", "40", "50"]
    log(tmp_path, (0,))  # afresh
    assert [row["step"] for row in table(tmp_path)] == ["0"]


def test_a_service_continues_its_run_and_gets_each_row_once(tmp_path, service):
    log(tmp_path, (10, 20, 30, 40), track=["service"])
    log(tmp_path, (30,), start_step=20, track=["service"])  # killed before it reached 40 again
    log(tmp_path, (40, 50), start_step=30, track=["service"])
    (rows,) = service.runs.values()
    assert [row[0] for row in rows if isinstance(row, tuple)] == [10, 20, 30, 40, 50]
    assert rows[0] == (10, {"train/loss/click": 5.0}) and rows.count("FINISHED") == 3
    assert json.loads((tmp_path / "trackers.json").read_text())["service"]["id"] == "run 0"
    log(tmp_path, (10,), track=["service"])  # afresh: another run
    assert list(service.runs) == ["run 0", "run 1"]


def test_a_service_that_a_resumed_run_names_first_gets_the_rows_before(tmp_path, service):
    log(tmp_path, (10, 20, 30), track=())
    log(tmp_path, (30,), start_step=20, track=["service"])
    assert [row[0] for row in service.runs["run 0"][:-1]] == [10, 20, 30]


def test_the_end_is_in_words(tmp_path, service):
    with pytest.raises(FloatingPointError), MetricsWriter(tmp_path, track=["service"]) as writer:
        writer.write(1, "train", {"loss": float("nan")})
    with pytest.raises(KeyboardInterrupt), MetricsWriter(tmp_path, 0, track=["service"]) as writer:
        writer.summarise({"gauc": 0.5})
        raise KeyboardInterrupt
    assert service.runs["run 0"] == ["FAILED", {"gauc": 0.5}, "KILLED"]  # what is not finite reaches no tracker


def test_a_service_that_fails_does_not_end_the_run(tmp_path, service, monkeypatch, capsys):
    def down(*_):
        raise ConnectionError("no route")

    monkeypatch.setattr(Service, "log", down)
    log(tmp_path, (10, 20), track=["service", "csv"])
    assert [row["step"] for row in table(tmp_path)] == ["10", "20"] and service.runs == {"run 0": []}
    said = capsys.readouterr().err
    assert said == "service gets no more metrics (ConnectionError: no route); metrics.jsonl has them all\n"


def test_a_service_that_cannot_be_opened_is_one_line(tmp_path, service, monkeypatch):
    def refuse(*_):
        raise RuntimeError("no API key\nfor this host")

    monkeypatch.setattr(Service, "open", refuse)
    with pytest.raises(ValueError, match=r"config.trackers: service cannot be opened \(RuntimeError: no API key for"):
        log(tmp_path, (10,), track=["service"])


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    trackers.check_trackers(["tensorboard", "csv"])
    with pytest.raises(ValueError, match=r"config.trackers has 'mlflow', .* pip install 'mmrf_jax\[mlflow\]'"):
        trackers.check_trackers(["csv", "mlflow"])


@pytest.mark.parametrize("store", ["sqlite:///{}/mlflow.db", "file://{}/mlruns"])
def test_mlflow_in_a_local_store(store, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.format(tmp_path))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run, config = tmp_path / "run", {"seed": 3, "train": {"batch": 32}}
    log(run, (10, 20, 30), track=["mlflow"], config=config)
    log(run, (20, 30, 40), start_step=10, track=["mlflow"], config=config)
    with MetricsWriter(run, 40, track=["mlflow"], config=config) as writer:
        writer.summarise({"offline/click/gauc": 0.625})
    client = mlflow.MlflowClient()
    (experiment,) = [one for one in client.search_experiments() if one.name == "mmrf_jax"]
    (found,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(found.info.run_id, "train/loss/click")
    assert [(point.step, point.value) for point in history] == [(10, 5.0), (20, 10.0), (30, 15.0), (40, 20.0)]
    assert found.data.params == {"seed": "3", "train.batch": "32"} and found.info.status == "FINISHED"
    assert found.data.metrics["offline/click/gauc"] == 0.625 and found.info.run_name == "run"


def records(path):
    """The records of W&B's file: a header of 7 bytes, then LevelDB's log format in blocks of 32 KiB."""
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32_768 - at % 32_768 < 7:  # no room for a header: zeros until the next block
            at += 32_768 - at % 32_768
            continue
        size, part = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if part in (1, 4):  # in one piece, or its last one
            yield whole
            whole = b""


def test_weights_and_biases_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    for name, value in (("WANDB_MODE", "offline"), ("WANDB_SILENT", "true")):
        monkeypatch.setenv(name, value)
    log(tmp_path / "run", (10, 20, 30), track=["wandb"], config={"seed": 3})
    log(tmp_path / "run", (20, 30, 40), start_step=10, track=["wandb"], config={"seed": 3})
    wandb.teardown()  # its process has then written its files
    identity = json.loads((tmp_path / "run" / "trackers.json").read_text())["wandb"]["id"]
    rows, ids = [], set()
    for path in sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")):
        for record in map(wandb_internal_pb2.Record.FromString, records(path)):
            if record.HasField("run"):
                ids.add((record.run.run_id, record.run.display_name, record.run.project))
            if record.HasField("history"):
                items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                rows.append((int(items["_step"]), float(items["train/loss/click"])))
    assert sorted(rows) == [(10, 5.0), (20, 10.0), (30, 15.0), (40, 20.0)]
    assert ids == {(identity, "run", "mmrf_jax")}
