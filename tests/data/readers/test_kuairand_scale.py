"""Logs of any size: the same records whatever the chunks, processes and engine, after any stop, in bounded memory."""

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import threading
import time

import numpy as np
import polars as pl
import pytest
from processes import HANG

from mmrf_jax.data import named_features, records
from mmrf_jax.data.readers.engine import candidates, grouping, tasks
from mmrf_jax.data.readers.kuairand import builder, clean, csv_files, features, prepare, release, synthetic
from mmrf_jax.io.progress import counted

CONFIG = builder.KuaiRandConfig(candidates=20, slate=3, history=8)
LOG = synthetic.SyntheticLog(rows=20_000, users=300, videos=900)
SMALL = {"chunk_bytes": 150_000, "bucket_rows": 2_500}  # ten chunks, eight buckets, and two parts of videos


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A synthetic log of 27K in parts, with some lines that cannot be read and users that come in any order."""
    folder = tmp_path_factory.mktemp("synthetic") / "log"
    LOG.write(folder, counted)
    path = folder / "data" / "log_standard_4_22_to_5_08_27k_part1.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], *sorted(lines[1:], key=hash_of), "7,1,2", "?" + lines[5], lines[7] + ",1"]))
    return release.find_release(folder)


def hash_of(line):
    return hashlib.sha256(line.encode()).hexdigest()


def run(source, work, engine=None, **sizes):
    """What the finished log says of itself, and the job."""
    work.mkdir(exist_ok=True)
    job = prepare.KuaiRandJob(source, CONFIG, work, **sizes)
    if engine is None:
        with tasks.worker_processes(1) as engine:
            made = prepare.run_stages(job, engine, counted)
    else:
        made = prepare.run_stages(job, engine, counted)
    return json.loads((made / prepare.ABOUT).read_text()), job


def kept(job):
    """Digests of all that is kept, by path."""
    paths = sorted(path for path in job.records.rglob("*") if path.is_file())
    return {str(p.relative_to(job.records)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def sessions(job):
    """The spec, and each part's sessions as one block."""
    log = builder.KuaiRand.open(job.records)
    return log.spec, {name: records.pack_sessions(log.part(name), log.spec) for name in log.parts}


def shards(job):
    return sorted((job.records / "train").glob("sessions-*"))


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """One chunk and one bucket: nothing is divided."""
    return run(source, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def divided(source, tmp_path_factory):
    return run(source, tmp_path_factory.mktemp("divided"), **SMALL)


def test_chunks_and_buckets_change_no_session(whole, divided):
    (made, job), (parts, other) = whole, divided
    assert len(shards(job)) == 1 and len(shards(other)) == 8
    assert len(list((other.work / "merge").glob("*.arrow"))) > 1
    assert parts == made
    assert made["report"]["log"]["standard"]["unparsable"] == 3 and made["report"]["log"]["standard"]["duplicates"] > 40
    assert sessions(other) == sessions(job)
    one, several = kept(job), kept(other)
    for path in one:
        assert path.endswith(("of-00001.array_record", "manifest.json")) or several[path] == one[path], path


@pytest.mark.slow
def test_several_processes_make_the_same_files(source, divided, tmp_path):
    with tasks.worker_processes(2) as engine:
        made, job = run(source, tmp_path / "two", engine, **SMALL)
    assert kept(job) == kept(divided[1]) and made == divided[0]


class Stopped(Exception):
    pass


def test_a_stopped_job_goes_on_and_does_nothing_twice(source, divided, tmp_path):
    """Stopped after each task anew."""
    ran = []

    def engine(task, job, todo, done):
        for ended, i in enumerate(todo, 1):
            if ran and ran[-1] is Stopped:
                ran[-1] = None
            elif ran:
                ran.append(Stopped)
                raise Stopped
            task(job, i)
            done(ended)
            ran.append((task.__name__, i))

    while True:
        try:
            made, job = run(source, tmp_path / "stopped", engine, **SMALL)
            break
        except Stopped:
            pass
    tasks = [task for task in ran if task is not None]
    assert len(tasks) == len(set(tasks)) > 15
    assert kept(job) == kept(divided[1]) and made == divided[0]


@pytest.mark.slow
def test_an_error_in_a_process_is_the_callers_and_a_lost_process_is_named(source, tmp_path):
    with tasks.worker_processes(2) as engine:
        job = prepare.KuaiRandJob(source, CONFIG, tmp_path)
        with pytest.raises(FileNotFoundError, match="featured_id"):
            engine(prepare.clean_bucket, job, [0, 1], lambda done: None)
        with pytest.raises(ChildProcessError, match="task 9 of kill ended with -9; if memory was short, use fewer"):
            engine(os.kill, Pid(), [9, 9], lambda done: None)


class Pid:
    """Stands for a job: `os.kill(job, 9)` in a process that takes it for its own number."""

    def __reduce__(self):
        return os.getpid, ()


def test_sources_that_change_while_unfinished_are_prepared_anew(source, tmp_path):
    folder = tmp_path / "log"
    synthetic.SyntheticLog(rows=20_000, users=300, videos=900, seed=1).write(folder, counted)

    def stop(task, job, todo, done):
        raise Stopped

    for rows in (1, 2):
        with pytest.raises(Stopped):
            builder.prepare_log(folder, tmp_path / "out", CONFIG, stop)
        assert len(list(tmp_path.glob(".out.unfinished-*"))) == rows
        users = folder / "data" / "user_features_27k.csv"
        users.write_text("".join(users.read_text().splitlines(keepends=True)[:-1]))
    builder.prepare_log(folder, tmp_path / "out", CONFIG)
    assert len(list(tmp_path.glob(".out.unfinished-*"))) == 2  # of the files as they were


def test_a_split_is_read_by_block(source, tmp_path):
    log = builder.prepare_log(source.logs[0].parent, tmp_path / "log", CONFIG)
    train, items, spec, part = log.part("train"), log.items, log.spec, log.parts["train"]
    step, number = records.SESSIONS_PER_RECORD, len(part.sessions)
    assert number == -(-train.num_sessions // step) > 1
    assert part.total == (train.num_sessions, train.num_requests) and part.sessions.sum() == train.num_sessions
    last = part.read([number - 1, 0])
    np.testing.assert_array_equal(
        last.user_id, np.concatenate([train.user_id[(number - 1) * step :], train.user_id[:step]])
    )
    shares = [part.read(range(process, number, 3)) for process in range(3)]
    assert sum(share.num_sessions for share in shares) == train.num_sessions
    for share in shares:
        share.validate(spec)
    with pytest.raises(IndexError, match=f"block {number} is not among the {number} of "):
        part.read([0, number])
    assert len(items.duration) == spec.num_videos and not items.duration.flags.writeable
    listed = csv_files.read_videos(csv_files.whole(source.videos[0]))[0]
    ids, row = log.vocabularies, {v: i for i, v in enumerate(log.item_ids.tolist())}
    for video, author, tag in listed.select("video_id", "author_id", "tag").head(50).rows():
        for name, value in (("author", author), ("tag", tag)):
            number = int(getattr(items, name)[row[video]])
            assert named_features.row_of(ids[name], value) == number
            assert number == 0 or ids[name][number - 1] == value
    with pytest.raises(FileNotFoundError, match="holds no prepared KuaiRand"):
        builder.KuaiRand.open(tmp_path / "nowhere")


def test_processes_that_prepare_at_once_wait_for_each_other(source, tmp_path, monkeypatch):
    begun, waits, entered, said = threading.Event(), threading.Event(), [], []

    def say(message):
        said.append(message)
        waits.set()

    def engine(task, job, todo, done):
        entered.append(task)
        begun.set()
        assert waits.wait(HANG)
        for ended, i in enumerate(todo, 1):
            task(job, i)
            done(ended)

    def build():
        builder.prepare_log(source.logs[0].parent, tmp_path / "log", CONFIG, engine)

    monkeypatch.setattr(tasks, "say", say)
    first = threading.Thread(target=build)
    first.start()
    begun.wait()
    build()
    first.join()
    assert len(entered) == 7  # stages, once each
    waiting = [line for line in said if "another process" in line]
    assert waiting == [f"another process prepares {tmp_path}; waiting for it"]
    assert builder.KuaiRand.open(tmp_path / "log").part("train").num_sessions > 0
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_cuts_keep_keys_together_and_parts_alike(tmp_path):
    rng = np.random.default_rng(0)
    frames = [pl.DataFrame({"key": rng.zipf(1.3, 5_000) % 400, "row": np.arange(5_000) + 5_000 * i}) for i in range(6)]
    frames.append(frames[0].clear())
    runs = [tmp_path / f"{i}.arrow" for i in range(len(frames))]
    for frame, path in zip(frames, runs, strict=True):
        tasks.write_run(frame.sort("key", maintain_order=True), path)
    cuts = tasks.cut_runs(runs, "key", 4_000)
    parts = [tasks.read_part(runs, cuts, i) for i in range(cuts.shape[1] - 1)]
    assert pl.concat(parts)["row"].sort().to_list() == list(range(30_000))
    keys = [set(part["key"]) for part in parts]
    assert all(max(a) < min(b) for a, b in itertools.pairwise(keys))
    heaviest = pl.concat(frames)["key"].value_counts()["count"].max()
    assert 4 <= len(parts) <= 12 and max(len(part) for part in parts) <= 4_500 + heaviest
    first = parts[0]["row"].to_numpy()
    assert (np.diff(first // 5_000) >= 0).all()  # run after run


@pytest.mark.parametrize("end", ["", "\n"])
def test_chunks_hold_every_line_once(tmp_path, end):
    path = tmp_path / "log.csv"
    every = [b"h,e,a,d\n"] + [b"x" * (i * 7 % 23) + b"\n" for i in range(60)] + [b"last" + end.encode()]
    path.write_bytes(b"".join(every))
    for size in (1, 2, 10, 33, 100, 10_000):
        pieces = [chunk.read() for chunk in csv_files.chunks(path, size)]
        assert b"".join(pieces) == b"".join(every[1:])
        assert all(piece.endswith(b"\n") for piece in [piece for piece in pieces if piece][:-1])


def test_a_file_with_a_header_alone_is_an_empty_one(source, whole, tmp_path):
    for path in source.files:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    first = tmp_path / "log_standard_4_08_to_4_21_27k.csv"
    first.write_text(source.logs[0].read_text().splitlines()[0])
    made, job = run(release.find_release(tmp_path), tmp_path / "work")
    assert made["report"]["files"][0] == first.name
    assert sessions(job) == sessions(whole[1])


def test_candidates_equal_a_slow_reference():
    rng = np.random.default_rng(0)
    live_from = np.where(np.arange(200) % 50 == 0, 99999999, 20220501 + np.arange(200) // 100).astype(np.int32)
    pool = candidates.make_pool(live_from, 99999999)
    r, c, k = 400, 40, 4
    dates, key = rng.choice([20220501, 20220502], r), candidates.request_keys(5, np.arange(r), np.arange(r) * 3)
    exposed = np.stack([rng.permutation(199)[:k] + 1 for _ in range(r)]).astype(np.int32)
    exposed[np.arange(k) >= rng.integers(1, k + 1, r)[:, None]] = -1
    drawn, slate = pool.sample(key, dates, exposed, c)
    for i in range(r):
        videos = [v for day in (20220501, 20220502) for v in np.flatnonzero(live_from == day) if day <= dates[i]]
        found = [v for v in exposed[i] if v >= 0]
        n = 0
        while len(found) < c:
            n += 1
            video = videos[(splitmix(int(key[i]), n) >> 32) * len(videos) >> 32]
            found += [video] * (video not in found)
        place = list(range(c))
        for j in range(k):
            other = j + ((splitmix(mixed(int(key[i]) ^ 0x9E3779B97F4A7C15), j + 1) >> 32) * (c - j) >> 32)
            place[j], place[other] = place[other], place[j]
        assert [drawn[i, p] for p in place] == found
        assert slate[i].tolist() == [place[j] if exposed[i, j] >= 0 else -1 for j in range(k)]


def splitmix(key, n):
    return mixed((key + n * 0x9E3779B97F4A7C15) % 2**64)


def mixed(x):
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def test_packed_keys_give_the_order_that_sorting_gives():
    random = np.random.default_rng(4)
    user, time = random.integers(-7, 8, 500, np.int32), random.integers(0, 9, 500) * 2**40
    np.testing.assert_array_equal(grouping.order_of(user, time), np.lexsort((time, user)))
    np.testing.assert_array_equal(grouping.order_of(user), np.argsort(user, kind="stable"))
    assert len(grouping.order_of(user[:0], time[:0])) == 0
    np.testing.assert_array_equal(grouping.order_of(user, time << 18), np.lexsort((time << 18, user)))
    np.testing.assert_array_equal(grouping.order_of(user > 0, user), np.argsort(user, kind="stable"))


@pytest.mark.parametrize("latest", [9, 2**62])
def test_rows_are_in_one_order_whatever_they_agree_on(latest):
    random = np.random.default_rng(5)

    def few(high, dtype):
        return pl.Series(random.integers(-1, high, 800)).replace(-1, None).cast(dtype)

    types = (
        csv_files.LOG_TYPES
        | csv_files.EXTRA_LOG_TYPES
        | dict.fromkeys(["lost_digits", "random", "readable"], pl.Boolean)
    )
    rows = pl.DataFrame({name: few(1 if dtype == pl.Boolean else 2, dtype) for name, dtype in types.items()})
    time = few(5, pl.Int64).replace(4, latest)
    rows = rows.with_columns(pl.col("user_id").fill_null(clean.NO_USER), time.alias("time_ms"))
    assert clean._sorted(rows).equals(rows.sort(clean._ORDER))


def test_weighted_statistics_are_those_of_repeated_values():
    rng = np.random.default_rng(0)
    values, weight = rng.normal(size=300).round(1), rng.integers(0, 9, 300)
    repeated = np.repeat(values, weight)
    at = np.arange(1, 8) / 8
    np.testing.assert_allclose(features.quantiles(values, weight, at), np.quantile(repeated, at), atol=1e-12)
    np.testing.assert_allclose(features.mean_std(values, weight), [repeated.mean(), repeated.std()], rtol=1e-12)
    assert features.mean_std(values, 0 * weight).tolist() == [0, 1]
    assert features.mean_std(np.ones(5), np.ones(5, int)).tolist() == [1, 1]


@pytest.mark.parametrize("variant", synthetic.OFFICIAL)
def test_synthetic_logs_look_like_the_release(tmp_path, variant):
    log = synthetic.SyntheticLog(rows=60_000, users=400, videos=3_000, variant=variant)
    log.write(tmp_path / "a", counted)
    dataclasses.replace(log, seed=1).write(tmp_path / "b", counted)
    log.write(tmp_path / "again", counted)

    def read(name):
        return {p.name: p.read_bytes() for p in (tmp_path / name / "data").iterdir()}

    assert read("a") == read("again") and read("a") != read("b")
    found = release.find_release(tmp_path / "a")
    csv_files.check_headers(found)
    parts = [path.name for path in found.logs if "part" in path.name]
    assert found.variant == variant and len(parts) == (4 if variant == "27k" else 0)
    rows = pl.concat([csv_files.read_log_lines(csv_files.whole(path)) for path in found.logs])
    standard, random = rows.filter(pl.col("is_rand") == 0), rows.filter(pl.col("is_rand") == 1)
    assert len(standard) == 60_000 and len(random) == max(600, round(60_000 * synthetic.OFFICIAL[variant][2]))
    assert not sum(rows.null_count().row(0)) and rows["date"].n_unique() == 31
    assert 0.003 < 1 - len(standard.unique()) / len(standard) < 0.006
    play, duration = standard["play_time_ms"], standard["duration_ms"]
    known = duration > 0
    click = (((duration <= 7_000) & (play >= duration)) | ((duration > 7_000) & (play > 7_000))).filter(known)
    assert click.eq(standard["is_click"].filter(known) == 1).all()
    assert ((play >= duration.clip(None, 18_000)) == (standard["long_view"] == 1)).filter(known).all()
    assert 0.35 < standard["is_click"].mean() < 0.5 and 0.012 < standard["is_like"].mean() < 0.022
    np.testing.assert_allclose([play.quantile(q) / 1000 for q in (0.25, 0.5, 0.75)], [1.3, 4.8, 19], rtol=0.3)
    shown = standard["video_id"].value_counts()["count"].sort(descending=True)
    assert shown[0] > 20 * shown.median()
    uploaded = csv_files.read_videos(csv_files.whole(found.videos[0]))[0].select("video_id", "upload_dt")
    assert (rows.join(uploaded, "video_id")["upload_dt"] <= rows["date"]).all()
    with pytest.raises(FileExistsError, match="exists; remove it"):
        log.write(tmp_path / "a", counted)


@pytest.mark.parametrize("variant", synthetic.OFFICIAL)
def test_sizes_of_synthetic_logs_follow_their_rows(variant, tmp_path):
    users, videos, _ = synthetic.OFFICIAL[variant]

    def sizes(rows):
        return synthetic.SyntheticLog(rows, variant=variant)._sizes

    assert sizes(synthetic.OFFICIAL_ROWS[variant])[:2] == (users, videos)
    assert sizes(2_000)[0] == 40 and sizes(2_000)[1] < 1_000 and sizes(1)[0] == 1
    log = synthetic.SyntheticLog(rows=2_000, variant=variant)
    log.write(tmp_path / "log", counted)
    assert sum(len(path.read_bytes()) for path in (tmp_path / "log").rglob("*.csv")) < 1 << 20
    report = builder.prepare_log(tmp_path / "log", tmp_path / "records").report  # 100 candidates are found
    assert report["log"]["standard"]["rows"] == 2_000 and report["splits"]["random_test"]["exposures"] > 0


def test_synthetic_logs_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(ValueError, match="variant='2k' is no release"):
        synthetic.SyntheticLog(rows=10, variant="2k")
    with pytest.raises(ValueError, match="videos=0 is not positive"):
        synthetic.SyntheticLog(rows=10, videos=0)
    with pytest.raises(ZeroDivisionError):  # nothing is left of a log that could not be written whole
        synthetic.SyntheticLog(rows=10, users=5, videos=5).write(tmp_path / "log", lambda *_: lambda done: 1 // 0)
    assert not list(tmp_path.iterdir())


MEASURE = """
import pathlib, resource, sys
from mmrf_jax.data.readers.engine import tasks
from mmrf_jax.data.readers.kuairand import prepare, release
from mmrf_jax.data.readers.kuairand.config import KuaiRandConfig
from mmrf_jax.io.progress import counted
work = pathlib.Path(sys.argv[2])
work.mkdir()
found = release.find_release(sys.argv[1])
job = prepare.KuaiRandJob(found, KuaiRandConfig(), work, chunk_bytes=8 << 20, bucket_rows=100_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with tasks.worker_processes(1) as engine:
    prepare.run_stages(job, engine, counted)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_log(tmp_path, run_python):
    grown = []
    for rows in (500_000, 4_000_000):
        synthetic.SyntheticLog(rows=rows, users=3_000, videos=20_000).write(tmp_path / str(rows), counted)
        grown.append(int(run_python(MEASURE, tmp_path / str(rows), tmp_path / f"work{rows}")) / 1024)
    print(f"MiB: {grown}")
    assert grown[1] < 1.3 * grown[0] + 20 and grown[1] < 400


@pytest.mark.slow
def test_killed_again_and_again_it_makes_the_same_files(tmp_path, launch):
    """SIGKILL to the main process alone, at any time; its processes end with it."""
    synthetic.SyntheticLog(rows=2_000_000, users=2_000, videos=20_000).write(tmp_path / "log", counted)
    arguments = [f"--source={tmp_path / 'log'}", "--workers=2"]
    launch.ok("prepare", *arguments, f"--out={tmp_path / 'whole'}")
    rng, kills = np.random.default_rng(0), 0

    def unfinished():
        return next(tmp_path.glob(".killed.unfinished-*"), None)

    def made():
        return 0 if (work := unfinished()) is None else sum(len(files) for _, _, files in os.walk(work))

    while True:
        command = launch.command("prepare", *arguments, f"--out={tmp_path / 'killed'}")
        process = subprocess.Popen(command, env=launch.environment(), cwd=os.getcwd(), stderr=subprocess.DEVNULL)
        enough = made() + rng.integers(1, 4)
        while process.poll() is None and (kills >= 6 or made() < enough):
            time.sleep(0.01)
        if process.poll() is not None:
            assert process.returncode == 0
            if kills >= 3:
                break
            shutil.rmtree(tmp_path / "killed")  # a busy machine let it end before: again
            continue
        time.sleep(rng.uniform(0.0, 0.2))
        process.kill()
        process.wait()
        kills += 1
    one, other = tmp_path / "whole", tmp_path / "killed"
    names = sorted(str(path.relative_to(one)) for path in one.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(other)) for path in other.rglob("*") if path.is_file())
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert unfinished() is None


@pytest.mark.slow
def test_beam_makes_the_same_files(source, divided, tmp_path):
    pytest.importorskip("apache_beam", reason="apache-beam is not installed: pip install 'mmrf_jax[beam]'")
    made, job = run(source, tmp_path / "beam", tasks.beam_pipelines(), **SMALL)
    assert kept(job) == kept(divided[1]) and made == divided[0]
