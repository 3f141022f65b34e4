"""Learning by learning, in two worlds so small that the right ranking is known.

*Taste*: a user watches videos of the tag that the profile names for 30 s and the other for 2 s, and the session ends by
chance. *Leaving*: one tag is watched longer and drives users away, the other keeps them.
"""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from mmrf_jax import types
from mmrf_jax.agents import registry
from mmrf_jax.agents.mmrf import policy, training_step
from mmrf_jax.data import sessions
from mmrf_jax.data.session_log import InputSpec, Sessions
from mmrf_jax.signals import SHORT_VIDEO

V, C, K, H, T, LONGEST = 40, 8, 3, 2, 4, 20
SPEC = InputSpec(
    num_videos=V,
    num_authors=5,
    num_tags=2,
    num_users=0,
    item_features=1,
    profile=2,
    context=1,
    candidates=C,
    slate=K,
    history=H,
)
CONFIG = dataclasses.replace(
    tiny.CONFIG, signals=("click", "like", "watch_time"), learning_rate=5e-3, actor_learning_rate=5e-3, polyak=0.05
)
TAG = np.arange(V) % 2
ITEMS = dataclasses.replace(
    tiny.make_items(SPEC), tag=jax.numpy.asarray(TAG, jax.numpy.int32), features=jax.numpy.zeros((V, 1))
)


def taste(rng, profile, tags):
    """Seconds [n, K] and the chance of another request [n]."""
    liked = (profile[:, :1] > 0).astype(int) == tags
    return np.where(liked, 30.0, 2.0) * rng.uniform(0.7, 1.3, tags.shape), np.full(len(tags), 0.6)


def leaving(rng, profile, tags):
    """Tag 1 is watched for 12 s and drives users away; tag 0 for 10 s, and they stay."""
    seconds = np.where(tags == 1, 12.0, 10.0) * rng.uniform(0.7, 1.3, tags.shape)
    return seconds, 1.0 / (1.0 + np.exp(-np.where(tags == 1, -0.8, 0.8).sum(axis=-1)))


def play(world, rank, seed, users):
    """Sessions of users with `rank(t, profile, context, candidates, previous) -> slate [n, K]`: lists by request."""
    rng = np.random.default_rng(seed)
    profile = rng.choice([-1.0, 1.0], (users, 2)).astype(np.float32)
    live, rows, previous = np.ones(users, bool), [], None
    for t in range(LONGEST):
        candidates = rng.random((users, V)).argsort(1)[:, :C].astype(np.int32)
        context = np.full((users, 1), t / 10.0, np.float32)
        slate = rank(rng, types.Request(np.arange(users), profile, context, candidates), previous)
        videos = np.take_along_axis(candidates, slate, axis=-1)
        seconds, stay = world(rng, profile, TAG[videos])
        feedback = np.zeros((users, K, tiny.S), np.float32)
        feedback[..., SHORT_VIDEO.index("watch_time")] = seconds
        feedback[..., SHORT_VIDEO.index("click")] = seconds > 7.0
        feedback[..., SHORT_VIDEO.index("like")] = rng.random(seconds.shape) < 0.2
        stays = rng.random(users) < stay
        rows.append({"live": live, "candidates": candidates, "context": context, "slate": slate, "feedback": feedback})
        rows[-1] |= {"videos": videos, "over": live & ~stays}
        previous = types.Exposure(videos, feedback, np.ones(videos.shape, bool))
        live = live & stays
    return profile, {name: np.stack([row[name] for row in rows], axis=1) for name in rows[0]}


def random_slates(rng, request, previous):
    return rng.random(request.candidates.shape).argsort(axis=1)[:, :K].astype(np.int32)


def random_log(world, seed, users):
    profile, played = play(world, random_slates, seed, users)
    live = played["live"]
    lengths = live.sum(axis=1)
    left = played["over"].any(axis=1)
    flat = {name: played[name][live] for name in ("context", "candidates", "slate", "feedback")}
    return Sessions(
        user_id=np.arange(users, dtype=np.int32),
        date=np.zeros(users, np.int32),
        profile=profile,
        history_videos=np.zeros((users, H), np.int32),
        history_feedback=np.zeros((users, H, tiny.S), np.float32),
        history_mask=np.zeros((users, H), bool),
        terminated=left,
        truncated=~left,
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        log_propensity=np.full(len(flat["slate"]), np.nan, np.float32),
        scores=None,
        **flat,
    )


def learn(learner, log, updates, batch=128):
    seen = log.feedback.reshape(-1, tiny.S)
    state = tiny.init(jax.random.key(0), CONFIG, SPEC, ITEMS, seen.mean(axis=0), seen.std(axis=0))
    fn = jax.jit(learner, static_argnames="config", donate_argnums=0, compiler_options=tiny.HOT)
    index, rng = sessions.segment_index(log, T), np.random.default_rng(0)
    for _ in range(updates):
        state, metrics = fn(state, sessions.gather_segments(log, rng.choice(index, batch), T), ITEMS, config=CONFIG)
    assert all(np.isfinite(x) for x in metrics.values())
    return state


def ranker(served):
    """`rank` of `play` for a served policy: the K best, the user's memory carried over the session."""
    init, score, observe = jax.jit(served.start), jax.jit(served.score), jax.jit(served.observe)
    carry = {}

    def rank(rng, request, previous):
        users = len(request.user_id)
        if previous is None:
            history = types.Exposure(
                np.zeros((users, H), np.int32), np.zeros((users, H, tiny.S), np.float32), np.zeros((users, H), bool)
            )
            carry["memory"] = init(served.params, request, history)
        else:
            carry["memory"] = observe(served.params, carry["memory"], request, previous)
        scores = np.asarray(score(served.params, carry["memory"], request))
        return np.argsort(-scores, axis=1, kind="stable")[:, :K].astype(np.int32)

    return rank


def outcome(world, served, users=400):
    """Watch time a session, and per live request the share of the slate [users, T] that has tag 1 and, at random
    candidates, the largest share that was possible."""
    profile, played = play(world, ranker(served), 99, users)
    live = played["live"]
    seconds = np.sum(played["feedback"][..., SHORT_VIDEO.index("watch_time")].sum(-1) * live, axis=1)
    return profile, TAG[played["videos"]], TAG[played["candidates"]], live, seconds.mean()


def right_share(tags, offered, live, wanted):
    """Share of exposures that have the wanted tag [users, 1, 1], of those that could: K, or all candidates with it."""
    got = (tags == wanted).sum(-1)[live].sum()
    return got / np.minimum((offered == wanted).sum(-1), K)[live].sum()


MYOPIC = registry.get("myopic")
LEARNERS = [(training_step.update, policy.make_actor_ranker), (MYOPIC.update, MYOPIC.make_policy)]


@pytest.mark.slow
@pytest.mark.parametrize(("learner", "make"), LEARNERS, ids=["mmrf", "myopic"])
def test_finds_out_what_a_user_likes(learner, make):
    state = learn(learner, random_log(taste, 0, 1500), 300)
    profile, tags, offered, live, _ = outcome(taste, make(state, ITEMS, CONFIG))
    wanted = (profile[:, :1] > 0).astype(int)[:, :, None]
    assert right_share(tags, offered, live, wanted) > 0.95
    first = live & (np.arange(LONGEST) == 0)  # from the profile alone, before any feedback
    assert right_share(tags, offered, first, wanted) > 0.95


@pytest.mark.slow
def test_far_sighted_agent_keeps_users_whom_the_myopic_one_drives_away():
    log = random_log(leaving, 1, 3000)
    _, tags, offered, live, seconds = outcome(
        leaving, policy.make_actor_ranker(learn(training_step.update, log, 500), ITEMS, CONFIG)
    )
    assert right_share(tags, offered, live, 0) > 0.9
    served = MYOPIC.make_policy(learn(MYOPIC.update, log, 300), ITEMS, CONFIG)
    _, tags, offered, live, myopic_seconds = outcome(leaving, served)
    assert right_share(tags, offered, live, 1) > 0.9
    assert seconds > 2.0 * myopic_seconds
    per_exposure = log.feedback[..., SHORT_VIDEO.index("watch_time")].mean()
    assert myopic_seconds < 3 * K * per_exposure  # what it chooses is watched longer, and for a request or two
