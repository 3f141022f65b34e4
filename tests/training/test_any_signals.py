"""A run on logs whose signals are not those of short videos, from training to the service and back."""

import asyncio
import dataclasses
import functools
import json
import re

import any_signals
import jax
import numpy as np
import pytest
import random_logs

import mmrf_jax as mmrf
from mmrf_jax.abtest import statistics, summary
from mmrf_jax.agents.mmrf.config import AgentConfig
from mmrf_jax.data.readers import feedback_log, feedback_sessions
from mmrf_jax.io.progress import counted
from mmrf_jax.parallel.partitioner import Partitioner
from mmrf_jax.serving import api
from mmrf_jax.serving.service import Asked, Service, Settings
from mmrf_jax.training import arms, config_sections, configs, log_source, restore, simulated_tests, sources, train

SMALL = {"dim": 12, "id_dim": 4}
IDS = 7 * np.arange(random_logs.SPEC.num_videos, dtype=np.int64) + 1_000


def make_config(**changes) -> configs.Run:
    sizes = {"candidates": 10, "slate": 3, "history": 5, "statistics": False}
    run = configs.Run(
        source="kuairand",  # any source of logs alone
        world=None,
        data=config_sections.KuaiRandData(dir="logs", **sizes),
        alternation=config_sections.Alternation(rounds=1, closed_loop=False),
        feedback=config_sections.Feedback(**SMALL, batch=16),
        agents=AgentConfig(**SMALL, counterfactual_weight=1.0),
        train=config_sections.Train(batch=16, segment=3, candidates=0),
        ab_test=config_sections.ABTest(sessions=64, arms=("logged", "random")),
        log_every=1,
    )
    return dataclasses.replace(run, **changes)


@pytest.fixture(params=["one", pytest.param("three", marks=pytest.mark.nightly), "twelve"])  # twelve have all kinds
def signals(request):
    return any_signals.ALL[request.param]


@pytest.fixture
def source_of_logs(signals, monkeypatch):
    """Logs of these signals, where a run expects KuaiRand's."""

    def make(config):
        sizes = {"train": 80, "valid": 40, "test": 40}
        logs = {
            name: functools.partial(any_signals.make_log, seed, number, signals, scores=False)
            for seed, (name, number) in enumerate(sizes.items())
        }
        return sources.Source(
            items=jax.tree.map(jax.numpy.asarray, random_logs.make_items()),
            spec=any_signals.make_spec(signals),
            train=logs["train"],
            valid=logs["valid"],
            test=lambda: {"test": logs["test"]()},
            config=config,
            video_ids=lambda: IDS,
        )

    monkeypatch.setattr(log_source, "of_kuairand", make)


async def visit(settings: Settings, signals, number: int) -> None:
    """A user who asks `number` times, and tells what its kinds allow."""
    rng, service = np.random.default_rng(0), Service(settings)
    await service.start()
    for i in range(number):
        slate = await service.rank(Asked(5, IDS[rng.permutation(50)[:12]], rng.normal(size=1).astype(np.float32), k=3))
        reported = any_signals.make_feedback(rng, (3,), signals)
        await service.feedback(str(i), slate.request, slate.videos, reported, left=i == number - 1)
    await service.close()


@pytest.mark.slow
def test_from_logs_to_the_service_and_back(signals, source_of_logs, tmp_path):
    config, partitioner, spec = make_config(), Partitioner(), any_signals.make_spec(signals)
    result = train.train_run(config, tmp_path / "run")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Ranking of held-out sessions" in page
    assert bool(re.search(r'"seconds": ?null', page)) == (not signals.of_kind("duration"))  # of the explorer
    assert set(result["model_quality"]) == set(signals.names)
    numeric = {f"{name}_{kind}" for name in signals.numeric_names for kind in ("median", "xauc")}
    assert set(result["offline"]) == {*signals.binary_names, *numeric}
    assert json.loads((tmp_path / "run" / "results.json").read_text())["signals"] == signals.as_dict()

    # An A/B test in the learned environment.
    learned = make_config(simulator="feedback", simulator_checkpoint=str(tmp_path / "run"))
    source = restore.source_of(learned, partitioner)
    own = arms.policy_of(str(tmp_path / "run"), source, partitioner)
    tested = simulated_tests.run_ab_test(source, source.policies | {"mmrf": own}, partitioner)
    assert set(signals.names) <= set(tested["ab_test"]["mmrf"]) and summary.describe(tested)
    assert statistics.main_metric(tested) == signals.main

    # An artefact, the service, and its log as sessions.
    run = mmrf.load(tmp_path / "run").export(tmp_path / "artefact")
    history = [(int(IDS[3]), dict.fromkeys(signals.names, 1))]
    assert sorted(run.rank(IDS[:6].tolist(), history=history)) == IDS[:6].tolist()
    models = api.models(spec, 12)
    event = {"event_id": "a", "request_id": "5-0", "videos": [{"video": 7} | dict.fromkeys(signals.names, 1)]}
    assert models.feedback.model_validate(event).videos[0].video == 7
    asyncio.run(visit(Settings(tmp_path / "artefact", tmp_path / "served", max_candidates=12), signals, 4))
    log, report = feedback_sessions.read(tmp_path / "served", spec, feedback_log.rows_by_id(IDS), counted)
    log.validate(spec)
    assert (log.num_sessions, log.num_requests, report["feedback"]) == (1, 4, 4)
    rng, reported = np.random.default_rng(0), []
    for _ in range(4):
        rng.permutation(50), rng.normal(size=1)
        reported.append(any_signals.make_feedback(rng, (3,), signals))
    np.testing.assert_array_equal(log.feedback, np.stack(reported))
