"""One update of encoder, critics, actors, targets and tables from a batch of session segments (docs/update.md).

The batch is encoded once, networks are applied to it, and the loss is the weighted sum of `losses`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from mmrf_jax import ops, types
from mmrf_jax.agents.mmrf import acting, agent_state, encoding, losses, networks
from mmrf_jax.agents.mmrf.config import AgentConfig
from mmrf_jax.models import embedding_table, embeddings, heads, representation, user_encoders

_SCALE_RATE = 0.01  # of the running spread of the critics
_VALUE_WEIGHT = 0.1  # of the TD losses relative to the feedback losses

Metrics = dict[str, chex.Array]


class Algorithm(NamedTuple):
    """The terms that distinguish one actor-critic algorithm from another.

    Attributes:
      actor_loss: (ActorBatch, temperature) -> the loss of the scores, and metrics; the entries of one called
        "objective" are named by agent.
      expectile: None if values are those of the current policy. Else values are this expectile over logged slates
        (Kostrikov et al., 2021), and only logged exposures are evaluated.
    """

    actor_loss: Callable[[losses.ActorBatch, float], tuple[chex.Array, Metrics]] = losses.actor_loss
    expectile: float | None = None


MMRF = Algorithm()


class UpdateData(NamedTuple):
    """What an update learns from."""

    batch: types.SessionBatch
    inputs: representation.EncoderInputs  # gathered from the batch
    candidates: chex.Array  # [B, T+1, C, D] encodings, without gradient
    simulated: types.CounterfactualSlates | None
    masks: types.LossMasks
    counts: types.LossMasks  # their sums

    def mean(self, x: chex.Array) -> chex.Array:
        """Return the mean over requests, [B, T, ...] -> [...]."""
        return jnp.einsum("bt,bt...->...", self.masks.request, x) / self.counts.request


def update(
    state: agent_state.AgentState,
    batch: types.SessionBatch,
    items: types.Items,
    config: AgentConfig,
    lr_scale: chex.Numeric = 1.0,
    simulated: types.CounterfactualSlates | None = None,
    algorithm: Algorithm = MMRF,
) -> tuple[agent_state.AgentState, Metrics]:
    """Run one update; jit it with `config` static and `state` donated.

    Args:
      batch: segments of T + 1 requests; the first T are learned from.
      lr_scale: factor on the learning rates.
      simulated: unshown videos with a feedback model's predicted feedback, learned from in addition to the impressions,
        with weight `config.counterfactual_weight`; and the model's predictions for all candidates, which values also
        use. None for impressions and the agents' critics alone.
      algorithm: that of MMRF, or of a baseline with the same encoders and critics.

    Returns:
      The next state and scalar metrics.
    """
    candidates = encoding.encode_videos(
        config, state.params["encoder"], state.tables, items, batch.candidates, batch.date
    )
    unseen = None
    if simulated is not None:
        flat = simulated.slates.reshape(*simulated.slates.shape[:2], -1)
        unseen = jnp.take_along_axis(batch.candidates, flat, axis=-1)  # [B, T+1, M K]
    inputs = representation.gather(batch, items, unseen)
    masks = batch.loss_masks()
    data = UpdateData(batch, inputs, candidates, simulated, masks, masks.counts())

    def loss_fn(params, encoded):
        return _loss(params, encoded, state, data, config, algorithm)

    next_state, (metrics, mean, spread), grad_norm = agent_state.step(state, inputs, loss_fn, config, lr_scale)
    # The first spread is taken in full: after a handful of updates the running mean would still be near 1.
    blend = jnp.where(state.step == 0, 1.0, _SCALE_RATE)
    next_state = dataclasses.replace(
        next_state,
        q_mean=(1.0 - blend) * state.q_mean + blend * mean,
        q_scale=(1.0 - blend) * state.q_scale + blend * spread,
    )
    return next_state, metrics | {"grad_norm": grad_norm}


def _loss(
    params: Any,
    encoded: representation.Encoded,
    state: agent_state.AgentState,
    data: UpdateData,
    config: AgentConfig,
    algorithm: Algorithm,
) -> tuple[chex.Array, tuple[Metrics, chex.Array, chex.Array]]:
    """Compute the weighted sum of the losses; also metrics, and mean and spread [N] of q over candidates."""
    policy = _evaluate_policy(params, encoded, state, data, config, algorithm)
    terms = _critic_losses(params, encoded, state, data, policy, config, algorithm.expectile)
    actors = _actor_batch(params, state, data, policy)
    terms["actor"], metrics = algorithm.actor_loss(actors, config.temperature)
    simulated: Metrics = {}
    if data.simulated is not None and data.simulated.slates.shape[2]:
        simulated = _counterfactual_losses(params, encoded, state, data, policy, config)

    loss = jnp.sum(jnp.asarray(config.loss_weights, jnp.float32) * terms["feedback"]) + terms["continuation"]
    loss += _VALUE_WEIGHT * (terms["slate_bias"] + terms["value"]) + terms["actor"]
    if config.rewards_differ:
        loss += terms["reward_residual"]
    loss += config.counterfactual_weight * sum(simulated.values())

    objective = metrics.pop("objective", ())
    metrics |= {f"objective/{config.agent_signals[i]}": objective[i] for i in range(len(objective))}
    metrics |= {f"loss/{s}": terms["feedback"][i] for i, s in enumerate(config.all_signals.names)}
    metrics |= {f"loss/{name}": terms[name] for name in ("continuation", "slate_bias", "value")}
    metrics |= {f"loss/simulated_{name}": term for name, term in simulated.items()}
    metrics["value/main"] = jnp.sum(data.masks.request * policy.value[:, :-1, -1]) / data.counts.request
    q_mean = losses.candidate_mean(actors.q, actors.weight)  # [B, T, N]
    variance = losses.candidate_mean((actors.q - q_mean[..., None]) ** 2, actors.weight)
    return loss, (metrics, data.mean(q_mean), jnp.sqrt(data.mean(variance) + 1e-12))


class PolicyValues(NamedTuple):
    """The policy of an update, and its values at all T + 1 requests, without gradient."""

    scores_of: Callable[[Any], chex.Array]  # parameters of the actors -> scores [B, T+1, A, C]
    scores: chex.Array  # [B, T+1, A, C], with gradient
    pool: networks.CriticOutput  # of the target critics, for all candidates
    continue_prob: chex.Array  # [B, T+1], of another request after that exposure; of own critics [B, T+1, N]
    q: chex.Array  # [B, T+1, N, C], q_i(s, c) around that exposure
    value: chex.Array  # [B, T+1, N], Q_i(s, w) of that exposure
    next_value: chex.Array  # [B, T+1, N], what the request before bootstraps from


def _evaluate_policy(
    params, encoded, state, data: UpdateData, config: AgentConfig, algorithm: Algorithm
) -> PolicyValues:
    """Evaluate the main agent's exposure by the target critics; of an algorithm with an expectile, the logged one."""
    batch = data.batch
    user = jax.lax.stop_gradient(encoded.user)
    own = acting.apply_critics(config, state.target, state.params["actor"], user, data.candidates)
    base = acting.base_scores(config, acting.critics_of(state, config), own, batch.weight)

    def scores_of(p):
        return networks.Actor(config).apply(p, *user, data.candidates, base, batch.weight).scores

    scores = scores_of(params["actor"])
    if algorithm.expectile is None:
        w = jax.lax.stop_gradient(ops.relaxed_top_k(scores[..., -1, :], config.slate, 1.0, batch.weight))
    else:
        w = ops.slate_to_multihot(batch.slate, batch.slate_mask, batch.candidates.shape[-1])
    predicted = None if data.simulated is None else data.simulated.pool
    pool, continue_prob, q = pool_values(state, own, w, predicted, config)
    value = losses.slate_values(pool.slate_bias.min(axis=-2), q, w)
    next_value = value if algorithm.expectile is None else pool.value.min(axis=-2)
    return PolicyValues(scores_of, scores, pool, continue_prob, q, value, next_value)


def for_critics(config: AgentConfig, x: chex.Array) -> chex.Array:
    """Return what is of a slate or of its videos, [..., M], for the critics' predictions of staying: [..., 1, M] if
    each agent has its own."""
    return x[..., None, :] if config.own_critics else x


def pool_values(
    state: agent_state.AgentState,
    pool: networks.CriticOutput,
    w: chex.Array,
    predicted: types.FeedbackPrediction | None,
    config: AgentConfig,
) -> tuple[networks.CriticOutput, chex.Array, chex.Array]:
    """Compute the values of all candidates for each agent around an exposure, by the target critics.

    Args:
      pool: outputs of the target critics for all candidates.
      w: [B, T, C], the exposure.
      predicted: a feedback model's predictions for the same candidates; None, or a config that does not use them, for
        the critics alone.

    Returns:
      The critics' output, the probability of another request after the exposure [B, T] (of own critics [B, T, N]), and
      q_i(s, c) [B, T, N, C].
    """
    if predicted is not None and config.values_use_model:
        pool = networks.blend(pool, predicted, config.model_weight)
    continue_prob = heads.continue_prob(pool, for_critics(config, w))
    reward = losses.video_rewards(config.all_signals, pool, state.reward_scale, config.reward_terms)
    value = pool.value.min(axis=-2)
    q = losses.video_values(reward, pool.continue_item_logit, value, continue_prob, config.discount)
    return pool, continue_prob, q


def _critic_losses(
    params, encoded, state, data: UpdateData, policy: PolicyValues, config: AgentConfig, expectile
) -> Metrics:
    """Compute the losses of shown slates, means: "feedback" [S], the others scalars."""
    masks, counts, scale = data.masks, data.counts, state.reward_scale
    batch = data.batch.without_last()
    out = acting.apply_critics(config, params["critic"], state.params["actor"], encoded.user, encoded.shown)
    out = jax.tree.map(lambda x: x[:, :-1], out)
    reward = losses.rewards(batch.feedback, scale, config.reward_terms)  # [B, T, K, N]
    reward = jnp.einsum("btk,btkn->btn", masks.exposure, reward)
    # Every critic bootstraps with the main agent's next exposure.
    target = losses.td_targets(reward, policy.next_value[:, 1:], batch.terminated, config.discount)
    shown_q = jnp.take_along_axis(policy.q[:, :-1], batch.slate[:, :, None, :], axis=-1)  # [B, T, N, K]
    slate_q = jnp.einsum("btnk,btk->btn", shown_q, masks.exposure)
    slate_bias = losses.slate_bias_loss(out.slate_bias, slate_q, target)
    value = losses.value_loss(out.value, policy.value[:, :-1], expectile)
    continues = jnp.where(batch.terminated, 0.0, 1.0)
    if config.own_critics:
        continuation = heads.continuation_loss(out, masks.exposure[..., None, :], continues[..., None]).sum(axis=-1)
    else:
        continuation = heads.continuation_loss(out, masks.exposure, continues)
    per_signal = heads.feedback_loss(config.all_signals, out.feedback, batch.feedback, scale)
    terms = {
        "feedback": jnp.einsum("btk,btks->s", masks.exposure, per_signal) / counts.exposure,
        "continuation": jnp.sum(masks.next_known * continuation) / counts.next_known,
        "slate_bias": jnp.sum(masks.next_known[..., None, None] * slate_bias) / counts.next_known,
        "value": jnp.sum(masks.request[..., None, None] * value) / counts.request,
    }
    if config.rewards_differ:  # a shown video has no reward beyond its feedback
        terms["reward_residual"] = jnp.einsum("btk,btnk->", masks.exposure, out.reward_residual**2) / counts.exposure
    return terms


def _actor_batch(params, state, data: UpdateData, policy: PolicyValues) -> losses.ActorBatch:
    """Return what the actors learn from: the first T requests, without gradient but through their scores."""
    batch = data.batch.without_last()
    q, value = jax.lax.stop_gradient((policy.q, policy.pool.value.min(axis=-2)))
    slate_bias = jax.lax.stop_gradient(policy.pool.slate_bias.min(axis=-2))

    def jacobian(objectives):
        return jax.jacrev(lambda p: objectives(policy.scores_of(p)[:, :-1]))(params["actor"])

    return losses.ActorBatch(
        scores=policy.scores[:, :-1],
        q=q[:, :-1],
        slate_bias=slate_bias[:, :-1],
        value=value[:, :-1],
        q_mean=state.q_mean,
        q_scale=state.q_scale,
        slate=batch.slate,
        slate_mask=batch.slate_mask,
        weight=batch.weight,
        mean=data.mean,
        jacobian=jacobian,
    )


def _counterfactual_losses(
    params, encoded, state, data: UpdateData, policy: PolicyValues, config: AgentConfig
) -> Metrics:
    """Compute the losses of simulated slates, means over slates and requests, in units of those of shown slates."""
    out, slates = _counterfactuals(params, encoded, state, data, policy, config)
    over_slates = jax.vmap(
        functools.partial(losses.counterfactual_losses, config.all_signals),
        in_axes=(_OUT_AXES, _SLATE_AXES, None, None),
    )
    over_users = jax.vmap(jax.vmap(over_slates, in_axes=(0, 0, None, None)), in_axes=(0, 0, None, None))
    each = over_users(out, slates, state.reward_scale, config.discount)  # [B, T, M, ...]
    terms = {}
    if config.ablation != "constant_negative":  # a constant reward is not feedback
        weights = jnp.asarray(config.loss_weights, jnp.float32)
        feedback = each["feedback"].reshape(*data.masks.request.shape, -1, len(config.all_signals))  # [B, T, M K, S]
        terms["feedback"] = jnp.einsum("s,btms->bt", weights, feedback) / feedback.shape[2]
        terms["continuation"] = each["continuation"].mean(axis=-1)
    if config.rewards_differ:
        terms["reward_residual"] = each["reward_residual"].mean(axis=(2, 4)).sum(axis=-1)
    terms["slate_bias"] = _VALUE_WEIGHT * each["slate_bias"].sum(axis=(-2, -1)).mean(axis=-1)
    return {name: jnp.sum(data.masks.request * term) / data.counts.request for name, term in terms.items()}


# The axis of the M slates of a request, once users and requests are mapped over; None for what is of the request.
_OUT_AXES = networks.CriticOutput(
    feedback=-2, extra=-2, continue_logit=None, continue_item_logit=-2, reward_residual=-2, slate_bias=None, value=None
)
_SLATE_AXES = losses.CounterfactualStep(
    feedback=0,
    reward=0,
    reward_residual=0,
    continue_prob=0,
    next_value=0,
    video_reward=-2,
    continue_logit=None,
    continue_item_logit=0,
    value=None,
    policy_continue_prob=None,
)


def _counterfactuals(params, encoded, state, data: UpdateData, policy: PolicyValues, config: AgentConfig):
    """Return the critics' outputs for the videos of simulated slates, and the slates; axes as `_SLATE_AXES` says."""
    simulated, pool = jax.tree.map(lambda x: x[:, :-1], (data.simulated, policy.pool))
    z, memory_mean = encoded.user
    out = networks.Critic(config).apply(params["critic"], z[:, :-1], memory_mean[:, :-1], encoded.unseen[:, :-1])
    reward, reward_residual = _slate_rewards(simulated, out, state.reward_scale, config)
    flat = simulated.slates.reshape(*simulated.slates.shape[:2], -1)

    def apart(x):
        return x.reshape(*x.shape[:-1], *simulated.slates.shape[2:])  # [..., M K] -> [..., M, K]

    def of_slates(x, axes=()):
        return apart(jnp.take_along_axis(x, jnp.expand_dims(flat, axes), axis=-1))

    slates = losses.CounterfactualStep(
        feedback=simulated.expected,
        reward=reward,
        reward_residual=reward_residual,
        continue_prob=simulated.continue_prob,
        next_value=_next_values(params, encoded, state, data, config),
        video_reward=of_slates(
            losses.video_rewards(config.all_signals, pool, state.reward_scale, config.reward_terms), 2
        ),
        continue_logit=pool.continue_logit,
        continue_item_logit=of_slates(pool.continue_item_logit),
        value=pool.value.min(axis=-2),
        policy_continue_prob=policy.continue_prob[:, :-1],
    )
    out = dataclasses.replace(
        out,
        feedback=apart(out.feedback),
        extra=apart(out.extra),
        continue_item_logit=apart(out.continue_item_logit),
        reward_residual=None if out.reward_residual is None else apart(out.reward_residual),
    )
    return out, slates


def _slate_rewards(
    simulated: types.CounterfactualSlates, out: networks.CriticOutput, scale: chex.Array, config: AgentConfig
) -> tuple[chex.Array, chex.Array | None]:
    """Return rewards [B, T, M, N, K] of the videos of simulated slates, and the part of them that is not feedback.

    Args:
      out: the critics' outputs for the same videos.
    """
    terms = config.reward_terms
    if config.ablation == "constant_negative":  # the feedback heads are not fitted to the model
        own = jnp.moveaxis(heads.expected_feedback(config.all_signals, out.feedback, scale), -2, -1)
        expected = losses.rewards(own.reshape(*simulated.expected.shape), scale, terms)
        reward = jnp.full_like(expected, -1.0)
    else:
        expected = losses.rewards(simulated.expected, scale, terms)
        reward = losses.simulated_rewards(
            simulated.expected, simulated.uncertainty, scale, terms, config.uncertainty_bonus
        )
    reward_residual = jnp.moveaxis(reward - expected, -1, -2) if config.rewards_differ else None
    return jnp.moveaxis(reward, -1, -2), reward_residual


def _next_values(params, encoded, state, data: UpdateData, config: AgentConfig) -> chex.Array:
    """Compute the target values [B, T, M, N] of the states after the feedback sampled for each simulated slate."""
    simulated = jax.tree.map(lambda x: x[:, :-1], data.simulated)
    shown = jax.lax.stop_gradient(encoded.unseen[:, :-1]).reshape(*simulated.slates.shape, -1)
    users, m = user_encoders.of(config), simulated.slates.shape[2]
    assert data.inputs.unseen_duration is not None
    duration = data.inputs.unseen_duration[:, :-1].reshape(simulated.slates.shape)
    asked = jnp.repeat(data.inputs.context[:, :-1, None], m, axis=2)
    seen = users.shown(params["encoder"], shown, simulated.sampled, duration, None, asked)
    before = jax.tree.map(lambda x: jnp.repeat(x[:, :-1, None], m, axis=2), encoded.carry)
    after = users.update(params["encoder"], before, seen)

    def tile(x):
        return jnp.broadcast_to(x, (*simulated.continue_prob.shape, x.shape[-1]))

    row = embedding_table.lookup(state.tables[embeddings.USER_TABLE], data.inputs.ids[embeddings.USER_TABLE])
    profile, context = data.inputs.profile[:, None, None], data.batch.next_context()[:, :, None]
    user = (tile(row[:, None, None]), tile(profile), tile(context))
    z = users.read(params["encoder"], after, *user)
    nothing = jnp.zeros((*z.shape[:-1], 0, shown.shape[-1]), jnp.float32)
    return networks.Critic(config).apply(state.target, z, after.mean(), nothing).value.min(axis=-2)
