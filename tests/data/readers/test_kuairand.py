"""The KuaiRand builder on made-up files: leaks, candidates, counts, errors. Real rows: `test_kuairand_real`."""

import dataclasses
import pathlib
import shutil
import subprocess
import sys
import tempfile
import types

import kuairand_files as files
import numpy as np
import pandas as pd
import polars as pl
import pytest

from mmrf_jax.data import records
from mmrf_jax.data.frame_log import SessionLog
from mmrf_jax.data.readers import kuairand
from mmrf_jax.data.readers.engine import build, candidates, grouping, tasks
from mmrf_jax.data.readers.kuairand import builder, clean, csv_files, features, prepare, release, requests
from mmrf_jax.io import extras
from mmrf_jax.io.progress import counted
from mmrf_jax.schema import Schema
from mmrf_jax.signals import Signal

CONFIG = builder.KuaiRandConfig(candidates=20, slate=3, history=8, session_gap_minutes=120)

LAZY = """
import sys
from mmrf_jax.data.readers import kuairand
kuairand.KuaiRandConfig
assert not {"jax", "polars"} & set(sys.modules)
sys.modules["polars"] = None
try:
    kuairand.SyntheticLog
except ImportError as error:
    print(error)
"""


def test_names_of_the_package_load_when_they_are_used_and_name_their_extra():
    done = subprocess.run([sys.executable, "-c", LAZY], check=True, capture_output=True, text=True)
    assert done.stdout == "polars is not installed; pip install 'mmrf_jax[data]'\n"
    assert all(hasattr(kuairand, name) for name in kuairand.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Spilt'; it has KuaiRand, KuaiRandConfig, "):
        _ = kuairand.Spilt


def test_beam_is_named_where_it_is_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(extras.MissingExtra, match=r"apache_beam is not installed; pip install 'mmrf_jax\[beam\]'"):
        tasks.beam_pipelines(["--runner=DirectRunner"])


def opened(source, tmp_path, config=CONFIG):
    """Catalogue, profiles and plans of a log so small that it is one bucket."""
    job = prepare.KuaiRandJob(release.find_release(source), config, pathlib.Path(tempfile.mkdtemp(dir=tmp_path)))
    with tasks.worker_processes(1) as engine:
        prepare.run_stages(job, engine, counted)
    bucket, plans = prepare.open_bucket(job, 0)
    made = {name: planned(bucket.rows, plan) for name, plan in plans.items()}
    catalogue, profiles = (
        features.read_catalogue(job.records / "catalogue"),
        features.read_profiles(job.records / "profiles"),
    )
    return types.SimpleNamespace(catalogue=catalogue, profiles=profiles, plans=made)


def planned(rows, plan):
    """Where the sessions and requests of a plan begin among the part's rows."""
    own = types.SimpleNamespace(date=rows.day[plan.own], time=rows.time[plan.own], user=rows.user[plan.own])
    return types.SimpleNamespace(rows=own, request_first=plan.request_first, session_first=plan.session_first)


def prepare_in(source, tmp_path, config=CONFIG):
    prepared = opened(source, tmp_path, config)
    splits, items, spec, report = files.loaded(builder.open_or_prepare(source, tmp_path / "cache", config))
    return prepared, splits, items, spec, report


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kuairand")
    return prepare_in(files.write(folder / "source"), folder)


def packed(splits, name, spec):
    return records.pack_sessions(splits[name], spec)


def exposures(log):
    """(video item rows, feedback, index of the request) of all exposures in log order."""
    request, place = np.nonzero(log.slate >= 0)
    return log.candidates[request, log.slate[request, place]], log.feedback[request, place], request


def test_every_usable_row_is_in_one_split(small):
    prepared, splits, items, spec, report = small
    raw = files.make_log(0, 1500).drop_duplicates()
    for name, log in splits.items():
        log.validate(spec)
        counts = report["splits"][name]
        assert counts["sessions"] == log.num_sessions and counts["requests"] == log.num_requests
        assert counts["exposures"] == (log.slate >= 0).sum()
    for name, keep in {
        "train": raw.date <= 20220502,
        "valid": raw.date == 20220503,
        "test": raw.date >= 20220504,
    }.items():
        rows = raw[keep]
        videos, feedback, request = exposures(splits[name])
        user = np.repeat(splits[name].user_id, np.diff(splits[name].offsets))[request]
        got = sorted(
            zip(
                user, prepared.catalogue.video_id[videos], feedback[:, 0], np.round(feedback[:, -1] * 1000), strict=True
            )
        )
        want = sorted(zip(rows.user_id, rows.video_id, rows.is_click, rows.play_time_ms, strict=True))
        assert got == want
    assert report["log"]["standard"]["used"] == len(raw)
    np.testing.assert_array_equal(items.duration[1:91], (10 + np.arange(90) * 0.5).astype(np.float32))


def test_candidates_are_different_live_and_hold_the_slate(small):
    prepared, splits, _, _, _ = small
    catalogue = prepared.catalogue
    assert catalogue.live_from[1 + 82] == 20220504
    seen = pd.concat([files.make_log(0, 1500), files.make_log(9, 300, is_rand=1)]).groupby("video_id")["date"].min()
    for name, log in splits.items():
        assert (np.diff(np.sort(log.candidates, 1), axis=1) > 0).all() and log.candidates.min() > 0
        plan = prepared.plans[name]
        day = plan.rows.date[plan.request_first[:-1]]
        shown = np.zeros(log.candidates.shape, bool)
        request, place = np.nonzero(log.slate >= 0)
        shown[request, log.slate[request, place]] = True
        video = catalogue.video_id[log.candidates]
        late = ~shown & (video >= 80) & (video < 85)
        assert (day[:, None] >= 20220504)[late.any(1)].all()
        unknown = ~shown & (video >= 85)
        first = seen.reindex(np.arange(files.VIDEOS)).to_numpy()
        assert (np.broadcast_to(day[:, None], video.shape)[unknown] > first[video[unknown]]).all()
        if name == "test":
            assert late.any() and unknown.any()


def test_history_is_the_last_standard_exposures_strictly_before(small):
    prepared, splits, _, _, _ = small
    last_day = {"train": 20220502, "valid": 20220503, "test": 99999999}
    standard = files.make_log(0, 1500).drop_duplicates().sort_values(["user_id", "time_ms", "video_id"])
    checked = 0
    for name, log in splits.items():
        plan = prepared.plans[name]
        row = plan.request_first[plan.session_first[:-1]]
        for n in range(log.num_sessions):
            past = standard[
                (standard.user_id == log.user_id[n])
                & (standard.time_ms < plan.rows.time[row[n]])
                & (standard.date <= last_day.get(name, 99999999))
            ].tail(CONFIG.history)
            assert log.history_mask[n].sum() == len(past)
            assert (np.diff(log.history_mask[n].astype(int)) >= 0).all()
            got = prepared.catalogue.video_id[log.history_videos[n][log.history_mask[n]]]
            assert got.tolist() == past.video_id.tolist()
            np.testing.assert_allclose(
                log.history_feedback[n][log.history_mask[n]][:, -1], past.play_time_ms.to_numpy() / 1000, rtol=1e-6
            )
            checked += len(past)
    assert checked > 500


def test_sessions_end_with_an_absence_or_are_truncated(small):
    prepared, splits, _, _, _ = small
    for name in ("train", "valid", "test"):
        plan, log = prepared.plans[name], splits[name]
        assert (log.terminated ^ log.truncated).all()
        last = plan.request_first[plan.session_first[1:]] - 1
        for n in range(log.num_sessions):
            later = plan.rows.time[(plan.rows.user == log.user_id[n]) & (plan.rows.time > plan.rows.time[last[n]])]
            until = min(later.min(initial=2**62), max(plan.rows.time.max(), 0) if not len(later) else 2**62)
            assert log.terminated[n] == (until - plan.rows.time[last[n]] > 120 * 60_000)
        assert 0 < log.truncated.sum() <= len(np.unique(log.user_id))


def test_random_exposures_are_sessions_of_one_request_apart_from_the_standard_log(small):
    splits = small[1]
    date = files.make_log(9, 300, is_rand=1).date
    of = {
        "random_train": date <= 20220502,
        "random_valid": date == 20220503,
        "random_test": date >= 20220504,
    }
    for name, chosen in of.items():
        log = splits[name]
        assert log.num_sessions == chosen.sum() == log.num_requests > 0
        assert (log.slate[:, 0] >= 0).all() and (log.slate[:, 1:] == -1).all() and log.truncated.all()
        np.testing.assert_allclose(log.log_propensity, -np.log(20), rtol=1e-6)
        assert log.date.min() == date[chosen].min() and log.date.max() == date[chosen].max()
    assert all(np.isnan(splits[name].log_propensity).all() for name in ("train", "valid", "test"))


#: KuaiRand's rules in the words of any log.
SCHEMA = Schema(
    user="user_id",
    item="video_id",
    time="time_ms",
    signals=[
        Signal("click", "is_click"),
        Signal("long_view"),
        *(Signal(name, f"is_{name}") for name in ("like", "follow", "comment", "forward")),
        Signal("hate", "is_hate", sign=-1),
        Signal("profile_enter", "is_profile_enter"),
        Signal("watch_time", "play_time_ms", "duration", unit="ms"),
    ],
    main="watch_time",
    duration="duration_ms",
    random="is_rand",
    request_by=("tab",),
    request_gap=30.0,
    available="upload_dt",
    time_zone="Asia/Shanghai",
    split=("2022-05-02", "2022-05-03"),
    session_gap=120.0,
    slate_size=3,
    num_candidates=20,
    history=8,
)


def test_the_reader_of_any_log_makes_the_same_sessions_of_these_rows(small):
    """But for numbers of users and items, features, and which candidates are drawn."""
    prepared, splits = small[:2]
    rows = pd.concat([files.make_log(0, 1500), files.make_log(9, 300, is_rand=1)]).drop_duplicates()
    log = SessionLog.from_frame(rows, SCHEMA, items=files.make_videos().drop(columns="tag"), quiet=True)
    assert log.spec.signals.names == small[3].signals.names and log.parts.keys() == splits.keys()
    videos = {"theirs": prepared.catalogue.video_id, "ours": log.item_ids}
    for name, theirs in splits.items():
        ours = log.part(name)
        np.testing.assert_array_equal(log.user_ids[ours.user_id], theirs.user_id, name)
        for field in ("date", "offsets", "terminated", "truncated", "history_mask", "log_propensity"):
            np.testing.assert_array_equal(getattr(ours, field), getattr(theirs, field), f"{name}.{field}")
        for field in ("feedback", "history_feedback"):
            np.testing.assert_allclose(getattr(ours, field), getattr(theirs, field), rtol=1e-6)
        mask = theirs.history_mask
        np.testing.assert_array_equal(
            videos["ours"][ours.history_videos][mask], videos["theirs"][theirs.history_videos][mask]
        )
        np.testing.assert_array_equal(videos["ours"][exposures(ours)[0]], videos["theirs"][exposures(theirs)[0]])
        np.testing.assert_allclose(ours.context[:, [0, 1, 2, -1]], theirs.context[:, [0, 1, -2, -1]], atol=5e-4)


@pytest.mark.parametrize("day", ["valid and test", "test"])
def test_changing_later_days_changes_nothing_earlier(tmp_path, small, day):
    _, splits, items, spec, _ = small
    first = 20220503 if day == "valid and test" else 20220504
    standard, random = files.make_log(0, 1500), files.make_log(9, 300, is_rand=1)
    other = files.make_log(77, 1500, [d for d in files.DATES if d >= first], videos=files.VIDEOS + 40)
    changed = pd.concat([standard[standard.date < first], other])  # also videos without features, other users' times
    other_random = pd.concat([random[random.date < first], files.make_log(78, 50, [20220504], is_rand=1)])
    source = files.write(tmp_path / "source", standard=changed.sample(frac=1, random_state=0), random=other_random)
    prepared, splits2, items2, spec2, _ = prepare_in(source, tmp_path)
    assert packed(splits2, "train", spec2) == packed(splits, "train", spec)
    assert (packed(splits2, "valid", spec2) == packed(splits, "valid", spec)) == (day == "test")
    assert packed(splits2, "test", spec2) != packed(splits, "test", spec)
    assert spec2 == dataclasses.replace(spec, num_videos=spec2.num_videos) and spec2.num_videos > spec.num_videos
    for name, value in {**small[0].catalogue.fitted, **small[0].profiles.fitted}.items():
        np.testing.assert_array_equal(
            {**prepared.catalogue.fitted, **prepared.profiles.fitted}[name], value, err_msg=name
        )
    for field in ("author", "tag", "duration", "features", "embedding_id"):
        np.testing.assert_array_equal(getattr(items2, field)[: items.num_videos], getattr(items, field), err_msg=field)
    assert not items2.embedding_id[items.num_videos :].any() and (items2.duration[items.num_videos :] > 0).all()


def test_vocabularies_hold_training_days_only(tmp_path):
    standard = files.make_log(0, 1500)
    late = (standard.video_id >= 70) & (standard.date <= 20220502)
    source = files.write(tmp_path / "source", standard=standard[~late])  # videos 70 … 89 are first seen after training
    prepared, _, items, _, _ = prepare_in(source, tmp_path)
    trained = np.unique(standard[~late & (standard.date <= 20220502)].video_id)
    np.testing.assert_array_equal(prepared.catalogue.fitted["video_vocabulary"], trained)
    rows = prepared.catalogue.rows_of(np.arange(files.VIDEOS))
    np.testing.assert_array_equal(items.embedding_id[rows] > 0, np.isin(np.arange(files.VIDEOS), trained))
    assert items.num_embeddings == len(trained) + 1 and items.embedding_id.max() == len(trained)
    authors = files.make_videos().set_index("video_id").author_id
    np.testing.assert_array_equal(prepared.catalogue.fitted["author_vocabulary"], np.unique(authors[trained]))
    known = np.isin(authors, authors[trained])
    np.testing.assert_array_equal(items.author[rows] > 0, known)
    assert items.features[rows[70:], 0].all()  # a video out of the vocabulary has its features all the same
    assert not items.features[0].any()


def test_parts_and_missing_logs_are_accepted(tmp_path, small):
    standard = files.make_log(0, 1500)
    source = files.write(tmp_path / "a", "27k", standard=standard)
    _, splits, _, spec, report = prepare_in(source, tmp_path)
    assert report["variant"] == "27k" and sum("part" in name for name in report["files"]) == 6
    assert packed(splits, "train", spec) == packed(small[1], "train", small[3])
    (source / "data" / "log_random_4_22_to_5_08_27k.csv").unlink()
    (source / "data" / "log_standard_4_22_to_5_08_27k_part2.csv").unlink()
    shutil.move(source / "data", tmp_path / "flat")  # the folder of the files itself is accepted too
    default_gap = dataclasses.replace(CONFIG, session_gap_minutes=None)
    _, splits, _, _, report = prepare_in(tmp_path / "flat", tmp_path, default_gap)
    assert splits["random_test"].num_sessions == 0 and splits["train"].num_sessions > 0
    assert report["session_gap_minutes"] == 30
    assert report["log"]["standard"]["rows"] == 1000 and report["log"]["random"]["rows"] == 0


def test_the_random_pool_of_the_larger_releases_is_what_earlier_days_exposed(tmp_path):
    random = files.make_log(9, 300, is_rand=1)
    random["video_id"] = random["video_id"] % 40
    random["duration_ms"] = 10_000 + random["video_id"] * 500
    prepared, splits, _, _, _ = prepare_in(files.write(tmp_path / "source", "1k", random=random), tmp_path)
    assert prepared.catalogue.video_id[splits["random_test"].candidates].max() < 40
    assert prepared.catalogue.video_id[splits["test"].candidates].max() >= 40


def test_bad_rows_are_counted_and_duplicates_dropped(tmp_path):
    standard = files.make_log(0, 1500).astype(object)
    standard.loc[0, "is_like"] = "?"
    standard.loc[1, "time_ms"] = ""
    standard.loc[2, "play_time_ms"] = -5
    standard.loc[3, "is_click"] = 2
    standard.loc[4, "date"] = 20221345
    standard.loc[5, "duration_ms"] = 0  # the features know it
    standard.loc[6, ["video_id", "duration_ms"]] = [500, 0]  # no one knows it
    standard.loc[7, "tab"] = 1.5
    doubled = pd.concat([standard, standard.loc[[20, 21, 22]]])
    source = files.write(tmp_path / "source", standard=doubled)
    clean_lines = (source / "data" / "log_standard_4_22_to_5_08_pure.csv").read_text()
    _, _, _, _, report = prepare_in(source, tmp_path)
    counts = report["log"]["standard"]
    assert counts["rows"] == 1503 and counts["duplicates"] == 3 and counts["duration_repaired"] == 1
    assert counts["unparsable"] == 3 and counts["negative_play_time"] == 1 and counts["bad_flag"] == 1
    assert counts["bad_date"] == 1 and counts["no_duration"] == 1 and counts["used"] == 1493

    # a line with too many fields, one with too few, a stray quote, a broken character
    mangled = clean_lines + "1,2,3\n" + "0," * 25 + '\n5,"7,20220501,12\n'
    path = source / "data" / "log_standard_4_22_to_5_08_pure.csv"
    path.write_bytes(mangled.encode() + b"\xff\xfe,1\n")
    _, splits, _, _, report = prepare_in(source, tmp_path)
    assert report["log"]["standard"]["rows"] == 1507 and report["log"]["standard"]["unparsable"] == 7
    assert (
        report["log"]["standard"]["used"]
        == 1493
        == sum((splits[n].slate >= 0).sum() for n in ("train", "valid", "test"))
    )


@pytest.mark.parametrize(
    ("file", "column"),
    [
        ("log_standard_4_22_to_5_08_pure.csv", "long_view"),
        ("user_features_pure.csv", "onehot_feat5"),
        ("video_features_basic_pure.csv", "upload_dt"),
    ],
)
def test_missing_columns_and_files_are_named(tmp_path, file, column):
    source = files.write(tmp_path / "source")
    path = source / "data" / file
    pd.read_csv(path).drop(columns=column).to_csv(path, index=False)
    with pytest.raises(ValueError, match=f"{file} has no column '{column}'; copy it again"):
        builder.open_or_prepare(source, tmp_path / "cache", CONFIG)
    path.write_text("")
    with pytest.raises(ValueError, match=f"{file} is empty; copy it again"):
        builder.open_or_prepare(source, tmp_path / "cache", CONFIG)
    if not file.startswith("log"):
        path.unlink()
        with pytest.raises(FileNotFoundError, match=f"{file} is missing; copy it"):
            builder.open_or_prepare(source, tmp_path / "cache", CONFIG)


def test_sources_that_are_none_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        release.find_release(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no log_standard"):
        release.find_release(tmp_path)
    source = files.write(tmp_path / "source")
    shutil.copy(source / "data" / "user_features_pure.csv", source / "data" / "user_features_1k.csv")
    with pytest.raises(ValueError, match="1k and pure"):
        release.find_release(source)


def test_configs_that_cannot_be_are_refused(tmp_path):
    source = files.write(tmp_path / "source")
    with pytest.raises(
        ValueError, match=r"\d+ videos are live on \d+, 200 candidates are asked for; set candidates to"
    ):
        builder.open_or_prepare(source, tmp_path / "cache", dataclasses.replace(CONFIG, candidates=200))
    with pytest.raises(
        ValueError, match="no standard-log row on or before train_until=20220401; the first is of 20220429"
    ):
        builder.open_or_prepare(source, tmp_path / "cache", dataclasses.replace(CONFIG, train_until=20220401))
    with pytest.raises(ValueError, match="candidates=2 is less than slate=3"):
        dataclasses.replace(CONFIG, candidates=2)
    with pytest.raises(ValueError, match="valid_until=20220503 is not after"):
        dataclasses.replace(CONFIG, train_until=20220503)
    with pytest.raises(ValueError, match="session_gap_minutes is 0; use a number above 0"):
        dataclasses.replace(CONFIG, session_gap_minutes=0)


def test_preparing_twice_does_nothing_and_half_written_is_not_finished(tmp_path, monkeypatch):
    source = files.write(tmp_path / "source")

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(records, "pack_sessions", interrupted)
        builder.prepare_log(source, tmp_path / "out", CONFIG)
    with pytest.raises(FileNotFoundError, match="holds no prepared KuaiRand"):
        builder.KuaiRand.open(tmp_path / "out")
    splits, _, spec, _ = files.loaded(builder.prepare_log(source, tmp_path / "out", CONFIG))
    with monkeypatch.context() as patch:
        patch.setattr(records, "pack_sessions", interrupted)
        again = builder.prepare_log(source, tmp_path / "out", CONFIG)
        with pytest.raises(ValueError, match=r"settings \(seed 0\); prepare the CSV files in another folder"):
            builder.prepare_log(source, tmp_path / "out", dataclasses.replace(CONFIG, seed=1))
    with pytest.raises(FileExistsError, match=r"source exists and holds no prepared KuaiRand; name a folder that does"):
        builder.prepare_log(source, source, CONFIG)
    assert records.pack_sessions(again.part("test"), spec) == packed(splits, "test", spec)

    with monkeypatch.context() as patch:  # open_or_prepare prepares anew only for other files or another config
        builder.open_or_prepare(source, tmp_path / "cache", CONFIG)
        patch.setattr(records, "pack_sessions", interrupted)
        builder.open_or_prepare(source, tmp_path / "cache", CONFIG)
        with pytest.raises(KeyboardInterrupt):
            builder.open_or_prepare(source, tmp_path / "cache", dataclasses.replace(CONFIG, seed=1))
        files.make_users().iloc[:-1].to_csv(source / "data" / "user_features_pure.csv", index=False)
        with pytest.raises(KeyboardInterrupt):
            builder.open_or_prepare(source, tmp_path / "cache", CONFIG)


def test_prepared_records_are_read_in_place_of_the_files(tmp_path):
    builder.open_or_prepare(files.write(tmp_path / "source"), tmp_path / "cache", CONFIG)
    written = next((tmp_path / "cache").iterdir())
    splits, _, spec, report = files.loaded(builder.open_or_prepare(written, tmp_path / "other", CONFIG))
    again, _, _, wanted = files.loaded(builder.open_or_prepare(tmp_path / "source", tmp_path / "cache", CONFIG))
    assert packed(splits, "train", spec) == packed(again, "train", spec) and report == wanted
    assert not (tmp_path / "other").exists()
    with pytest.raises(ValueError, match="prepared with other settings"):
        builder.open_or_prepare(written, tmp_path / "other", dataclasses.replace(CONFIG, seed=1))


def test_the_seed_changes_candidates_only(tmp_path, small):
    splits = small[1]
    source = files.write(tmp_path / "s")
    other = files.loaded(builder.open_or_prepare(source, tmp_path / "cache", dataclasses.replace(CONFIG, seed=1)))[0]
    assert (other["train"].candidates != splits["train"].candidates).mean() > 0.8
    for a, b in zip(exposures(other["train"]), exposures(splits["train"]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_requests_equal_a_slow_reference():
    rng = np.random.default_rng(0)
    n, k, gap = 3000, 4, 30
    start = rng.random(n) < 0.05
    start[0] = True
    item, tab = rng.integers(0, 12, n), (rng.random(n) < 0.9).astype(int)
    time = np.cumsum(np.where(rng.random(n) < 0.1, 40, 1) * 60_000)
    expected, current = [], []
    for i in range(n):
        new = start[i] or tab[i] != tab[i - 1] or time[i] - time[i - 1] > gap * 60_000
        new = new or len(current) == k or item[i] in current
        current = [item[i]] if new else [*current, item[i]]
        expected.append(bool(new))
    got = grouping.request_starts(start, item, tab, time, k, gap)
    assert got.tolist() == expected
    assert grouping.request_starts(start[:2], item[:2], tab[:2], time[:2], 6, gap).tolist() == expected[:2]
    assert grouping.request_starts(start[:0], item[:0], tab[:0], time[:0], 6, gap).tolist() == []


def test_context_by_hand():
    time = files.midnight_ms(20220501) + np.array([6 * 3_600_000, 9 * 3_600_000])
    frame = pl.DataFrame(
        {"user_id": [4, 4], "video_id": [1, 2], "date": [20220501] * 2, "time_ms": time, "tab": [1, 99], "is_rand": 0},
        {name: csv_files.LOG_TYPES[name] for name in ("user_id", "video_id", "date", "time_ms", "tab", "is_rand")},
    ).with_columns(pl.lit(0, pl.Int8).alias(name) for name in (*csv_files.SIGNAL_COLUMNS, "play_time_ms"))
    catalogue = types.SimpleNamespace(rows_of=lambda video: video)
    sizes = build.SessionSizes(candidates=6, slate=6, history=2, session_gap=24 * 60, request_gap=30)
    pool = candidates.make_pool(np.full(9, 20220401, np.int32), clean.NEVER)
    rows, profiles = requests.arrange_rows(frame, catalogue, 0, None), np.zeros((1, 0), np.float32)
    lookup = requests.KuaiRandLookup(rows, sizes.candidates, {"train": pool}, profiles, np.zeros(2, int))
    bucket = build.UserBucket(rows, sizes, lookup)
    plan = build.plan_sessions(rows, "train", np.zeros(2, np.int8), sizes, int(time[-1]))
    context = bucket.gather(plan, np.arange(1)).context
    assert context.shape == (2, requests.CONTEXT)
    np.testing.assert_allclose(context[:, :2], [[1, 0], [np.sin(np.pi * 0.75), np.cos(np.pi * 0.75)]], atol=1e-6)
    assert context[0, 2:18].tolist() == [0, 1] + [0] * 14 and context[1, 2:18].tolist() == [0] * 15 + [1]
    np.testing.assert_allclose(context[:, 19], np.log([1, 2]), atol=1e-6)
    np.testing.assert_allclose(context[:, 18], [1, np.log(4) / np.log(169)], atol=1e-6)


def test_sampling_is_uniform_and_places_are_too():
    pool = candidates.make_pool(np.array([clean.NEVER, *[20220501] * 30, *[20220502] * 10], np.int32), clean.NEVER)
    r, c = 20000, 12
    key = candidates.request_keys(3, np.arange(r))
    exposed = np.stack([np.full(r, 5), np.full(r, 40), np.full(r, -1)], 1).astype(np.int32)  # 40 is not live yet
    drawn, slate = pool.sample(key, np.full(r, 20220501), exposed, c)
    assert (np.diff(np.sort(drawn, 1), axis=1) > 0).all()
    rows = np.arange(r)
    assert (
        (drawn[rows, slate[:, 0]] == 5).all() and (drawn[rows, slate[:, 1]] == 40).all() and (slate[:, 2] == -1).all()
    )
    counts = np.bincount(drawn.ravel(), minlength=41)
    others = np.setdiff1d(np.arange(1, 31), [5])
    expected = r * (c - 2) / 29
    assert counts[0] == 0 and counts[31:40].sum() == 0
    assert np.abs(counts[others] / expected - 1).max() < 5 / np.sqrt(expected)
    for column in (0, 1):
        places = np.bincount(slate[:, column], minlength=c)
        assert np.abs(places / (r / c) - 1).max() < 5 / np.sqrt(r / c)
    # a request's candidates depend on its key and day alone, and a pool of exactly C is used up
    again, _ = pool.sample(key[::-1][:50], np.full(50, 20220501), exposed[:50], c)
    np.testing.assert_array_equal(again, drawn[::-1][:50])
    full, _ = pool.sample(key[:50], np.full(50, 20220502), exposed[:50], 40)
    assert (np.sort(full, 1) == np.arange(1, 41)).all()
