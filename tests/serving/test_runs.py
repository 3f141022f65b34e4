"""Runs from Python: configs, results, and ranking with an artefact."""

import json
from types import SimpleNamespace

import exporting
import numpy as np
import pytest
import tiny

import mmrf_jax as mmrf
from experiments import world
from mmrf_jax import runs
from mmrf_jax.serving import artifact, export, ranker
from mmrf_jax.signals import SHORT_VIDEO
from mmrf_jax.training import configs

IDS = exporting.VIDEO_IDS


@pytest.fixture(autouse=True)
def once_compiled(compiled, monkeypatch):
    """Runs share compiled rankers, as services do."""
    monkeypatch.setattr(runs, "ranker", SimpleNamespace(**vars(ranker) | {"Ranker": compiled}))


@pytest.fixture(scope="module")
def run(once):
    return mmrf.load(once("mmrf", lambda folder: exporting.exported(folder / "mmrf")) / "mmrf")


def test_ranks_ids_as_the_service_scores_them(run, compiled):
    candidates = [int(x) for x in IDS[[5, 17, 3, 29, 8]]]
    history = [(int(IDS[2]), {"click": 1.0, "watch_time": 9.0}), (4, {"click": 1.0}), (int(IDS[9]), {"like": 1.0})]
    profile = list(np.linspace(-1.0, 1.0, tiny.SPEC.profile))
    ranked = run.rank(candidates, user=3, history=history, profile=profile)
    feedback = np.zeros((2, len(SHORT_VIDEO)), np.float32)  # of the videos that are known
    feedback[0, 0], feedback[0, SHORT_VIDEO.index("watch_time")], feedback[1, SHORT_VIDEO.index("like")] = 1.0, 9.0, 1.0
    serving = compiled(artifact.load(run.path), 8, runs._NEW_ITEMS)
    job = ranker.Job(
        3,
        np.float32(profile),
        np.zeros(tiny.SPEC.context, np.float32),
        np.array([5, 17, 3, 29, 8]),
        None,
        [ranker.Seen(np.array([2, 9]), feedback, None)],
    )
    scores = serving.run([job])[0][0][-1]
    assert ranked == [candidates[i] for i in np.argsort(-scores)] and type(ranked[0]) is int
    assert run.rank(candidates, user=3, history=history, profile=profile, k=2) == ranked[:2]
    requests = [{"candidates": candidates, "user": 3, "history": history, "profile": profile}, {"candidates": IDS[:3]}]
    both = run.rank_batch(requests)
    assert both[0] == ranked and both[1] == run.rank(IDS[:3]) and set(both[1]) == set(IDS[:3])


def test_unknown_videos_of_a_history_are_counted_once(run, capsys):
    run.__dict__.pop("_said", None)
    history = [(int(IDS[2]), {"click": 1.0}), (4, {"click": 1.0}), (5, {})]
    left, known = (run.rank(IDS[:5].tolist(), history=h) for h in (history, history[:1]))
    assert left == known
    said = capsys.readouterr().err
    assert said.startswith(f"history: 2 of 3 videos are not of {run.path} and are left out, the first is 4;")
    assert said.count("\n") == 1
    run.rank(IDS[:5].tolist(), history=history[1:])
    assert capsys.readouterr().err == ""


def test_ids_of_any_type_and_users_of_the_log(tmp_path, compiled):
    plan, state = exporting.planned()
    names = np.array(["", *(f"item {n}" for n in range(1, tiny.SPEC.num_videos))])
    profiles = np.float32([[0, 0, 0], [1, 2, 3], [3, 1, -2]])
    users = {"user_id": np.array([-(2**63), 2**40, 2**40 + 1]), "profile": profiles}
    about = {"config": {"method": "mmrf"}, "unknown_video": 0}
    export.export_run(tmp_path / "a", plan, tiny.SPEC, tiny.make_items(), names, state, about, users)
    run, given = mmrf.load(tmp_path / "a"), ["item 5", "item 17", "new", "item 3"]
    serving = compiled(artifact.load(run.path), 4, runs._NEW_ITEMS)
    for user, number in ((2**40 + 1, 2), (7, 0), (None, 0)):
        job = ranker.Job(
            number,
            profiles[number],
            np.zeros(tiny.SPEC.context, np.float32),
            np.array([5, 17, 0, 3]),
            None,
            (),
        )
        best = np.argsort(-serving.run([job])[0][0][-1])
        assert run.rank(given, user=user) == [given[i] for i in best]
    with pytest.raises(ValueError, match="the ids are strings, and 3 is of the integers; give ids in their type"):
        run.rank([3, 4])
    with pytest.raises(ValueError, match="the ids are integers, and 'u7' is of the strings"):
        run.rank(given, user="u7")


def test_new_items_and_names(named):
    run = mmrf.load(named)
    new = {"id": "new", "features": {"price": 6.0, "age": 3.0}, "author": "shop b", "tag": 10, "duration": 12.5}
    ranked = run.rank(["item 5", "new"], "ann", profile={"points": 3, "sex": "f"}, context={"hour": 0.5}, items=[new])
    loaded = artifact.load(run.path)
    catalogue = loaded.arrays["catalogue"]
    catalogue["author"][7], catalogue["tag"][7], catalogue["embedding_id"][7] = 2, 1, 0
    catalogue["features"][7] = [(6.0 - 2.0) / 4.0, np.log1p(3.0) / 2.0]
    job = ranker.Job(1, np.float32([2, 1, 0]), np.float32([0.5, 0.0]), np.array([5, 7]), None, ())
    scores = ranker.Ranker(loaded, 2).run([job])[0][0][-1]
    assert ranked == [["item 5", "new"][i] for i in np.argsort(-scores)]
    assert "new" in run.rank(["item 3", "item 4", "new"])  # it is known from now on
    assert run._rankers[4].rows_of(np.array(["new", "newer"])).tolist() == [tiny.SPEC.num_videos, -1]
    with pytest.raises(ValueError, match="profile: no feature is called 'point'; did you mean 'points'"):
        run.rank(["item 5"], profile={"point": 1})
    with pytest.raises(ValueError, match="features has 1 numbers"):
        run.rank(["item 5"], items=[{"id": "other", "features": [1.0]}])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"candidates": [1, 2]}, "candidate 1 is no video of"),
        ({"candidates": [int(IDS[0])] * 2}, "candidates repeat a video"),
        ({"candidates": [int(IDS[0])], "profile": [1.0]}, r"profile has shape \(1,\); the model has"),
        ({"candidates": [int(IDS[0])], "history": [(int(IDS[1]), {"clik": 1.0})]}, "clik"),
        ({"candidates": [int(IDS[0])], "history": [int(IDS[1])]}, r"history\[0\] is \d+; give pairs such as \('a', "),
        ({"candidates": [int(IDS[0])], "history": [(int(IDS[1]), 1.0)]}, r"history\[0\] is \(\d+, 1.0\); give pairs"),
        ({"candidates": "abc"}, "candidates is 'abc'; give a list of ids"),
        ({"candidates": None}, "candidates is None; give a list of ids"),
    ],
)
def test_requests_that_cannot_be_are_refused(run, given, message):
    with pytest.raises(ValueError, match=message):
        run.rank(**given)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"k": 2}, r"requests\[1\] has 'k'; k is an argument of rank_batch"),
        ({"User": 2}, r"requests\[1\] has 'User'; did you mean user\?"),
        ({"candidates": None}, "candidates is None; give a list of ids"),
    ],
)
def test_requests_of_a_batch_have_the_arguments_of_rank(run, request_, message):
    given = {"candidates": [int(IDS[0])]}
    with pytest.raises(ValueError, match=message):
        run.rank_batch([given, given | request_])


def test_what_is_loaded_says_what_it_is(run, tmp_path):
    assert run.exported and run.config == {"method": "mmrf"} and run.results == {}
    with pytest.raises(ValueError, match="is an artefact already"):
        run.export(tmp_path / "again")
    with pytest.raises(ValueError, match="out=~no-such-user/again: there is no such home folder"):
        run.export("~no-such-user/again")
    with pytest.raises(ValueError, match="is not a run folder"):
        mmrf.load(tmp_path)
    with pytest.raises(ValueError, match=r"there is no folder nowhere in /.*; name a run folder"):
        mmrf.load("nowhere")
    (tmp_path / "config.json").write_text(json.dumps({"seed": 4}))
    (tmp_path / "results.json").write_text(json.dumps({"train": {"steps": 2}}))
    loaded = mmrf.load(str(tmp_path))
    assert not loaded.exported and loaded.config == {"seed": 4} and loaded.results == {"train": {"steps": 2}}


def test_configs_by_name_path_and_object(tmp_path):
    wanted = configs.run_of(world.get_config().to_dict())
    assert runs._config("world", {}) == wanted != configs.Run() == runs._config(configs.Run(), {})
    assert runs._config(world.get_config(), {}) == wanted
    file = tmp_path / "mine.py"
    file.write_text("from experiments import world\n\n\ndef get_config():\n    return world.get_config()\n")
    quick = runs._config(file, {"quick": True, "train": {"batch": 16}})
    assert quick.quick and quick.train.batch == 16 and quick.world is not None and quick.world.num_videos == 5_000
    with pytest.raises(ValueError, match="did you mean batch"):
        runs._config("world", {"train": {"bacth": 16}})
    with pytest.raises(ValueError, match="did you mean quick"):
        runs._config("world", {"quik": True})
    with pytest.raises(ValueError, match=r"config=nosuch\.py cannot be read"):
        runs._config("nosuch.py", {})
