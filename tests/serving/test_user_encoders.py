"""Whatever carries users' states, an artefact ranks and predicts as training sees the same sessions."""

import dataclasses

import exporting
import jax
import numpy as np
import pytest
import tiny

from mmrf_jax.agents import registry
from mmrf_jax.models import user_encoders
from mmrf_jax.models.feedback_model import network
from mmrf_jax.serving import artifact, ranker

WINDOW = 3  # fewer requests than histories and sessions have
K = tiny.SPEC.slate


PAIRS = [("gru", "transformer"), pytest.param(("transformer", "gru"), marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=PAIRS, ids=lambda pair: pair[0])
def exported(request, tmp_path_factory):
    """(plan, state, folder) of agents and a feedback model with different encoders."""
    agents, feedback = request.param
    model = dataclasses.replace(tiny.FEEDBACK, encoder=feedback, window=WINDOW)
    folder = tmp_path_factory.mktemp(agents) / "artifact"
    return exporting.exported(folder, feedback=model, encoder=agents, window=WINDOW)


@pytest.fixture(scope="module")
def batch():
    return tiny.make_batch(users=10)


def history_of(serving, batch, user):
    seen = batch.history.mask[user]
    return serving.seen(exporting.VIDEO_IDS[batch.history.videos[user][seen]], batch.history.feedback[user][seen])


def request_of(batch, user, t):
    """What was shown and answered, as the service remembers it."""
    shown = batch.slate_mask[user, t]
    videos = batch.candidates[user, t][batch.slate[user, t][shown]]
    return ranker.Seen(videos, batch.feedback[user, t][shown], batch.context[user, t])


def job(batch, user, t, memory, seen):
    profile, context, candidates = batch.profile[user], batch.context[user, t], batch.candidates[user, t]
    return ranker.Job(int(batch.user_id[user]), profile, context, candidates, memory, seen)


def test_served_ranks_are_the_offline_ones(exported, batch):
    """Request by request with what is carried, and anew from history and session, as after a restart."""
    plan, state, folder = exported
    loaded = artifact.load(folder)
    carry = jax.eval_shape(lambda: user_encoders.of(plan.agents).init((), plan.agents.dim + tiny.SPEC.item_features))
    assert loaded.manifest["carry"] == {name: list(x.shape) for name, x in vars(carry).items()}
    offline = np.asarray(registry.score_candidates(state.agents, batch, tiny.make_items(), plan.agents, "mmrf"))
    serving = ranker.Ranker(loaded, max_candidates=tiny.SPEC.candidates)
    carried = [None] * len(batch.user_id)
    sessions = [history_of(serving, batch, user) for user in range(len(carried))]
    since = list(sessions)
    for t in range(batch.mask.shape[1]):
        live = np.flatnonzero(batch.mask[:, t]).tolist()
        stepped = serving.run([job(batch, user, t, carried[user], since[user]) for user in live])
        anew = serving.run([job(batch, user, t, None, sessions[user]) for user in live])
        for user, (scores, memory), (again, _) in zip(live, stepped, anew, strict=True):
            np.testing.assert_allclose(scores, offline[user, t], rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(again, offline[user, t], rtol=1e-4, atol=1e-4)
            np.testing.assert_array_equal(np.argsort(-scores[-1]), np.argsort(-offline[user, t, -1]))
            since[user] = [request_of(batch, user, t)]
            sessions[user], carried[user] = sessions[user] + since[user], memory
    assert np.abs(offline[4, 0] - offline[4, 1]).max() > 0.01


def test_the_feedback_model_predicts_as_in_training(exported, batch):
    """After the history and two requests, of the users that have a third."""
    plan, state, folder = exported
    loaded, items = artifact.load(folder), tiny.make_items()
    users = np.flatnonzero(batch.mask[:, 2])
    rows = jax.tree.map(lambda x: x[users], batch)
    weights, known = artifact.nested(loaded.arrays["model"]), loaded.arrays["catalogue"]
    video = {name: known[name] for name in ("author", "tag", "embedding_id", "features")}
    encodings = jax.jit(loaded.functions["model_encode"].call)(weights, video)
    carry = {name: np.zeros((len(users), 2, *x), np.float32) for name, x in loaded.manifest["model_carry"].items()}
    shown = {
        "videos": np.zeros((len(users), 4, K), np.int32),
        "feedback": np.zeros((len(users), 4, K, tiny.S), np.float32),
        "mask": np.zeros((len(users), 4, K), bool),
        "context": np.zeros((len(users), 4, tiny.SPEC.context), np.float32),
    }
    for i in range(len(users)):  # a history of H = 4 is two requests, and ends with a whole one
        h = rows.history
        for j, cut in enumerate((slice(0, 1), slice(1, 4))):
            at = i, j, slice(cut.stop - cut.start)
            shown["videos"][at], shown["mask"][at] = h.videos[i, cut], h.mask[i, cut]
            shown["feedback"][at] = h.feedback[i, cut]
        for t in range(2):
            videos, feedback, context = request_of(rows, i, t)
            at = i, 2 + t, slice(len(videos))
            shown["videos"][at], shown["feedback"][at], shown["mask"][at] = videos, feedback, True
            shown["context"][i, 2 + t] = context
    shown["duration"] = known["duration"][shown["videos"]]
    carry = jax.jit(loaded.functions["model_observe"].call)(weights, carry, encodings, shown)
    candidates, context = rows.candidates[:, 2], rows.context[:, 2]
    request = {"user_id": rows.user_id, "profile": rows.profile, "context": context, "candidates": candidates}
    exposed = np.zeros(candidates.shape, np.float32)
    out = jax.jit(loaded.functions["model_predict"].call)(weights, carry, encodings, request, exposed)

    @jax.jit
    def trained(model):
        r = network.encode_batch(plan.feedback, model, rows, items, rows.candidates)
        predicted = network.predict(plan.feedback, model.params, *r.user, r.unseen)
        predicted = network.calibrated(plan.feedback, predicted, model.calibration, rows.context)
        return network.expected(plan.feedback, predicted, model.scale)

    np.testing.assert_allclose(out["feedback"], trained(state.feedback)[:, 2], rtol=1e-4, atol=1e-4)
