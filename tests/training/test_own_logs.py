"""Runs on anyone's log: the config, the log in the run folder, and ids in and out."""

import asyncio
import dataclasses
import shutil

import numpy as np
import own_logs as tables
import polars as pl
import pytest

import mmrf_jax as mmrf
from experiments import logs as experiment
from mmrf_jax.data import statistics
from mmrf_jax.data.frame_log import SessionLog
from mmrf_jax.data.readers import feedback_log
from mmrf_jax.parallel.partitioner import Partitioner
from mmrf_jax.serving.service import Asked, Service, Settings
from mmrf_jax.training import (
    arms,
    config_sections,
    configs,
    inputs,
    own_logs,
    restore,
    run_folder,
    simulated_tests,
    train,
)

CONFIG = configs.run_of(experiment.get_config().to_dict())


@pytest.fixture(scope="module")
def made():
    return tables.make_log(600)


@pytest.fixture(scope="module")
def log(made):
    return SessionLog.from_frame(made["log"], tables.SCHEMA, items=made["items"], users=made["users"], quiet=True)


def test_a_config_takes_its_sizes_from_the_log(log, tmp_path):
    config, same = own_logs.prepare_own_log(CONFIG, tmp_path, log)
    assert same is log and (config.sizes.slate, config.sizes.candidates) == (4, 12)
    assert config.own_logs.digest == log.digest()
    assert configs.run_of(configs.as_dict(config)) == config
    world = configs.Run()
    assert own_logs.prepare_own_log(world, tmp_path, None) == (world, None)
    with pytest.raises(ValueError, match=r"config.source='world' reads no log that is given; use the config 'logs'"):
        own_logs.prepare_own_log(world, tmp_path, log)
    with pytest.raises(ValueError, match=r"log is of type DataFrame; give SessionLog.from_frame\(log, schema\)"):
        own_logs.prepare_own_log(CONFIG, tmp_path, tables.make_log(10)["log"])
    with pytest.raises(ValueError, match=r"config.data.slate is 5, and the log has 4; leave it out"):
        own_logs.prepare_own_log(configs.override(CONFIG, data={"slate": 5}), tmp_path, log)
    with pytest.raises(ValueError, match=r"no log to read: config.data.path is empty; use --config.data.path=PATH"):
        own_logs.prepare_own_log(CONFIG, tmp_path, None)


def test_a_config_names_the_tables(made, log, tmp_path):
    for name, table in made.items():
        table.write_parquet(tmp_path / f"{name}.parquet")
    schema = tmp_path / "schema.py"
    schema.write_text("import own_logs\n\nschema = own_logs.SCHEMA\n")
    paths = {"path": "log", "item_table": "items", "user_table": "users"}
    data = {field: f"{tmp_path}/{name}.parquet" for field, name in paths.items()} | {"schema": str(schema)}
    data |= {"cache_dir": str(tmp_path / "cache")}
    first = own_logs.read_own_log(config_sections.OwnLogs(**data), quiet=True)
    assert first.digest() == log.digest()
    assert own_logs.read_own_log(config_sections.OwnLogs(**data), quiet=True).folder == first.folder  # is prepared once
    assert own_logs.read_own_log(config_sections.OwnLogs(path=str(first.folder))).digest() == log.digest()
    fewer = own_logs.read_own_log(config_sections.OwnLogs(**data, slate=2, candidates=8), quiet=True)
    assert (fewer.spec.slate, fewer.spec.candidates) == (2, 8)


def test_a_source_reads_the_log_of_the_run_folder(log, tmp_path):
    log.save(tmp_path / run_folder.LOG)
    config, _ = own_logs.prepare_own_log(CONFIG, tmp_path, log)
    source = restore.open_source(config, None, workdir=tmp_path)
    np.testing.assert_array_equal(source.train().feedback, log.train.feedback)
    np.testing.assert_array_equal(source.test()["test"].candidates, log.test.candidates)
    assert source.video_ids().tolist() == log.item_ids.tolist() and source.unknown_video == 0 and source.sim is None
    with pytest.raises(ValueError, match=r"use --config.data.slate=4 --config.data.candidates=12"):
        restore.open_source(CONFIG, None, workdir=tmp_path)
    added = statistics.num_features(log.spec.signals)
    assert source.spec == dataclasses.replace(log.spec, item_features=log.spec.item_features + added)
    plain = restore.open_source(configs.override(config, data={"statistics": False}), None, workdir=tmp_path)
    assert plain.spec == log.spec and plain.items.statistics is None
    whole = configs.override(config, data={"stream": True})
    blocks = restore.open_source(whole, None, workdir=tmp_path).blocks()
    assert blocks.read([0]).num_sessions == min(256, log.train.num_sessions) and source.blocks() is None


def test_rows_shown_at_random_are_tested_apart_and_learned_from_when_asked(made, tmp_path):
    frame = made["log"].with_columns(lottery=pl.int_range(pl.len()) % 5 == 0)
    given = dict.fromkeys(("request", "position", "propensity", "candidates"))
    schema = dataclasses.replace(tables.SCHEMA, **given, random="lottery", slate_size=4, num_candidates=12)
    SessionLog.from_frame(frame, schema, items=made["items"], quiet=True).save(tmp_path / run_folder.LOG)
    config, log = own_logs.prepare_own_log(CONFIG, tmp_path, SessionLog.open(tmp_path / run_folder.LOG))
    source = restore.open_source(config, None, workdir=tmp_path)
    assert source.test().keys() == {"test", "random_test"} and source.spec.context == log.spec.context
    assert source.train().num_sessions == log.train.num_sessions
    config = configs.override(config, data={"random_log": "train"})
    source = restore.open_source(config, None, workdir=tmp_path)
    usual, random = log.train.num_requests, log.part("random_train").num_requests
    assert source.train().context[:, 0].tolist() == [0.0] * usual + [1.0] * random and random > 20
    assert source.spec.context == log.spec.context + 1 and source.names["context"][0]["name"] == "at_random"


def test_learning_from_random_rows_needs_some(log, made, tmp_path):
    log.save(tmp_path / run_folder.LOG)
    config, _ = own_logs.prepare_own_log(configs.override(CONFIG, data={"random_log": "train"}), tmp_path, log)
    with pytest.raises(ValueError, match=r"random; use --config.data.random_log=off, or name schema.random"):
        restore.open_source(config, None, workdir=tmp_path)
    frame = made["log"].with_columns(lottery=pl.int_range(pl.len()) == pl.col(tables.SCHEMA.time).arg_max())
    given = dict.fromkeys(("request", "position", "propensity", "candidates"))
    schema = dataclasses.replace(tables.SCHEMA, **given, random="lottery", slate_size=4, num_candidates=12)
    late = SessionLog.from_frame(frame, schema, items=made["items"], quiet=True)  # a row of the test part alone
    late.save(tmp_path / "late" / run_folder.LOG)
    config, _ = own_logs.prepare_own_log(
        configs.override(CONFIG, data={"random_log": "train"}), tmp_path / "late", late
    )
    with pytest.raises(ValueError, match=r"no row of training was shown at random; use --config.data.random_log=off$"):
        restore.open_source(config, None, workdir=tmp_path / "late")


def served_by_hand(folder, log) -> None:
    """Write a log in which a known and a new user see an item that came after the export, with candidates of 12."""
    known = [f"i{n:03d}" for n in range(11)]
    item = {
        "id": "i999",
        "features": {"price": 20.0, "colours": ["red"]},
        "author": "shop3",
        "tag": "coats",
        "duration": 7.5,
    }
    one = np.zeros((1, len(log.spec.signals)), np.float32)
    with feedback_log.Writer(folder, log.spec.signals) as writer:
        writer.append({"kind": "item", "time": 0, **item})
        for user in ("u7", "who-2"):
            writer.append(
                {
                    "kind": "rank",
                    "request": f"{user}-0",
                    "user": user,
                    "number": 0,
                    "time": 1_714_521_600_000,
                    "start": True,
                    "history": None,
                    "profile": feedback_log.to_bytes(np.zeros(log.spec.profile), "<f4"),
                    "context": feedback_log.to_bytes(np.zeros(log.spec.context), "<f4"),
                    "candidates": [*known, "i999"],
                    "scores": feedback_log.to_bytes(np.zeros(12), "<f4"),
                    "slate": feedback_log.to_bytes(np.array([11]), "<u2"),
                    "log_propensity": -1.0,
                    "artifact": "a",
                }
            )
            event = {"kind": "feedback", "event": "e", "request": f"{user}-0", "user": user, "time": 1_714_521_600_000}
            said = {"videos": ["i999"], "feedback": feedback_log.to_bytes(one, "<f4"), "left": True}
            writer.append(event | said)


def test_the_context_of_a_source_has_the_names_of_the_log_s_columns(made, tmp_path):
    devices = made["log"].with_columns(device=made["log"]["req"].str.slice(-1))
    schema = dataclasses.replace(tables.SCHEMA, context=("device",))
    SessionLog.from_frame(devices, schema, items=made["items"], quiet=True).save(tmp_path / run_folder.LOG)
    config, log = own_logs.prepare_own_log(CONFIG, tmp_path, SessionLog.open(tmp_path / run_folder.LOG))
    source = restore.open_source(config, None, workdir=tmp_path)
    assert [one["name"] for one in source.names["context"]] == ["hour_sin", "hour_cos", "hours_away", "device"]
    assert source.spec.context == 4 + 11 and source.train().context.shape[1] == 15
    assert (
        source.vocabularies["author"].tolist() == log.vocabularies["author"].tolist() == [f"shop{n}" for n in range(7)]
    )
    kept = inputs.inputs_of_source(source)
    inputs.write_inputs(tmp_path, kept)
    again = inputs.read_inputs(tmp_path)
    assert {name: ids.tolist() for name, ids in again.vocabularies.items()} == {
        name: ids.tolist() for name, ids in log.vocabularies.items()
    }


def test_a_service_s_log_is_learned_from_with_its_new_items_and_users(log, tmp_path):
    log.save(tmp_path / run_folder.LOG)
    served_by_hand(tmp_path / "served", log)
    config, _ = own_logs.prepare_own_log(CONFIG, tmp_path, log)
    config = configs.override(config, data={"served": str(tmp_path / "served")})
    source = restore.open_source(config, None, workdir=tmp_path)
    new = log.spec.num_videos
    assert source.spec.num_videos == source.items.num_videos == new + 1 and source.video_ids()[new] == "i999"
    shop3 = 1 + log.vocabularies["author"].tolist().index("shop3")
    assert (int(source.items.author[new]), int(source.items.tag[new])) == (shop3, 0)  # training has no coats
    other = int(np.flatnonzero(log.item_ids == "i003")[0])  # of the same shop
    assert int(source.items.author[other]) == shop3
    assert int(source.items.embedding_id[new]) == log.items.num_embeddings == source.items.num_embeddings - 1
    columns = [(encoder["name"], i) for encoder in log.encoders["items"] for i in range(width(encoder))]
    features, known = np.asarray(source.items.features)[new], {e["name"]: e for e in log.encoders["items"]}
    price = np.log1p(20.0) if known["price"]["log"] else 20.0
    price = (price - known["price"]["mean"][0]) / known["price"]["std"][0]
    red = known["colours"]["vocabulary"].index("red")
    wanted = [price if c == ("price", 0) else float(c == ("colours", red)) for c in columns]
    np.testing.assert_allclose(features, wanted, rtol=1e-5)
    train = source.train()
    train.validate(source.spec)
    u7 = int(np.flatnonzero(log.user_ids == "u7")[0])
    assert train.user_id.tolist() == [u7, len(log.user_ids)] and source.blocks() is None
    shown = train.candidates[np.arange(2), train.slate[:, 0]]
    assert shown.tolist() == [new, new]


def width(encoder) -> int:
    return len(encoder["mean"]) or len(encoder["vocabulary"]) + 1


def test_a_run_that_fails_before_it_learns_leaves_no_log(log, tmp_path):
    with pytest.raises(KeyError), run_folder.claimed_workdir(tmp_path / "run", {"seed": 0}):
        log.save(tmp_path / "run" / run_folder.LOG)
        raise KeyError
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_log_is_learned_from_and_its_ids_are_ranked(made, log, tmp_path):
    config = configs.override(CONFIG, train={"batch": 16}, feedback={"batch": 16}, data={"statistics": False})
    config, workdir = dataclasses.replace(config, log_every=2, checkpoint_every=5), tmp_path / "x"
    results = train.train_run(config, workdir, brief=True, log=log)
    assert {"like", "report", "watch_time_xauc"} <= results["offline"].keys()
    assert SessionLog.open(workdir / run_folder.LOG).digest() == log.digest()
    moved = shutil.move(workdir, tmp_path / "moved")  # complete, wherever it is
    run = mmrf.load(moved)
    candidates = ["i001", "i003", "never seen", "i010"]
    ranked = run.rank(user="u7", candidates=candidates)
    assert sorted(ranked) == sorted(candidates) and ranked == run.rank(user="u7", candidates=candidates[::-1])
    assert run.rank(user="u7", candidates=candidates, k=2) == ranked[:2]
    assert len(run.rank(user="who", candidates=candidates, history=[("i001", {"like": 1.0, "watch_time": 9.0})])) == 4
    with pytest.raises(ValueError, match="the ids are strings, and 1 is of the integers"):
        run.rank(candidates=[1, 2])
    assert mmrf.make("learned", run=run).slate_size == log.spec.slate  # from the log of the run folder
    simulated = dataclasses.replace(CONFIG, simulator="feedback", simulator_checkpoint=str(moved))  # names no table
    simulated, partitioner = configs.override(simulated, ab_test={"sessions": 8}), Partitioner()
    source = restore.source_of(simulated, partitioner)
    policies = {name: arms.policy_of(name, source, partitioner) for name in ("logged", str(moved))}
    assert simulated_tests.run_ab_test(source, policies, partitioner)["ab_test"].keys() == policies.keys()
    exported = run.export(tmp_path / "artefact")
    assert exported.rank(user="u7", candidates=candidates) == ranked
    assert train.train_run(config, moved, brief=True) == results  # needs no table
    other = SessionLog.from_frame(made["log"].head(500), tables.SCHEMA, items=made["items"], quiet=True)
    with pytest.raises(ValueError, match=r"was made by another config: config.data.digest was "):
        train.train_run(config, moved, brief=True, log=other)


@pytest.mark.slow
def test_a_served_run_learns_from_its_feedback(log, tmp_path):
    """From a training to a service that is asked by name, and from its log, with a new item, to the next training."""
    config = configs.override(CONFIG, train={"batch": 16}, feedback={"batch": 16}, data={"statistics": True})
    config = dataclasses.replace(config, log_every=2, checkpoint_every=5)
    train.train_run(config, tmp_path / "x", brief=True, log=log)
    run = mmrf.load(tmp_path / "x").export(tmp_path / "artefact")
    new = {"id": "i999", "features": {"price": 20.0, "colours": ["red"]}, "author": "shop3", "duration": 7.5}

    async def serve() -> None:
        made = Service(Settings(run.path, tmp_path / "served", temperature=1.0, max_candidates=12))
        await made.start()
        assert await made.add_items([new]) == [True]
        rng = np.random.default_rng(0)
        for user in (*(f"u{n}" for n in range(15)), "who-2"):
            for number in range(6):
                candidates = np.array([*rng.choice(log.item_ids[1:], 11, replace=False), "i999"])
                context = {"hour_sin": 0.5, "hours_away": 1.0}
                slate = await made.rank(Asked(user, candidates, context, 4, profile={"country": "fr"}))
                assert not slate.unknown and slate.log_propensity < 0.0
                feedback = (rng.random((4, len(log.spec.signals))) < 0.4).astype(np.float32)
                await made.feedback(f"{number}", slate.request, slate.videos, feedback, number == 5)
        await made.close()

    asyncio.run(serve())
    again = configs.override(config, data={"served": str(tmp_path / "served")})
    results = train.train_run(again, tmp_path / "again", brief=True, log=log)
    assert results["train"]["requests_of_last_round"] == 96
    ranked = mmrf.load(tmp_path / "again")
    rows = inputs.read_inputs(tmp_path / "again")
    assert rows.video_ids[-1] == "i999" and rows.num_statistics == statistics.num_features(log.spec.signals)
    assert sorted(ranked.rank(["i999", "i003"], user="u7")) == ["i003", "i999"]
