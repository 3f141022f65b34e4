import json

import jax.numpy as jnp
import numpy as np
import pytest

from mmrf_jax.io.metric_writer import MetricsWriter, flatten


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        self.now += 1.0
        return self.now


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def log(workdir, steps, start_step=None, **kwargs):
    with MetricsWriter(workdir, start_step, track=(), clock=Clock(), **kwargs) as writer:
        for step in steps:
            writer.write(step, "train", {"loss": step / 2})


def test_one_flat_row_a_step(tmp_path):
    with MetricsWriter(tmp_path, seed=7) as writer:
        writer.write(5, "train", {"loss": {"click": jnp.float32(0.5), "like": np.float64(2)}, "count": np.int32(3)})
        assert len(rows(tmp_path)) == 1  # there before the file is closed
    (row,) = rows(tmp_path)
    assert row.pop("seconds") >= 0
    assert row == {"step": 5, "seed": 7, "phase": "train", "loss/click": 0.5, "loss/like": 2.0, "count": 3}
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


def test_tensorboard_events_hold_the_values(tmp_path):
    from tensorboardX.proto import event_pb2

    with MetricsWriter(tmp_path) as writer:
        writer.write(5, "train", {"loss": {"click": 0.5}})
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, found = path.read_bytes(), {}
    while data:  # TFRecord framing: length, its checksum, the event, its checksum
        size = int.from_bytes(data[:8], "little")
        event = event_pb2.Event.FromString(data[12 : 12 + size])
        found |= {value.tag: (event.step, value.simple_value) for value in event.summary.value}
        data = data[16 + size :]
    assert found == {"train/loss/click": (5, 0.5)}


def test_restart_cuts_back_to_the_restored_step_and_goes_on(tmp_path):
    log(tmp_path, range(0, 60, 10))
    whole = (tmp_path / "metrics.jsonl").read_text()
    log(tmp_path, (40, 50), start_step=30)
    assert [row["step"] for row in rows(tmp_path)] == [0, 10, 20, 30, 40, 50]
    assert (tmp_path / "metrics.jsonl").read_text() == whole  # wall time too: the clock goes on from the last row kept


def test_fresh_start_drops_all_rows_and_step_zero_keeps_its_own(tmp_path):
    log(tmp_path, (0, 10))
    log(tmp_path, (), start_step=0)
    assert [row["step"] for row in rows(tmp_path)] == [0]
    log(tmp_path, (0,))
    assert [row["step"] for row in rows(tmp_path)] == [0]


@pytest.mark.parametrize("torn", ['{"step": 20, "los', '{"step": 20, "los\n', "\n"])
def test_torn_last_line_is_dropped(tmp_path, torn):
    log(tmp_path, (10,))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    log(tmp_path, (20,), start_step=20)
    assert [row["step"] for row in rows(tmp_path)] == [10, 20]


def test_a_broken_line_in_the_middle_is_an_error(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 is no row of metrics: 'nonsense'"):
        MetricsWriter(tmp_path, 5)


def test_not_finite_names_metrics_and_step(tmp_path):
    with MetricsWriter(tmp_path, track=()) as writer:
        with pytest.raises(FloatingPointError, match=r"step 12 \(fit\): loss/like = nan, norm = inf"):
            writer.write(12, "fit", {"loss": {"click": 1.0, "like": jnp.nan}, "norm": np.inf})
        assert rows(tmp_path) == []


def test_refuses_arrays_and_names_of_columns(tmp_path):
    with pytest.raises(ValueError, match=r"metric a/b has shape \(2,\)"):
        flatten({"a": {"b": np.zeros(2)}})
    with (
        MetricsWriter(tmp_path, track=()) as writer,
        pytest.raises(ValueError, match=r"\['phase', 'step'\] have the names of columns"),
    ):
        writer.write(1, "train", {"step": 1, "phase": 2})
