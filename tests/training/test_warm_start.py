"""A run that begins with what another has learned: which rows and parameters, and what is refused."""

import dataclasses
import json

import exporting
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mmrf_jax.models import embedding_table
from mmrf_jax.parallel.partitioner import Partitioner
from mmrf_jax.training import configs, inputs, restore, run_folder, steps, warm_start
from mmrf_jax.training.train_state import TrainState

PARTITIONER = Partitioner.local()


def table(rows: int, dim: int = 2, first: float = 0.0, vocabulary: int = 0) -> embedding_table.Table:
    values = first + jnp.arange(rows * dim, dtype=jnp.float32).reshape(rows, dim)
    return embedding_table.Table(values, first + jnp.arange(rows, dtype=jnp.float32), vocabulary)


def known(ids, author, tag=None, embedding=None, duration=None, users=0) -> inputs.Inputs:
    """Inputs of videos with these ids; None for row numbers."""
    n = len(author)
    author = np.asarray(author, np.int32)
    items = dataclasses.replace(
        tiny.make_items(),
        author=author,
        tag=np.asarray(author if tag is None else tag, np.int32),
        duration=np.asarray(np.arange(n) if duration is None else duration, np.float32),
        embedding_id=np.asarray(np.arange(n) if embedding is None else embedding, np.int32),
    )
    ids = None if ids is None else np.asarray(ids)
    return inputs.Inputs(dataclasses.replace(tiny.SPEC, num_users=users), items, ids)


def test_videos_are_matched_by_the_platform_s_ids():
    old, new = known([10, 20, 30], [1, 2, 3], users=4), known([30, 40, 10], [7, 8, 9], users=6)
    pairs = warm_start.shared_ids(new, old, users=True)
    assert {tuple(x) for x in np.stack(pairs["id"], axis=1)} == {(0, 2), (2, 0)}
    assert {tuple(x) for x in np.stack(pairs["author"], axis=1)} == {(7, 3), (9, 1)}
    np.testing.assert_array_equal(pairs["user"], [np.arange(4)] * 2)
    assert not len(warm_start.shared_ids(new, old, users=False)["user"][0])
    for other in (known(["10", "20", "30"], [1, 2, 3]), known(None, [1, 2, 3])):  # texts, and row numbers
        assert not any(len(here) for here, _ in warm_start.shared_ids(new, other, users=True).values())


def test_row_numbers_are_ids_where_the_videos_are_the_same():
    old = known(None, [1, 2, 3], duration=[5.0, 6.0, 7.0])
    new = known(None, [1, 2, 3, 4], duration=[5.0, 6.5, 7.0, 8.0])
    here, there = warm_start.shared_ids(new, old, users=True)["id"]
    assert here.tolist() == there.tolist() == [0, 2]


def test_rows_match_if_each_is_the_other_s_most_frequent_partner():
    # Unknown videos share row 0. Of the old row 0, videos 3 and 4 are now known, and two are still unknown.
    here, there = np.array([0, 0, 5, 3, 4]), np.array([0, 0, 2, 0, 0])
    at, source = warm_start.matching_rows(table(6), table(3), here, there)
    assert sorted(zip(at.tolist(), source.tolist(), strict=True)) == [(0, 0), (5, 2)]
    at, source = warm_start.matching_rows(table(6), table(3), np.array([1, 9]), np.array([-1, 1]))  # ids without a row
    assert not len(at) and not len(source)
    hashed = table(8, vocabulary=1_000)
    ids = np.arange(0, 1_000, 37)
    at, source = warm_start.matching_rows(hashed, hashed, ids, ids)
    assert at.tolist() == source.tolist()
    assert set(at.tolist()) == set(np.asarray(embedding_table.row_of(hashed, jnp.asarray(ids, jnp.int32))).tolist())


def test_rows_of_known_ids_are_kept_and_new_ones_are_fresh():
    new, old, report = {"id": table(5, first=100.0)}, {"id": table(3)}, warm_start._Report()
    pairs = {"id": (np.array([4, 1]), np.array([0, 2]))}
    before, known_rows = jax.device_get(new), jax.device_get(old)
    merged = jax.device_get(warm_start._merge_tables("agents", new, old, pairs, report))["id"]
    for row, source in ((4, 0), (1, 2)):
        np.testing.assert_array_equal(merged.rows[row], known_rows["id"].rows[source])
        assert merged.accumulator[row] == known_rows["id"].accumulator[source]
    for row in (0, 2, 3):
        np.testing.assert_array_equal(merged.rows[row], before["id"].rows[row])
        assert merged.accumulator[row] == before["id"].accumulator[row]
    assert str(report) == "0 arrays copied, none fresh; rows copied: agents/id 2 of 5"
    wide = {"id": table(5, dim=3)}
    assert warm_start._merge_tables("agents", wide, old, pairs, report)["id"] is wide["id"]
    assert report.fresh == ["agents/tables/id"]


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A finished run of the tiny agents, whose state is not read from a checkpoint."""
    plan, state = exporting.planned()
    config = configs.Run(init_from=str(tmp_path / "old"))
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(configs.as_dict(dataclasses.replace(config, init_from=None))))
    (folder / "learned.json").write_text(json.dumps({"steps": 3, "rounds": 3}))
    items = tiny.make_items()
    inputs.write_inputs(folder, inputs.Inputs(tiny.SPEC, items, np.arange(items.num_videos)))
    monkeypatch.setattr(restore, "load_state", lambda *_: state)
    return config, plan, state, folder


def fresh(plan: steps.TrainConfig) -> TrainState:
    """A state whose numbers are all -1."""

    def start():
        ones = jnp.ones(tiny.S)
        return steps.init_train_state(jax.random.key(0), plan, tiny.SPEC, tiny.make_items(), ones, ones, ones)

    def fill(x):
        return jax.random.key(1) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else jnp.full(x.shape, -1, x.dtype)

    return jax.tree.map(fill, jax.eval_shape(start))


def test_what_was_learned_is_copied_and_the_rest_is_fresh(finished, capsys):
    config, plan, state, _ = finished
    items = tiny.make_items()
    ids = np.where(np.arange(items.num_videos) < 20, np.arange(items.num_videos), 1_000 + np.arange(items.num_videos))
    begun = warm_start.begin_from_run(config, inputs.Inputs(tiny.SPEC, items, ids), fresh(plan), PARTITIONER)
    for part, names in (("agents", warm_start._AGENTS), ("feedback", warm_start._MODEL)):
        for name in names:
            a, b = getattr(getattr(begun, part), name), getattr(getattr(state, part), name)
            jax.tree.map(np.testing.assert_array_equal, a, b)
    for name, source in state.agents.tables.items():
        rows = np.asarray(begun.agents.tables[name].rows)
        kept = (rows == np.asarray(source.rows)).all(axis=1)
        assert ((rows == -1).all(axis=1) | kept).all(), name
        if name == "id":
            assert kept[np.asarray(items.embedding_id)[:20]].all() and kept.sum() == 20
        if name == "user":
            assert kept.all()
    assert int(begun.agents.step) == int(begun.round) == -1
    assert all(float(x.max()) == -1.0 for x in jax.tree.leaves(begun.agents.optimizer))
    line, authors = capsys.readouterr().err, np.asarray(items.author)
    assert len(set(authors[:20])) == 5 and len(set(authors)) == 6  # one author has no video that both runs know
    assert f"init_from {config.init_from}: " in line and "none fresh; rows copied: agents/author 5 of 6" in line
    assert "agents/id 20 of 31" in line and line.count("\n") == 1


def test_parameters_of_other_shapes_stay_fresh_and_are_listed(finished, capsys):
    config, plan, state, _ = finished
    wider = dataclasses.replace(plan, agents=dataclasses.replace(plan.agents, state_dim=12))
    items = tiny.make_items()
    new = inputs.Inputs(tiny.SPEC, items, np.arange(items.num_videos))
    begun = warm_start.begin_from_run(config, new, fresh(wider), PARTITIONER)
    line = capsys.readouterr().err
    same = fresh(wider).agents.params
    old = dict(jax.tree_util.tree_leaves_with_path(state.agents.params))
    listed = 0
    for path, shape in jax.tree_util.tree_leaves_with_path(same):
        value = dict(jax.tree_util.tree_leaves_with_path(begun.agents.params))[path]
        if path in old and old[path].shape == shape.shape:
            np.testing.assert_array_equal(value, old[path])
        else:
            assert (np.asarray(value) == -1).all()
            module = jax.tree_util.keystr(path[:-1], simple=True, separator="/")
            assert f"agents/params/{module}" in line
            listed += 1
    assert 0 < listed < len(old)


def test_agents_of_other_signals_keep_no_actors_and_critics(finished, capsys):
    config, plan, state, _ = finished
    other = configs.override(config, agents={"signals": ("like", "follow", "watch_time")})
    items = tiny.make_items()
    begun = warm_start.begin_from_run(
        other, inputs.Inputs(tiny.SPEC, items, np.arange(items.num_videos)), fresh(plan), PARTITIONER
    )
    assert all((np.asarray(x) == -1).all() for x in jax.tree.leaves(begun.agents.params["actor"]))
    jax.tree.map(np.testing.assert_array_equal, begun.agents.params["encoder"], state.agents.params["encoder"])
    assert "agents/params/critic/params" in capsys.readouterr().err


def test_runs_that_cannot_be_started_from_are_refused(finished, tmp_path):
    config, _, _, folder = finished
    warm_start.check_init_from(config, tmp_path / "new")
    warm_start.check_init_from(dataclasses.replace(config, init_from=None), folder)
    with pytest.raises(ValueError, match=r"^init_from=.*old is the run folder itself; use another workdir"):
        warm_start.check_init_from(config, tmp_path / "new" / ".." / "old")
    with pytest.raises(ValueError, match=r"nosuch is not a run folder: it has no config\.json"):
        warm_start.check_init_from(dataclasses.replace(config, init_from=str(tmp_path / "nosuch")), tmp_path / "new")
    (folder / "learned.json").unlink()
    with pytest.raises(ValueError, match=r"^init_from=.*old has not finished training; finish it first: mmrf train"):
        warm_start.check_init_from(config, tmp_path / "new")
    (tmp_path / "new" / "checkpoints" / "5").mkdir(parents=True)  # the new run has begun: it needs the old one no more
    warm_start.check_init_from(config, tmp_path / "new")


def test_only_a_finished_run_takes_more_rounds(tmp_path):
    def config(rounds: int, seed: int = 0) -> dict:
        return {"seed": seed, "alternation": {"rounds": rounds}}

    run_folder.claim_workdir(tmp_path, config(2))
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"config\.alternation\.rounds was 2, now 3; use another --workdir or the old"):
        run_folder.claim_workdir(tmp_path, config(3))
    for name in ("learned.json", *run_folder._OF_RESULTS, "metrics.jsonl"):
        (tmp_path / name).write_text(json.dumps({"rounds": 2}))
    run_folder.claim_workdir(tmp_path, config(2))
    assert not run_folder.needs_more_rounds(tmp_path, config(2)) and (tmp_path / "results.json").exists()
    with pytest.raises(ValueError, match=r"config\.seed was 0, now 1"):
        run_folder.claim_workdir(tmp_path, config(3, seed=1))
    with pytest.raises(ValueError, match=r"config\.alternation\.rounds was 2, now 1"):
        run_folder.claim_workdir(tmp_path, config(1))
    assert run_folder.needs_more_rounds(tmp_path, config(3))
    run_folder.claim_workdir(tmp_path, config(3))
    assert run_folder.read_config(tmp_path) == config(3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "config.json", "metrics.jsonl"]


def test_a_process_that_was_killed_before_it_removed_old_results_is_made_up_for(tmp_path):
    """config.json says 3 rounds already, learned.json still 2."""
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    (tmp_path / "config.json").write_text(json.dumps({"alternation": {"rounds": 3}}))
    for name in ("learned.json", "results.json"):
        (tmp_path / name).write_text(json.dumps({"rounds": 2}))
    assert run_folder.needs_more_rounds(tmp_path, {"alternation": {"rounds": 3}})
    run_folder.claim_workdir(tmp_path, {"alternation": {"rounds": 3}})
    assert not (tmp_path / "results.json").exists() and not (tmp_path / "learned.json").exists()
