"""One jitted update of encoder, critics, actors, targets and tables from a batch of session segments."""

from __future__ import annotations

from typing import Any

import chex
from flax import struct
import jax
import jax.numpy as jnp
import optax

from mmrf_jax import types
from mmrf_jax.agents import encoder as enc
from mmrf_jax.agents import losses, networks
from mmrf_jax.agents.config import AgentConfig
from mmrf_jax.data.schema import Schema
from mmrf_jax.embeddings import rowwise, table

TABLES = ("author", "id", "tag")
# Tags are few and each is seen often: telling them apart from the start spares the slow way out of a product of zeros.
_INIT_SCALE = {"author": 0.1, "id": 0.02, "tag": 0.5}
_SCALE_RATE = 0.01  # of the running spread of the critics


@struct.dataclass
class AgentState:
    """Everything that learning changes; all of it is checkpointed."""

    step: chex.Array  # int32, updates so far
    params: Any  # {"encoder", "critic", "actor"}
    target: Any  # Polyak average of params["critic"]
    optimizer: Any
    tables: dict[str, table.Table]  # embedding tables, outside the Flax params
    reward_scale: chex.Array  # [S] standard deviation of each signal in the first log
    q_scale: chex.Array  # [N] running spread of each critic over candidates
    key: chex.Array  # typed key


def optimizer(config: AgentConfig) -> optax.GradientTransformation:
    """Adam with decoupled weight decay, clipped apart for actors and critics; plain SGD for invariance tests."""
    if config.optimizer == "sgd":
        return optax.sgd(config.learning_rate)
    one = lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(config.learning_rate, weight_decay=config.weight_decay))
    labels = {"encoder": "critic", "critic": "critic", "actor": "actor"}
    return optax.multi_transform({"critic": one(), "actor": one()}, labels)


def init(
    key: types.Key,
    config: AgentConfig,
    schema: Schema,
    items: types.Items,
    feedback_mean: chex.Array,
    feedback_std: chex.Array,
) -> AgentState:
    """A fresh state; jit it with `out_shardings` so that it is born where it lives.

    Args:
      feedback_mean, feedback_std: [S] of the exposures in the first log; rewards are divided by the second, and the
        critics start from the first.
    """
    k_params, k_tables, k_state = jax.random.split(key, 3)
    sizes = {
        "author": (schema.num_authors, config.author_dim),
        "id": (items.num_embeddings, config.id_dim),
        "tag": (schema.num_tags, config.tag_dim),
    }
    tables = {
        name: table.init(jax.random.fold_in(k_tables, i), rows, dim, scale=_INIT_SCALE[name])
        for i, (name, (rows, dim)) in enumerate(sorted(sizes.items()))
    }
    k = schema.slate
    rows = {name: jnp.zeros((1, k, dim)) for name, (_, dim) in sizes.items()}
    encoder, actor, critic = enc.Encoder(config), networks.Actor(config), networks.Critic(config)
    k1, k2, k3 = jax.random.split(k_params, 3)
    encoder_params = encoder.init(
        k1, rows, jnp.zeros((1, k, schema.item_features)), jnp.zeros((1, k, len(types.SIGNALS))), jnp.ones((1, k)),
        jnp.zeros((1, schema.profile)), jnp.zeros((1, schema.context)),
    )  # fmt: skip
    z = jnp.zeros((1, config.state_dim))
    memory = jnp.zeros((1, len(config.decays), config.feedback_dim, config.dim))
    e = jnp.zeros((1, k, config.dim))
    params = {
        "encoder": encoder_params,
        "critic": critic.init(k2, z, memory, e),
        "actor": actor.init(k3, z, memory, e),
    }
    rate = jnp.clip(feedback_mean, 1e-5, None)
    prior = jnp.where(jnp.arange(len(rate)) == types.WATCH_TIME, jnp.log(rate / feedback_std), jnp.log(rate / (1 - jnp.minimum(rate, 0.999))))
    params["critic"]["params"]["prior"] = prior[:, None].astype(jnp.float32)
    return AgentState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        target=jax.tree.map(jnp.copy, params["critic"]),
        optimizer=optimizer(config).init(params),
        tables=tables,
        reward_scale=jnp.maximum(jnp.asarray(feedback_std, jnp.float32), 1e-3),
        q_scale=jnp.ones((config.num_agents,)),
        key=k_state,
    )


def table_ids(items: types.Items, videos: chex.Array) -> dict[str, chex.Array]:
    """Rows of each table for videos [...]."""
    return {"author": items.author[videos], "id": items.embedding_id[videos], "tag": items.tag[videos]}


def lookup(tables: dict[str, table.Table], ids: dict[str, chex.Array]) -> dict[str, chex.Array]:
    return {name: table.lookup(tables[name], ids[name]) for name in TABLES}


def encode_videos(config: AgentConfig, params, tables, items: types.Items, videos: chex.Array) -> chex.Array:
    """Encodings [..., D] of videos [...], without gradient."""
    rows = lookup(tables, table_ids(items, videos))
    e = enc.Encoder(config).apply(params["encoder"], rows, items.features[videos], method="items")
    return jax.lax.stop_gradient(e)


def update(
    state: AgentState,
    batch: types.SessionBatch,
    items: types.Items,
    config: AgentConfig,
    axis_name: str | None = None,
) -> tuple[AgentState, dict[str, chex.Array]]:
    """One update; jit it with `config` static and `state` donated.

    Args:
      batch: segments of T + 1 requests; the first T are learned from.
      axis_name: name of a mapped axis (`jax.pmap`, `jax.vmap`) over which the batch is split; None under `jit`,
        where the compiler sees the whole batch.

    Returns:
      The next state and scalar metrics.
    """
    total = (lambda x: x) if axis_name is None else (lambda x: jax.lax.psum(x, axis_name))
    shown_videos = jnp.take_along_axis(batch.candidates, batch.slate, axis=-1)  # [B, T+1, K]
    num_users, steps, k = shown_videos.shape
    seen = jnp.concatenate([batch.history.videos, shown_videos.reshape(num_users, -1)], axis=1)
    ids = table_ids(items, seen)
    rows = lookup(state.tables, ids)
    candidates = encode_videos(config, state.params, state.tables, items, batch.candidates)
    key = jax.random.fold_in(state.key, state.step)
    if axis_name is not None:
        key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))

    def loss_fn(params, rows):
        return _losses(params, rows, state, batch, items, seen, candidates, key, config, total)

    (_, (metrics, spread)), (grads, row_grads) = jax.value_and_grad(loss_fn, (0, 1), has_aux=True)(state.params, rows)
    grads = total(grads)
    if axis_name is not None:
        gather = lambda x: jax.lax.all_gather(x, axis_name, tiled=True)
        ids, row_grads = jax.tree.map(gather, (ids, row_grads))
        metrics = jax.lax.psum(metrics, axis_name)
    updates, opt_state = optimizer(config).update(grads, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    tables = {
        name: rowwise.row_update(
            state.tables[name],
            ids[name].reshape(-1),
            row_grads[name].reshape(-1, row_grads[name].shape[-1]),
            config.table_learning_rate,
        )
        for name in TABLES
    }
    # The first spread is taken whole: the running mean of a handful of updates would start from 1.
    rate = jnp.where(state.step == 0, 1.0, _SCALE_RATE)
    next_state = state.replace(
        step=state.step + 1,
        params=params,
        target=optax.incremental_update(params["critic"], state.target, config.polyak),
        optimizer=opt_state,
        tables=tables,
        q_scale=(1.0 - rate) * state.q_scale + rate * spread,
    )
    metrics["grad_norm"] = optax.global_norm(grads)
    return next_state, metrics


def _losses(params, rows, state, batch, items, seen, candidates, key, config, total):
    h = batch.history.videos.shape[1]
    num_users, steps, k = batch.slate.shape
    modules = enc.Encoder(config), networks.Actor(config), networks.Critic(config)
    encoder, actor, critic = modules
    rngs = {"dropout": key}

    # Representation: memory before every request, user states, and the encodings of what was shown.
    e = encoder.apply(params["encoder"], rows, items.features[seen], True, method="items", rngs=rngs)
    shown_feedback = batch.feedback.reshape(num_users, steps * k, -1)
    feedback = jnp.concatenate([batch.history.feedback, shown_feedback], axis=1)
    f = encoder.apply(params["encoder"], feedback, items.duration[seen], method="feedback")
    split = lambda x: (x[:, :h], x[:, h:].reshape(num_users, steps, k, x.shape[-1]))
    (e_history, e_shown), (f_history, f_shown) = split(e), split(f)
    start = enc.memory_write(config, None, e_history, f_history, batch.history.mask)
    slate_mask = batch.slate_mask & batch.mask[..., None]
    memory = enc.memory_over_requests(config, start, e_shown, f_shown, slate_mask)
    profile = jnp.broadcast_to(batch.profile[:, None], (num_users, steps, batch.profile.shape[-1]))
    z = encoder.apply(params["encoder"], memory, profile, batch.context, True, method="user", rngs=rngs)
    mean = memory.mean()

    # Critics on what was shown (with gradient), and on all candidates (targets and actors: without).
    shown = critic.apply(params["critic"], z, mean, e_shown)
    still = jax.lax.stop_gradient((z, mean))
    scores, attention = actor.apply(params["actor"], *still, candidates)
    w_main = jax.lax.stop_gradient(losses.exposure.soft_top_k(scores[..., -1, :], config.slate, 1.0))
    pool = critic.apply(state.target, *still, candidates)
    stay_main = losses.stay_probability(pool, w_main)
    q = losses.video_values(config, pool, pool.value.min(axis=-2), stay_main, state.reward_scale)  # [B, T+1, N, C]
    value = losses.slate_values(pool.base.min(axis=-2), q, w_main)  # [B, T+1, N], of the policy in force
    shown_q = jnp.take_along_axis(q, batch.slate[..., None, :], axis=-1)  # [B, T+1, N, K]

    # Only the first T requests are learned from; a request without a known next one has no TD target.
    learn = batch.mask[:, :-1]
    exposed = (slate_mask[:, :-1] & learn[..., None]).astype(jnp.float32)
    request = learn.astype(jnp.float32)
    known = request * (batch.terminated[:, :-1] | batch.mask[:, 1:])
    num_exposed, num_requests, num_known = (jnp.maximum(total(x.sum()), 1.0) for x in (exposed, request, known))

    per_signal = losses.feedback_loss(shown.feedback[:, :-1], batch.feedback[:, :-1], state.reward_scale)
    feedback_loss = jnp.einsum("btk,btks->s", exposed, per_signal) / num_exposed
    stay_logit = shown.stay_base + jnp.sum(slate_mask * shown.stay_effect, axis=-1)
    stays = jnp.where(batch.terminated[:, :-1], 0.0, 1.0)
    stay_loss = jnp.sum(known * optax.sigmoid_binary_cross_entropy(stay_logit[:, :-1], stays)) / num_known

    reward = losses.rewards(config, batch.feedback[:, :-1], state.reward_scale)  # [B, T, K, N]
    reward = jnp.einsum("btk,btkn->btn", exposed, reward)
    target = losses.td_targets(reward, value[:, 1:], batch.terminated[:, :-1], config.discount)
    target = jax.lax.stop_gradient(target)
    slate_q = jnp.einsum("btnk,btk->btn", shown_q[:, :-1], exposed)
    td_error = shown.base[:, :-1] + jax.lax.stop_gradient(slate_q - target)[..., None, :]  # [B, T, 2, N]
    base_loss = jnp.sum(known[..., None, None] * td_error**2) / num_known
    value_error = shown.value[:, :-1] - jax.lax.stop_gradient(value[:, :-1])[..., None, :]
    value_loss = jnp.sum(request[..., None, None] * value_error**2) / num_requests

    scaled = jax.lax.stop_gradient(q[:, :-1] / state.q_scale[:, None])
    objective = losses.policy_objective(scores[:, :-1], scaled, config.slate, config.temperature)  # [B, T, N]
    objective = jnp.einsum("bt,btn->n", request, objective) / num_requests

    centred = q[:, :-1] - q[:, :-1].mean(axis=-1, keepdims=True)
    spread = jnp.sqrt(total(jnp.einsum("bt,btnc->n", request, centred**2)) / (num_requests * q.shape[-1]) + 1e-12)
    weight = jnp.asarray(config.signal_weights)
    loss = jnp.sum(weight * feedback_loss) + stay_loss + 0.1 * (base_loss + value_loss) - jnp.sum(objective)
    metrics = {f"loss/{s}": feedback_loss[i] for i, s in enumerate(types.SIGNALS)}
    metrics |= {"loss/stay": stay_loss, "loss/base": base_loss, "loss/value": value_loss}
    metrics |= {f"objective/{s}": objective[i] for i, s in enumerate(config.signals)}
    metrics["value/main"] = jnp.sum(request * value[:, :-1, -1]) / num_requests
    return loss, (metrics, spread)
