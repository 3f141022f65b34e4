"""The contract of a method as a test: `mmrf.testing.check_method(method)` trains and serves a tiny one.

def test_contract():
    mmrf.testing.check_method(my_module.METHOD)
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from mmrf_jax import types
from mmrf_jax.agents import registry
from mmrf_jax.agents.mmrf import agent_state, encoding
from mmrf_jax.agents.mmrf.config import AgentConfig
from mmrf_jax.data.session_log import InputSpec
from mmrf_jax.envs import rankers
from mmrf_jax.models import embeddings, encoders, representation
from mmrf_jax.signals import SHORT_VIDEO
from mmrf_jax.types import SessionBatch

__all__ = ["TINY", "check_method"]

#: Small agents, for `check_method`.
TINY = AgentConfig(
    signals=("click", "hate", "watch_time"),
    slate=3,
    dim=12,
    id_dim=4,
    author_dim=3,
    tag_dim=3,
    user_dim=3,
    feedback_dim=4,
    state_dim=10,
    agent_dim=8,
    heads=2,
)
SPEC = InputSpec(
    num_videos=30,
    num_authors=6,
    num_tags=4,
    num_users=8,
    item_features=2,
    profile=3,
    context=2,
    candidates=8,
    slate=3,
    history=4,
)
_USERS, _REQUESTS = 8, 4
_KNOWN = 3  # seed of a batch whose users all have a history, so that no request is alike for untrained methods
_CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


def check_method(method: registry.Method, config: AgentConfig = TINY) -> None:
    """Check that a method keeps the contract of docs/own-method.md, by training and serving a tiny one.

    One trace for batches of equal shapes; finite numbers; the given state donated, the next one of its shapes and
    types; the same result for the same key, also after a checkpoint; nothing learned from padding; scores that do not
    depend on padding and work for any number of candidates, as export needs; a policy that ranks by them.

    Args:
      method: as given to `register_method`.
      config: of the agents, before `method.configure`.

    Raises:
      AssertionError: for the first part that is not kept, naming it.

    Example:
      >>> import mmrf_jax as mmrf
      >>> from mmrf_jax.agents import supervised, wide_deep
      >>> mmrf.testing.check_method(mmrf.Method(supervised.update, critic=wide_deep.critic))
      Traceback (most recent call last):
        ...
      AssertionError: update fails: update() missing 1 required keyword-only argument: 'critic'
    """
    assert isinstance(method, registry.Method), f"{method!r} is no mmrf_jax.agents.registry.Method"
    case = _Case(method, registry.adapted(method, config))
    state = _check_update(case)
    _check_padding(case)
    _check_scores(case, state)
    _check_policy(case, state)


_init = jax.jit(agent_state.init_agent_state, static_argnames=("config", "spec", "critic"))


@functools.partial(jax.jit, static_argnames="config")
def _encode(config: AgentConfig, encoder: Any, tables: Any, batch: SessionBatch, items: types.Items):
    videos = embeddings.encode_videos(config, encoder, tables, items, batch.candidates)
    return encoding.encode_batch(config, encoder, tables, batch, items), videos


class _Case:
    """A method with a tiny config, and its compiled update."""

    def __init__(self, method: registry.Method, config: AgentConfig):
        self.method, self.config, self.items = method, config, make_items()
        self.traces = 0

        def update(state, batch, items, simulated):
            self.traces += 1
            return method.update(state, batch, items, config, jnp.float32(1.0), simulated)

        self._update = jax.jit(update, donate_argnums=0)
        self.score = jax.jit(functools.partial(method.score, config))

    def init(self) -> agent_state.AgentState:
        known = (*_known(), self.method.critic, np.ones(len(SHORT_VIDEO)))
        return _call("critic", _init, types.make_key(0), self.config, SPEC, self.items, *known)

    def encode(self, state: agent_state.AgentState, batch: SessionBatch):
        """Return the encoded batch, and its candidates [B, T+1, C, D]."""
        return _encode(self.config, state.params["encoder"], state.tables, batch, self.items)

    def update(self, state: agent_state.AgentState, batch: SessionBatch, seed: int = 0):
        simulated = _simulated(seed) if self.method.uses_model else None
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Some donated buffers were not usable")
            return _call("update", self._update, state, batch, self.items, simulated)


def _check_update(case: _Case) -> agent_state.AgentState:
    """Take three steps, and again from the same key, with a checkpoint between; return the last state."""
    first, batches = case.init(), [make_batch(seed) for seed in range(3)]
    shapes, before = _shapes(first), jax.tree.map(np.array, first.params)  # a view would prevent the donation
    state, metrics = case.update(first, batches[0])
    _same_shapes(shapes, _shapes(state))
    given = [x for x in jax.tree.leaves(first) if not x.is_deleted()]
    assert not given, "update does not use the state that it is given; return a state made from it, with new arrays"
    _check_metrics(metrics)
    assert _differing(before, state.params, exact=True), (
        "update changes no parameter; take a gradient step, as agent_state.step does"
    )
    assert int(state.step) == 1, f"update leaves step at {int(state.step)} after one call; it counts updates"
    saved = _through_a_checkpoint(state)
    ends = []
    for start in (state, saved):
        for seed in (1, 2):
            start, metrics = case.update(start, batches[seed], seed)
        ends.append(start)
    assert case.traces == 1, (
        f"update is traced {case.traces} times for batches of equal shapes; let nothing depend on their values"
    )
    _check_metrics(metrics)
    _assert_finite("the state after three updates", ends[0])
    repeated = case.init()
    for seed in range(3):
        repeated, _ = case.update(repeated, batches[seed], seed)
    differs = _differing(ends[0], repeated, exact=True)
    assert not differs, f"update gives another {differs[0]} for the same key and batches; take randomness from the key"
    differs = _differing(ends[0], ends[1], exact=True)
    assert not differs, f"after a checkpoint {differs[0]} is another; keep all that changes in the state"
    return ends[0]


def _check_metrics(metrics: Any) -> None:
    assert isinstance(metrics, dict), f"update returns {type(metrics).__name__} as metrics; return a dictionary"
    for name, value in metrics.items():
        assert jnp.shape(value) == (), f"metric {name!r} has shape {jnp.shape(value)}; metrics are scalars"
        assert np.isfinite(value), f"metric {name!r} is {float(value)} after an update; it is not finite"


def _check_padding(case: _Case) -> None:
    """Update with other numbers where there is no request, no shown video and no history."""
    ends = []
    for batch in (make_batch(0), _padded_with_noise(make_batch(0))):
        state, metrics = case.update(case.init(), batch)
        ends.append((state, metrics))
    differs = _differing(ends[0], ends[1], exact=False)
    assert not differs, (
        f"what is in the padding of a batch changes {differs[0]}; weigh the losses by `batch.loss_masks()`"
    )


def _check_scores(case: _Case, state: agent_state.AgentState) -> None:
    method, config, signals = case.method, case.config, case.method.signals(case.config)
    assert signals and all(isinstance(name, str) for name in signals), f"signals gives {signals!r}; give names"
    encoded, candidates = case.encode(state, make_batch(_KNOWN))
    scores = np.asarray(_call("score", case.score, state, encoded, candidates))
    wanted = (_USERS, _REQUESTS + 1, len(signals), SPEC.candidates)
    assert scores.shape == wanted, (
        f"score returns shape {scores.shape}; {len(signals)} signals and these candidates are [B, T+1, N, C] = {wanted}"
    )
    assert np.isfinite(scores).all(), "score returns numbers that are not finite"
    assert scores[..., -1, :].std(axis=-1).min() > 0, "score ranks all candidates of some request alike"
    known = np.asarray(candidates)
    padded = np.concatenate([known, np.repeat(known.mean(axis=-2, keepdims=True), 3, axis=-2)], axis=-2)
    more = np.asarray(_call("score", case.score, state, encoded, padded))[..., : SPEC.candidates]
    assert np.allclose(scores, more, **_CLOSE), (
        "score depends on padding: candidates with the mean encoding, as a server adds, change the scores of the others"
    )
    if method.has_feedback_heads:
        critic = functools.partial(jax.eval_shape, method.critic(config).apply)
        out = _call("critic", critic, state.params["critic"], *encoded.user, candidates)
        shape = getattr(getattr(out, "feedback", None), "shape", None)
        wanted = (_USERS, _REQUESTS + 1, len(SHORT_VIDEO), SPEC.candidates)
        assert shape == wanted, (
            f"critic gives `feedback` of shape {shape}, not [B, T+1, S, C] = {wanted}; without any, set "
            "has_feedback_heads=False"
        )
    b, c = export.symbolic_shape("b, c")
    sizes = encoders.sizes(config, SPEC)
    carry = jax.tree.map(lambda x: _of_users(x, b), encoded.carry)
    nothing = jax.ShapeDtypeStruct((0,), jnp.float32)
    request = representation.Encoded(jax.ShapeDtypeStruct((b, sizes[0]), jnp.float32), carry, nothing, nothing)
    items = jax.ShapeDtypeStruct((b, c, sizes[1]), jnp.float32)
    _call(
        "score, for symbolic numbers of users and candidates [b, N, c] as in an export,",
        functools.partial(jax.eval_shape, functools.partial(method.score, config)),
        state,
        request,
        items,
    )


def _check_policy(case: _Case, state: agent_state.AgentState) -> None:
    method, config, items = case.method, case.config, case.items
    make = functools.partial(method.make_policy, config=config)
    policy = _call("make_policy", make, state, items)
    assert isinstance(policy, rankers.Ranker), (
        f"make_policy returns {type(policy).__name__}; return an envs.rankers.Ranker"
    )
    again = make(state, items)
    for name in ("start", "score", "observe"):
        assert getattr(policy, name) is getattr(again, name), (
            f"make_policy makes a new function `{name}` each time, so each policy is compiled anew; cache it by config"
        )
    _call("make_policy, for shapes alone,", functools.partial(jax.eval_shape, make), state, items)
    batch = make_batch(_KNOWN)
    request = types.Request(batch.user_id, batch.profile, batch.context[:, 0], batch.candidates[:, 0])
    carry = _call("the policy's start", jax.jit(policy.start), policy.params, request, batch.history)
    served = np.asarray(_call("the policy's score", jax.jit(policy.score), policy.params, carry, request))
    assert served.shape == request.candidates.shape, (
        f"the policy returns scores of shape {served.shape} for candidates [B, C] = {request.candidates.shape}"
    )
    assert np.isfinite(served).all(), "the policy returns scores that are not finite"
    column = np.asarray(case.score(state, *case.encode(state, batch)))[:, 0, -1]
    apart = column[:, :, None] - column[:, None, :]
    ordered = (served[:, :, None] > served[:, None, :]) | (apart <= 1e-3 * (column.std() + 1e-9))
    assert ordered.all(), "the policy ranks otherwise than the last column of score, which is what is exported"
    shown = types.Exposure(batch.candidates[:, 0, : SPEC.slate], batch.feedback[:, 0], batch.slate_mask[:, 0])
    observe = functools.partial(jax.eval_shape, policy.observe)
    after = _call("the policy's observe", observe, policy.params, carry, request, shown)
    _same_shapes(_shapes(carry), _shapes(after), "the policy's carry")


def _call(what: str, function: Callable[..., Any], *args: Any) -> Any:
    try:
        return function(*args)
    except AssertionError:
        raise
    except Exception as error:
        raise AssertionError(f"{what} fails: {error}") from error


def _through_a_checkpoint(state: agent_state.AgentState) -> agent_state.AgentState:
    from mmrf_jax.checkpointing import manager  # orbax, which is slow to import

    def both(folder: Path):
        with manager.Checkpoints(folder) as checkpoints:
            checkpoints.save(1, state, force=True)
            return checkpoints.restore(manager.targets(state))[0]

    with tempfile.TemporaryDirectory() as folder:
        return _call("a checkpoint of the state", both, Path(folder) / "checkpoints")


def _shapes(tree: Any) -> dict[str, tuple]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (x.shape, str(x.dtype), getattr(x, "weak_type", False))
        for path, x in leaves
    }


def _same_shapes(before: dict[str, tuple], after: dict[str, tuple], what: str = "the state") -> None:
    for name in {**before, **after}:
        a, b = before.get(name), after.get(name)
        assert a == b, f"{what} changes its form: {name} (shape, dtype, weak type) was {a}, now {b}; keep both equal"


def _assert_finite(what: str, tree: Any) -> None:
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.issubdtype(x.dtype, jnp.floating):
            finite = np.isfinite(np.asarray(x, np.float32)).all()
            assert finite, f"{what} is not finite in {jax.tree_util.keystr(path, simple=True)}"


def _differing(a: Any, b: Any, exact: bool) -> list[str]:
    """Return the leaves in which two trees differ."""

    def plain(x: Any) -> np.ndarray:
        return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)

    pairs = zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True)
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, x), y in pairs
        if not (np.array_equal(plain(x), plain(y)) if exact else np.allclose(plain(x), plain(y), **_CLOSE))
    ]


def _of_users(x: jax.Array, users: Any) -> jax.ShapeDtypeStruct:
    """Return the shape of an array [B, T+1, ...] at one request of `users` users."""
    return jax.ShapeDtypeStruct((users, *x.shape[2:]), x.dtype)


def _known() -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of feedback: three in ten, and a quarter of a minute."""
    watched = np.arange(len(SHORT_VIDEO)) == SHORT_VIDEO.index("watch_time")
    return np.where(watched, 15.0, 0.3), np.where(watched, 15.0, 0.46)


def make_feedback(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Draw feedback [*shape, S] on short videos."""
    feedback = (rng.random((*shape, len(SHORT_VIDEO))) < 0.3).astype(np.float32)
    feedback[..., SHORT_VIDEO.index("watch_time")] = rng.gamma(1.0, 15.0, shape)
    return feedback


def make_items(spec: InputSpec = SPEC, seed: int = 0) -> types.Items:
    """Draw the V videos of a spec."""
    rng, v = np.random.default_rng(seed), spec.num_videos
    items = types.Items(
        author=rng.integers(0, spec.num_authors, v).astype(np.int32),
        tag=rng.integers(0, spec.num_tags, v).astype(np.int32),
        duration=rng.uniform(5, 60, v).astype(np.float32),
        features=rng.normal(size=(v, spec.item_features)).astype(np.float32),
        embedding_id=np.arange(1, v + 1, dtype=np.int32),
        num_embeddings=v + 1,
        num_authors=spec.num_authors,
        num_tags=spec.num_tags,
    )
    return jax.tree.map(jnp.asarray, items)


def make_batch(seed: int = 0, users: int = _USERS, requests: int = _REQUESTS, spec: InputSpec = SPEC) -> SessionBatch:
    """Draw segments of 1 to T + 1 requests, with slates of 1 to K and histories of 0 to H; what is masked is zero."""
    rng, t, k, h = np.random.default_rng(seed), requests + 1, spec.slate, spec.history
    lengths = 1 + np.arange(users)[:, None] % t  # every length occurs
    mask, last = np.arange(t) < lengths, np.arange(t) == lengths - 1
    over = last & (rng.random(users) < 0.9)[:, None]
    left = (np.arange(users) % 3 > 0)[:, None]
    slate_mask = (np.arange(k) < rng.integers(1, k + 1, (users, t))[..., None]) & mask[..., None]
    history_mask = np.arange(h) >= rng.integers(0, h + 1, users)[:, None]
    slate = rng.random((users, t, spec.candidates)).argsort(-1)[..., :k]
    return SessionBatch(
        user_id=np.arange(users, dtype=np.int32),
        date=np.zeros(users, np.int32),
        profile=rng.normal(size=(users, spec.profile)).astype(np.float32),
        history=types.Exposure(
            np.where(history_mask, rng.integers(0, spec.num_videos, (users, h)), 0).astype(np.int32),
            make_feedback(rng, (users, h)) * history_mask[..., None],
            history_mask,
        ),
        context=rng.normal(size=(users, t, spec.context)).astype(np.float32),
        candidates=rng.random((users, t, spec.num_videos)).argsort(-1)[..., : spec.candidates].astype(np.int32),
        slate=np.where(slate_mask, slate, 0).astype(np.int32),
        slate_mask=slate_mask,
        feedback=make_feedback(rng, (users, t, k)) * slate_mask[..., None],
        log_propensity=np.where(mask, -1.0, np.nan).astype(np.float32),
        mask=mask,
        terminated=over & left,
        truncated=over & ~left,
    )


def _padded_with_noise(batch: SessionBatch) -> SessionBatch:
    """Return a batch with other videos and feedback where nothing was shown, and at requests that do not exist."""
    rng, other = np.random.default_rng(9), make_batch(8)
    shown, there = batch.slate_mask[..., None], batch.mask[..., None]
    unused = rng.integers(0, SPEC.candidates, batch.slate.shape).astype(np.int32)
    old = batch.history
    return dataclasses.replace(
        batch,
        history=types.Exposure(
            np.where(old.mask, old.videos, rng.integers(0, SPEC.num_videos, old.videos.shape)).astype(np.int32),
            np.where(old.mask[..., None], old.feedback, 1.0).astype(np.float32),
            old.mask,
        ),
        context=np.where(there, batch.context, other.context),
        candidates=np.where(there, batch.candidates, other.candidates),
        slate=np.where(batch.slate_mask, batch.slate, unused),
        feedback=np.where(shown, batch.feedback, 1.0).astype(np.float32),
    )


def _simulated(seed: int) -> types.CounterfactualSlates:
    """Return one slate of videos that were not shown at each request, as a feedback model gives them."""
    rng, t, k, s = np.random.default_rng([seed, 1]), _REQUESTS + 1, SPEC.slate, len(SHORT_VIDEO)
    slates = rng.random((_USERS, t, 1, SPEC.candidates)).argsort(-1)[..., :k]
    shape, everyone = (_USERS, t, 1, k), (_USERS, t)
    return types.CounterfactualSlates(
        slates=slates.astype(np.int32),
        expected=make_feedback(rng, shape),
        uncertainty=rng.uniform(0.5, 2.0, (*shape, s)).astype(np.float32),
        sampled=make_feedback(rng, shape),
        continue_prob=rng.random((*everyone, 1)).astype(np.float32),
        pool=types.FeedbackPrediction(
            feedback=rng.normal(size=(*everyone, s, SPEC.candidates)).astype(np.float32),
            continue_logit=rng.normal(size=everyone).astype(np.float32),
            continue_item_logit=rng.normal(size=(*everyone, SPEC.candidates)).astype(np.float32),
        ),
    )
