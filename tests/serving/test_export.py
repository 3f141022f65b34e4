"""An exported run says what the live one says, for any sizes; what is wrong with an artefact is one clear error."""

import dataclasses
import datetime
import hashlib
import json
import shutil
from pathlib import Path

import exporting
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mmrf_jax import types
from mmrf_jax.agents import registry
from mmrf_jax.agents.mmrf import policy
from mmrf_jax.envs import learned
from mmrf_jax.models import user_encoders
from mmrf_jax.models.feedback_model import network
from mmrf_jax.serving import artifact, export


def asked(users: int, candidates: int, shown: int, seed: int = 0):
    """Random histories, and requests whose candidates are all different."""
    rng = np.random.default_rng(seed)
    spec = tiny.SPEC
    history = types.Exposure(
        videos=rng.integers(0, spec.num_videos, (users, shown)).astype(np.int32),
        feedback=tiny.make_feedback(rng, (users, shown)),
        mask=rng.random((users, shown)) < 0.8,
    )
    request = types.Request(
        user_id=np.arange(users, dtype=np.int32),
        profile=rng.normal(size=(users, spec.profile)).astype(np.float32),
        context=rng.normal(size=(users, spec.context)).astype(np.float32),
        candidates=rng.random((users, spec.num_videos)).argsort(-1)[:, :candidates].astype(np.int32),
    )
    return request, history


def as_dict(x) -> dict:
    return {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}


def arguments(request: types.Request) -> tuple[dict, np.ndarray]:
    """The request, and that all of its candidates are there."""
    return as_dict(request), np.ones(request.candidates.shape, bool)


def call(loaded: artifact.Artifact, request: types.Request, history: types.Exposure, prefix: str = ""):
    """Encodings, memory and shown exposures by the exported functions."""
    group = "model" if prefix else "policy"
    weights = artifact.nested(loaded.arrays[group])
    items = loaded.arrays["catalogue"]
    video = {name: items[name] for name in ("author", "tag", "embedding_id", "features")}
    encodings = jax.jit(loaded.functions[prefix + "encode"].call)(weights, video)
    lead, spec = (len(request.user_id), *([2] if prefix else [])), loaded.spec
    shapes = loaded.manifest["model_carry" if prefix else "carry"]
    memory = {name: np.zeros((*lead, *shape), np.float32) for name, shape in shapes.items()}
    shown = {name: user_encoders.in_requests(x, spec.slate, 1) for name, x in as_dict(history).items()}
    none = np.zeros((*shown["mask"].shape[:2], spec.context), np.float32)
    shown |= {"duration": items["duration"][shown["videos"]], "context": none}
    memory = jax.jit(loaded.functions[prefix + "observe"].call)(weights, memory, encodings, shown)
    return weights, encodings, memory


def served(live, request: types.Request, history: types.Exposure):
    """What a policy scores the first request of a session."""

    def score(params, request, history):
        return live.score(params, live.start(params, request, history), request)

    return jax.jit(score)(live.params, request, history)


@pytest.mark.parametrize(("users", "candidates", "shown"), [(1, 1, 1), (16, 30, 11)])
def test_exported_scores_are_the_live_ones(mmrf, users, candidates, shown):
    plan, state, folder = mmrf
    loaded = artifact.load(folder)
    request, history = asked(users, candidates, shown)
    weights, encodings, memory = call(loaded, request, history)
    scores = jax.jit(loaded.functions["score"].call)(weights, memory, encodings, *arguments(request))

    live = registry.get("mmrf").make_policy(state.agents, tiny.make_items(), plan.agents)

    @jax.jit
    def serve(params, request, history):
        carry = live.start(params, request, history)
        return carry.outer, policy.all_scores(plan.agents, params, carry, request), live.score(params, carry, request)

    outer, every, main = serve(live.params, request, history)
    assert scores.shape == (users, len(plan.agents.agent_signals), candidates)
    np.testing.assert_allclose(memory["outer"], outer, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(every[:, -1], main, rtol=1e-6)
    np.testing.assert_allclose(scores, every, rtol=1e-5, atol=1e-5)
    assert np.asarray(scores).std(axis=-1).min() > 1e-3 or candidates == 1  # agents tell candidates apart


def test_no_path_of_the_exporting_machine_is_in_an_artefact(mmrf):
    checkout, libraries = Path(artifact.__file__).parents[2], Path(jax.__file__).parents[1]
    for path in mmrf[2].rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert str(checkout).encode() not in data and str(libraries).encode() not in data, path
    assert b"export.py" in (mmrf[2] / "functions" / "score.bin").read_bytes()  # the bare names are there
    assert jax.config.jax_hlo_source_file_canonicalization_regex is None


def test_padding_changes_no_score(mmrf):
    loaded = artifact.load(mmrf[2])
    request, history = asked(4, 20, 5, seed=2)
    weights, encodings, memory = call(loaded, request, history)
    score = jax.jit(loaded.functions["score"].call)
    there = np.arange(20) < np.array([20, 13, 6, 1])[:, None]
    padded = np.asarray(score(weights, memory, encodings, as_dict(request), there))
    for u, number in enumerate(there.sum(axis=1)):
        few = request.replace(candidates=request.candidates[:, :number])
        alone = np.asarray(score(weights, memory, encodings, *arguments(few)))
        np.testing.assert_allclose(padded[u, :, :number], alone[u], rtol=1e-5, atol=1e-5)
    assert np.abs(padded - np.asarray(score(weights, memory, encodings, *arguments(request)))).max() > 0.01


@pytest.mark.parametrize("method", ["ltr", "wide_deep", "td3_bc"])
def test_other_methods_rank_as_they_do_live(tmp_path, method):
    plan, state, folder = exporting.exported(tmp_path / method, method)
    loaded = artifact.load(folder)
    assert "model_predict" not in loaded.functions
    request, history = asked(5, 9, 6)
    weights, encodings, memory = call(loaded, request, history)
    scores = np.asarray(jax.jit(loaded.functions["score"].call)(weights, memory, encodings, *arguments(request)))[:, -1]
    live = registry.get(method).make_policy(state.agents, tiny.make_items(), plan.agents)
    wanted = np.asarray(served(live, request, history))

    def unit(x):
        return (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)

    np.testing.assert_allclose(unit(scores), unit(wanted), rtol=1e-4, atol=1e-4)  # a policy may scale what it serves


@pytest.mark.parametrize(("users", "candidates", "shown"), [(7, 20, 5)])
def test_the_feedback_model_predicts_as_it_does_live(mmrf, users, candidates, shown):
    plan, state, folder = mmrf
    loaded = artifact.load(folder)
    request, history = asked(users, candidates, shown, seed=1)
    weights, encodings, memory = call(loaded, request, history, "model_")
    exposed = np.zeros((users, candidates), np.float32)
    exposed[:, :3] = 1.0
    out = jax.jit(loaded.functions["model_predict"].call)(weights, memory, encodings, as_dict(request), exposed)

    pool = dataclasses.make_dataclass("Pool", ["user_id", "profile", "context", "candidates"])
    at = dataclasses.make_dataclass("State", ["row", "session", "position", "memory"])
    items, each = tiny.make_items(), np.arange(users)

    @jax.jit
    def live(model, request, history):
        known = network.encode_items(model, items, plan.feedback)
        params = learned.FeedbackParams(
            params=model.params,
            encodings=known,
            users=network.twin_rows({"user": model.tables["user"].rows})["user"],
            items=items,
            scale=model.scale,
            calibration=model.calibration,
            edges=model.edges,
            quantiles=model.quantiles,
            pool=pool(*as_dict(request).values()),
            config=plan.feedback,
            max_requests=8,
            answers="expected",
        )
        carried = learned._start(params, history)
        here = at(each, each, jnp.expm1(request.context[:, -1]), carried)
        predicted = learned.predict(params, here, request.candidates)
        stay = network.continue_prob(predicted, exposed)
        return known, carried.outer, network.expected(plan.feedback, predicted, model.scale), stay

    known, outer, feedback, stay = live(state.feedback, request, history)
    np.testing.assert_allclose(encodings, known, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(memory["outer"], outer, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out["feedback"], feedback, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out["continue_prob"], stay, rtol=1e-5, atol=1e-6)


def test_what_an_artefact_holds(mmrf):
    plan, _, folder = mmrf
    loaded = artifact.load(folder, tiny.SPEC)
    assert loaded.spec == tiny.SPEC
    assert loaded.manifest["agents"] == list(plan.agents.agent_signals)
    assert loaded.manifest["libraries"]["jax"] == jax.__version__
    np.testing.assert_array_equal(loaded.arrays["catalogue"]["video_id"], exporting.VIDEO_IDS)
    assert {"policy", "model", "catalogue"} == set(loaded.arrays)
    for function in loaded.functions.values():
        assert set(function.platforms) == {"cpu", "cuda", "tpu"}
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".sha256", ".bin", ".npz"}
    for path in files:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:  # an array of objects would be a pickle
                assert all(arrays[name].dtype.kind in "bif" for name in arrays.files)
    with pytest.raises(FileExistsError, match="export to another folder"):
        artifact.write(folder, {}, {}, tiny.SPEC, {})


def damaged(folder: Path, into: Path) -> Path:
    shutil.copytree(folder, into)
    return into


@pytest.mark.parametrize("name", ["functions/score.bin", "arrays/policy.npz", "arrays/catalogue.npz"])
@pytest.mark.parametrize("how", ["missing", "shorter", "flipped"])
def test_damage_is_found(mmrf, tmp_path, name, how):
    folder = damaged(mmrf[2], tmp_path / "copy")
    path = folder / name
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "shorter":
        path.write_bytes(content[:-1])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    said = {"missing": "is missing", "shorter": f"has {len(content) - 1} bytes", "flipped": "is damaged"}[how]
    with pytest.raises(artifact.ArtifactError, match=f"{name}.*{said}.*export the run again"):
        artifact.load(folder)


def rewrite(folder: Path, **fields) -> None:
    manifest = json.loads((folder / artifact.MANIFEST).read_text())
    content = json.dumps(manifest | fields)
    (folder / artifact.MANIFEST).write_text(content)
    (folder / "manifest.sha256").write_text(hashlib.sha256(content.encode()).hexdigest())


def test_what_is_expired_or_of_another_kind_is_refused(mmrf, tmp_path):
    folder = damaged(mmrf[2], tmp_path / "copy")
    yesterday = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    rewrite(folder, expires=yesterday.isoformat())
    with pytest.raises(artifact.ArtifactError, match=f"expired on {yesterday:%Y-%m-%d}.*export the run again"):
        artifact.load(folder)
    rewrite(folder, expires=(yesterday + datetime.timedelta(days=2)).isoformat(), version=99)
    with pytest.raises(artifact.ArtifactError, match=f"version 99, this code reads {artifact.VERSION}"):
        artifact.load(folder)
    with pytest.raises(artifact.ArtifactError, match="another spec: profile=3, and 4 is needed"):
        artifact.load(mmrf[2], dataclasses.replace(tiny.SPEC, profile=4))
    artifact.load(mmrf[2], dataclasses.replace(tiny.SPEC, num_videos=99, num_users=1, candidates=400))
    never = {"expires": ("soon", "2026-01-01", None), "spec": ({"much": 1}, None), "files": ([], {"a": 1}, {"a": {}})}
    for number, (name, value) in enumerate((name, value) for name, values in never.items() for value in values):
        copy = damaged(mmrf[2], tmp_path / f"copy{number}")
        rewrite(copy, **{name: value})
        with pytest.raises(artifact.ArtifactError, match=r"manifest.json cannot be used.*export the run again"):
            artifact.load(copy)
    text = (folder / artifact.MANIFEST).read_text()
    (folder / artifact.MANIFEST).write_text(text.replace('"num_videos": 30', '"num_videos": 31'))
    with pytest.raises(artifact.ArtifactError, match=r"manifest.json is damaged.*manifest.sha256"):
        artifact.load(folder)
    with pytest.raises(artifact.ArtifactError, match="is no artefact"):
        artifact.load(tmp_path)


def test_bfloat16_tables_and_hashed_ids_are_exported(tmp_path):
    config = dataclasses.replace(tiny.CONFIG, max_rows=8, table_dtype="bfloat16")
    plan = dataclasses.replace(exporting.PLAN, agents=config)
    state = exporting.run_state(plan)
    export.export_run(tmp_path / "a", plan, tiny.SPEC, tiny.make_items(), None, state, {})
    loaded = artifact.load(tmp_path / "a")
    assert loaded.arrays["policy"]["tables|id"].shape == (8, config.id_dim)
    request, history = asked(4, 8, 3)
    weights, encodings, memory = call(loaded, request, history)
    scores = jax.jit(loaded.functions["score"].call)(weights, memory, encodings, *arguments(request))
    live = registry.get("mmrf").make_policy(state.agents, tiny.make_items(), config)
    wanted = served(live, request, history)
    np.testing.assert_allclose(scores[:, -1], wanted, rtol=1e-5, atol=1e-5)
