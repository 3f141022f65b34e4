"""Logs of any size: the same sessions whatever the chunks, buckets, processes and engine, after any stop."""

import dataclasses
import threading

import numpy as np
import own_logs
import polars as pl
import pytest

from mmrf_jax.data import frame_log, sessions
from mmrf_jax.data.frame_log import SessionLog
from mmrf_jax.data.readers.engine import tasks
from mmrf_jax.data.readers.frame import prepare
from mmrf_jax.data.readers.kuairand import synthetic
from mmrf_jax.data.splits import SPLITS
from mmrf_jax.io import copies, files
from mmrf_jax.io.progress import counted

SCHEMA = dataclasses.replace(own_logs.SCHEMA, split=("2024-05-04", "2024-05-05"))
ROWS = 250  # of a chunk and of a bucket: several of each


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """The tables as files; the log has faults in several chunks."""
    made, folder = own_logs.make_log(2_000), tmp_path_factory.mktemp("tables")
    rows = made["log"].to_dicts()
    rows[3]["user_id"] = rows[700]["item_id"] = rows[1_500]["watch_ms"] = None
    rows[40]["liked"] = rows[1_900]["liked"] = None
    rows += [dict(rows[20]), dict(rows[21], rank=9)]
    made["log"] = pl.DataFrame(rows, made["log"].schema)
    for name, table in made.items():
        table.write_parquet(folder / f"{name}.parquet", row_group_size=300)
    return {name: folder / f"{name}.parquet" for name in made} | {"candidates": None}


def run(given, folder, engine=None, rows=ROWS, schema=SCHEMA):
    """The finished log."""
    with tasks.worker_processes(1) as here:
        prepare.prepare_frame_log(given, schema, folder, engine or here, rows=rows)
    return SessionLog.open(folder)


@pytest.fixture(scope="module")
def whole(given, tmp_path_factory):
    """One chunk and one bucket: nothing is divided."""
    return run(given, tmp_path_factory.mktemp("whole") / "log", rows=10_000)


@pytest.fixture(scope="module")
def divided(given, tmp_path_factory):
    return run(given, tmp_path_factory.mktemp("divided") / "log")


def by_user(log, name):
    """The sessions of a part in the order of users; those of a user keep theirs."""
    part = log.part(name)
    return sessions.select_sessions(part, np.argsort(part.user_id, kind="stable"))


def assert_same(one, other):
    for name in SPLITS:
        a, b = by_user(one, name), by_user(other, name)
        for field in dataclasses.fields(a):
            np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name), f"{name}.{field.name}")
    assert one.item_ids.tolist() == other.item_ids.tolist() and one.user_ids.tolist() == other.user_ids.tolist()
    np.testing.assert_array_equal(one.items.features, other.items.features)
    np.testing.assert_array_equal(one.items.embedding_id, other.items.embedding_id)
    np.testing.assert_array_equal(one.profiles, other.profiles)
    assert one.spec == other.spec and one.encoders == other.encoders


def test_chunks_and_buckets_change_no_session(whole, divided):
    assert len(list((whole.folder / "train").glob("sessions-*"))) == 1
    assert len(list((divided.folder / "train").glob("sessions-*"))) == 8
    assert_same(whole, divided)
    one, other = dict(whole.report), dict(divided.report)
    assert one["left_out"] == {
        "no user": 1,
        "no item": 1,
        "no watch_time": 1,
        "repeated row": 1,
        "item repeated in a request": 1,
    }
    assert "2 empty cells of like are 0" in other["assumed"]
    for name in one["signals"]:  # sums in another order
        np.testing.assert_allclose(one["signals"][name].pop("mean"), other["signals"][name].pop("mean"), rtol=1e-12)
    assert one == other and whole.digest() != divided.digest()  # the order of users differs


@pytest.mark.parametrize(
    "changed",
    [
        {"request": None, "position": None, "propensity": None, "candidates": None, "split": (0.7, 0.1, 0.2)},
        {"request": None, "candidates": None, "split": 1, "slate_size": 3},
        {"position": None, "num_candidates": 20, "context": ("device", "load")},
    ],
)
def test_other_schemas_are_divided_alike(given, changed, tmp_path):
    schema = dataclasses.replace(SCHEMA, **changed)
    log = pl.read_parquet(given["log"]).with_columns(
        device=pl.col("req").str.slice(-1), load=pl.col("req").str.len_bytes()
    )
    if schema.candidates:
        log.write_parquet(tmp_path / "log.parquet")
    else:
        log.drop("candidates").write_csv(tmp_path / "log.csv")
    tables = given | {"log": str(tmp_path / "log.*")}
    one, other = (run(tables, tmp_path / str(rows), rows=rows, schema=schema) for rows in (10_000, ROWS))
    assert_same(one, other)


def test_integer_ids_and_a_table_of_candidates_are_divided_alike(given, tmp_path):
    log = pl.read_parquet(given["log"])
    number = (pl.col("user_id").str.slice(1).cast(pl.UInt64) + 2**63, pl.col("req").str.slice(1).cast(pl.Int64))
    lists = log.select("req", "candidates").unique("req", maintain_order=True).with_columns(number[1])
    tables = {"log": log.drop("candidates").with_columns(number), "items": given["items"], "users": None}
    tables |= {"candidates": lists}
    one, other = (run(tables, tmp_path / str(rows), rows=rows) for rows in (10_000, ROWS))
    assert_same(one, other)
    assert one.user_ids.dtype == np.uint64


@pytest.mark.slow
def test_several_processes_make_the_same_log(given, divided, tmp_path):
    with tasks.worker_processes(2) as engine:
        assert run(given, tmp_path / "two", engine).digest() == divided.digest()


class Stopped(Exception):
    pass


def test_a_stopped_job_goes_on_and_does_nothing_twice(given, divided, tmp_path):
    ran = []

    def engine(task, job, todo, done):
        for ended, i in enumerate(todo, 1):
            if len(ran) % 5 == 4:
                ran.append(None)
                raise Stopped
            task(job, i)
            done(ended)
            ran.append((task.__name__, i))

    while True:
        try:
            log = run(given, tmp_path / "stopped", engine)
            break
        except Stopped:
            assert not (tmp_path / "stopped").exists()
    done = [task for task in ran if task is not None]
    assert len(done) == len(set(done)) and {name for name, _ in done} == {
        *("sort_chunk", "order_bucket", "check_requests", "write_bucket")
    }
    assert log.digest() == divided.digest() and [path.name for path in tmp_path.iterdir()] == ["stopped"]


def test_one_process_at_a_time_has_the_work_folder_though_its_holder_deletes_it(tmp_path, monkeypatch):
    work, said, waits, goes = tmp_path / "work", [], threading.Event(), threading.Event()
    monkeypatch.setattr(tasks, "say", lambda line: (said.append(line), waits.set()))

    def wait():
        with tasks.held_alone(work):
            (work / "made").write_text("")
            goes.set()

    second = threading.Thread(target=wait)
    with tasks.held_alone(work):
        second.start()
        assert waits.wait(60)
        tasks.discard(work)
    second.join()
    assert goes.is_set() and (work / "made").exists()
    assert said == [f"another process prepares {tmp_path}; waiting for it"]


def test_tables_in_object_storage_have_the_same_key_in_every_process(tmp_path):
    """Else a killed preparation would not go on, and a finished one would not be found."""
    log = files.user_path(f"memory://bucket/{tmp_path.name}/log", "--log")
    (log / "0.csv").write_text("user\n1\n")
    (log / "1.csv").write_text("user\n2\n")
    tables = {"log": str(log), "items": [f"{log}/0.csv"], "users": None}
    key = frame_log.log_key(tables, SCHEMA)
    copies._known.clear()  # as in another process, which makes its own copies
    assert frame_log.log_key(tables, SCHEMA) == key
    (log / "1.csv").write_text("user\n3\n")
    assert frame_log.log_key(tables, SCHEMA) != key


def test_errors_name_rows_of_the_whole_log_and_leave_nothing(given, tmp_path):
    log = pl.read_parquet(given["log"])
    wrong = log.with_columns(liked=pl.when(pl.int_range(len(log)) == 1_777).then(7).otherwise("liked"))
    with pytest.raises(ValueError, match="signal 'like' has 7 in row 1777; write 0 or 1"):
        run(given | {"log": wrong}, tmp_path / "wrong")
    assert not list(tmp_path.iterdir())


def test_a_request_of_users_in_several_buckets_is_refused(given, tmp_path):
    log = pl.read_parquet(given["log"])
    bucket = prepare.bucket_of(log["user_id"].fill_null(log["user_id"][0]), 8)
    first, other = 0, int(np.flatnonzero(bucket != bucket[0])[0])
    request = pl.when(pl.int_range(len(log)) == other).then(pl.lit(log["req"][first])).otherwise("req")
    message = f"request '{log['req'][first]}' belongs to several users \\(rows 0 and {other}; 1 such requests\\)"
    for rows in (10_000, ROWS):
        with pytest.raises(ValueError, match=message):
            run(given | {"log": log.with_columns(req=request)}, tmp_path / str(rows), rows=rows)


def test_users_are_spread_over_buckets_by_a_hash_that_does_not_change():
    for ids in (pl.Series(range(10_000)), pl.Series([f"u{n}" for n in range(10_000)])):
        bucket = prepare.bucket_of(ids, 16)
        assert np.bincount(bucket, minlength=16).min() > 500
        np.testing.assert_array_equal(prepare.bucket_of(ids[::-1], 16), bucket[::-1])
    assert prepare.bucket_of(pl.Series(["a", "b", "c"]), 1_000).tolist() == [706, 430, 9]
    assert prepare.bucket_of(pl.Series([1, 2, 3]), 1_000).tolist() == [338, 858, 118]


@pytest.mark.slow
def test_beam_makes_the_same_log(given, divided, tmp_path):
    pytest.importorskip("apache_beam", reason="apache-beam is not installed: pip install 'mmrf_jax[beam]'")
    assert run(given, tmp_path / "beam", tasks.beam_pipelines()).digest() == divided.digest()


MEASURE = """
import pathlib, resource, sys
from mmrf_jax import schema
from mmrf_jax.data.readers.engine import tasks
from mmrf_jax.data.readers.frame import prepare
from mmrf_jax.data.readers.kuairand import synthetic
log, rows = pathlib.Path(sys.argv[1]), int(sys.argv[3])
given = {"log": log / "log", "items": log / "items", "users": log / "users", "candidates": None}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with tasks.worker_processes(1) as engine:
    prepare.prepare_frame_log(given, schema.load(log / "schema.py"), pathlib.Path(sys.argv[2]), engine, rows=rows)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_log(tmp_path, run_python):
    grown = []
    for rows in (500_000, 3_000_000):
        log = synthetic.SyntheticLog(rows=rows, users=3_000, videos=20_000)
        log.write(tmp_path / str(rows), counted, "tables")
        grown.append(int(run_python(MEASURE, tmp_path / str(rows), tmp_path / f"out{rows}", "100000")) / 1024)
    print(f"MiB: {grown}")
    assert grown[1] < 1.3 * grown[0] + 20 and grown[1] < 400
