"""One jitted update of encoder, critics, actors, targets and tables from a batch of session segments."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from mmrf_jax import ops, types
from mmrf_jax.agents.mmrf import acting, agent_state, losses, networks
from mmrf_jax.agents.mmrf.config import AgentConfig
from mmrf_jax.models import embeddings, encoders, heads, optimization, representation

_SCALE_RATE = 0.01  # of the running spread of the critics
_VALUE_WEIGHT = 0.1  # of the TD losses relative to the feedback losses
PROJECTION_WEIGHT = 0.1  # of the regression of scores on their maximiser


class ActorBatch(NamedTuple):
    """Inputs of policy improvement: T requests of a batch and the critics' outputs for them, without gradient."""

    actor: Any  # parameters
    act: Callable[[Any], chex.Array]  # actor parameters -> scores [B, T, A, C]
    scores: chex.Array  # [B, T, A, C], scores of `actor`
    q: chex.Array  # [B, T, N, C], q_i(s, c)
    base: chex.Array  # [B, T, N], b_i(s)
    value: chex.Array  # [B, T, N], V_i(s) of the target critics
    logged: chex.Array  # [B, T, C], 1 where a candidate was shown
    weight: chex.Array | None  # [B, T, C], number of candidates that each represents; None for 1 each
    batch: types.SessionBatch  # of T + 1 requests
    mean: Callable[[chex.Array], chex.Array]  # [B, T, ...] -> [...], this device's part of the mean over requests


class Algorithm(NamedTuple):
    """The parts that distinguish one actor-critic algorithm from another.

    Attributes:
      improve: (config, state, ActorBatch, reduction) -> this device's part of the loss of the scores, and metrics.
      expectile: None if values are those of the current policy. Else values are this expectile over logged slates
        (Kostrikov et al., 2021), and only logged exposures are evaluated.
    """

    improve: Callable[..., tuple[chex.Array, dict[str, chex.Array]]]
    expectile: float | None = None


def policy_gradient(
    config: AgentConfig, state: agent_state.AgentState, view: ActorBatch, reduction: optimization.Reduction
) -> tuple[chex.Array, dict[str, chex.Array]]:
    """Compute MMRF's actor loss: the deterministic policy gradient through the relaxed exposure of agents' scores.

    The gradient vanishes where w is near 0 or 1, and it does not determine a request's mean score. So scores are also
    regressed on the objective's maximiser, which is informative far from the cut and comparable across requests.
    """
    objective = view.mean(objectives(config, state, view.scores, view.q, view.weight))  # [N]
    projected = view.mean(projection(view.scores, maximiser(config, state, view.q), view.weight).sum(axis=-1))
    metrics = {"loss/projection": projected}
    metrics |= {f"objective/{s}": objective[i] for i, s in enumerate(config.agent_signals)}
    return PROJECTION_WEIGHT * projected - jnp.sum(objective), metrics


def objectives(
    config: AgentConfig,
    state: agent_state.AgentState,
    scores: chex.Array,
    q: chex.Array,
    weight: chex.Array | None = None,
) -> chex.Array:
    """Compute the actors' objectives [B, T, N]: values q [B, T, N, C] at the relaxed exposures of scores [B, T, A, C].

    Args:
      weight: [B, T, C], see `ops.soft_top_k`.
    """
    weight = None if weight is None else weight[:, :, None]
    scaled = jax.lax.stop_gradient(q / jax.lax.broadcast_to_rank(state.q_scale[:, None], q.ndim))
    return losses.policy_objective(scores, scaled, config.slate, config.temperature, weight)


def maximiser(config: AgentConfig, state: agent_state.AgentState, q: chex.Array) -> chex.Array:
    """Return `acting.optimal_scores` of values [B, T, N, C]."""
    return acting.optimal_scores(config, state.q_mean, state.q_scale, q)


def projection(scores: chex.Array, wanted: chex.Array, weight: chex.Array | None = None) -> chex.Array:
    """Compute the mean squared distance [B, T, A] of scores [B, T, A, C] to targets; weight is [B, T, C] or None."""
    distance = (scores - jnp.clip(wanted, -acting.MAX_SCORE, acting.MAX_SCORE)) ** 2
    return _mean(distance, weight)


def _mean(x: chex.Array, weight: chex.Array | None) -> chex.Array:
    """Average [B, T, N, C] over the candidates, with weights [B, T, C]."""
    if weight is None:
        return jnp.mean(x, axis=-1)
    return jnp.einsum("btnc,btc->btn", x, weight / weight.sum(axis=-1, keepdims=True))


MMRF = Algorithm(policy_gradient)


def update(
    state: agent_state.AgentState,
    batch: types.SessionBatch,
    items: types.Items,
    config: AgentConfig,
    rate: chex.Numeric = 1.0,
    simulated: types.CounterfactualSlates | None = None,
    axis_name: str | None = None,
    learner: Algorithm = MMRF,
) -> tuple[agent_state.AgentState, dict[str, chex.Array]]:
    """Run one update; jit it with `config` static and `state` donated.

    Args:
      batch: segments of T + 1 requests; the first T are learned from.
      rate: factor on the learning rates.
      simulated: unshown videos with a feedback model's predicted feedback, learned from in addition to the impressions,
        with weight `config.counterfactual_weight`; and the model's predictions for all candidates, which values also
        use. None for impressions and the agents' critics alone.
      axis_name: see `optimization.Reduction`.
      learner: the algorithm of MMRF, or of a baseline with the same encoders and critics.

    Returns:
      The next state and scalar metrics.
    """
    reduction = optimization.Reduction(axis_name)
    key = reduction.fold(jax.random.fold_in(state.key, state.step))
    candidates = embeddings.encode_videos(
        config, state.params["encoder"], state.tables, items, batch.candidates, batch.date
    )
    unseen = None
    if simulated is not None:
        flat = simulated.slates.reshape(*simulated.slates.shape[:2], -1)
        unseen = jnp.take_along_axis(batch.candidates, flat, axis=-1)  # [B, T+1, M K]

    def loss_fn(params, rows):
        return _loss(params, rows, state, batch, simulated, unseen, items, candidates, key, config, reduction, learner)

    ids = representation.ids(batch, items, unseen)
    next_state, (metrics, mean, spread), grad_norm = agent_state.step(state, ids, loss_fn, config, reduction, rate)
    # The first spread is taken in full: after a handful of updates the running mean would still be near 1.
    blend = jnp.where(state.step == 0, 1.0, _SCALE_RATE)
    next_state = dataclasses.replace(
        next_state,
        q_mean=(1.0 - blend) * state.q_mean + blend * mean,
        q_scale=(1.0 - blend) * state.q_scale + blend * spread,
    )
    return next_state, reduction.sum(metrics) | {"grad_norm": grad_norm}


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
      The critics' output, the probability of another request after the exposure [B, T], and q_i(s, c) [B, T, N, C].
    """
    if predicted is not None and config.uses_model:
        pool = networks.blend(pool, predicted, config.model_weight)
    stay = heads.continue_probability(pool, w)
    return pool, stay, losses.video_values(config, pool, pool.value.min(axis=-2), stay, state.reward_scale)


def main_exposure(scores: chex.Array, config: AgentConfig, weight: chex.Array | None = None) -> chex.Array:
    """Return the main agent's exposure [B, T, C] of scores [B, T, A, C], no gradient; see `ops.soft_top_k`."""
    return jax.lax.stop_gradient(ops.soft_top_k(scores[..., -1, :], config.slate, 1.0, weight))


def _loss(params, rows, state, batch, simulated, unseen, items, candidates, key, config, reduction, learner):
    r = representation.represent(config, params["encoder"], rows, batch, items, key, unseen)
    learn = representation.loss_masks(batch)
    actor, critic = networks.Actor(config), networks.Critic(config)

    def count(x):
        return jnp.maximum(reduction.sum(x.sum()), 1.0)

    num_exposed, num_requests, num_known = count(learn.exposed), count(learn.request), count(learn.known)

    # Critics on shown videos, with gradient; on all candidates, for targets and actors, without.
    shown = critic.apply(params["critic"], r.z, r.memory_mean, r.shown)
    still = jax.lax.stop_gradient((r.z, r.memory_mean))
    own = critic.apply(state.target, *still, candidates)
    base = acting.base_scores(config, acting.critics_of(state, config), own, batch.weight)

    def act(p):
        return actor.apply(p, *still, candidates, base, batch.weight).scores

    scores = act(params["actor"])  # [B, T+1, A, C]
    logged = ops.slate_to_multihot(batch.slate, batch.slate_mask, batch.candidates.shape[-1])
    w_main = main_exposure(scores, config, batch.weight) if learner.expectile is None else logged
    predicted = None if simulated is None else simulated.pool
    pool, stay_main, q = pool_values(state, own, w_main, predicted, config)
    value = losses.slate_values(pool.base.min(axis=-2), q, w_main)  # [B, T+1, N], of the current policy, or the log's

    # Feedback and staying, by supervision.
    feedback = batch.feedback[:, :-1]
    per_signal = heads.feedback_loss(config.all_signals, shown.feedback[:, :-1], feedback, state.reward_scale)
    feedback_loss = jnp.einsum("btk,btks->s", learn.exposed, per_signal) / num_exposed
    stay_logit = shown.continue_logit[:, :-1] + jnp.sum(learn.exposed * shown.continue_item_logit[:, :-1], axis=-1)
    stays = jnp.where(batch.terminated[:, :-1], 0.0, 1.0)
    stay_loss = jnp.sum(learn.known * optax.sigmoid_binary_cross_entropy(stay_logit, stays)) / num_known

    # Twin values by TD; every critic bootstraps with the main agent's next exposure.
    next_value = value if learner.expectile is None else pool.value.min(axis=-2)
    reward = losses.rewards(config, feedback, state.reward_scale)  # [B, T, K, N]
    reward = jnp.einsum("btk,btkn->btn", learn.exposed, reward)
    target = losses.td_targets(reward, next_value[:, 1:], batch.terminated[:, :-1], config.discount)
    shown_q = jnp.take_along_axis(q[:, :-1], batch.slate[:, :-1, None, :], axis=-1)  # [B, T, N, K]
    slate_q = jnp.einsum("btnk,btk->btn", shown_q, learn.exposed)
    td_error = shown.base[:, :-1] + jax.lax.stop_gradient(slate_q - target)[..., None, :]  # [B, T, 2, N]
    base_loss = jnp.sum(learn.known[..., None, None] * td_error**2) / num_known
    value_error = shown.value[:, :-1] - jax.lax.stop_gradient(value[:, :-1])[..., None, :]
    squared = value_error**2
    if learner.expectile is not None:
        squared *= jnp.where(value_error < 0.0, learner.expectile, 1.0 - learner.expectile)
    value_loss = jnp.sum(learn.request[..., None, None] * squared) / num_requests

    q_, base_, value_ = jax.lax.stop_gradient((q, pool.base.min(axis=-2), pool.value.min(axis=-2)))
    view = ActorBatch(
        actor=params["actor"],
        act=lambda p: act(p)[:, :-1],
        scores=scores[:, :-1],
        q=q_[:, :-1],
        base=base_[:, :-1],
        value=value_[:, :-1],
        logged=logged[:, :-1],
        weight=None if batch.weight is None else batch.weight[:, :-1],
        batch=batch,
        mean=lambda x: jnp.einsum("bt,bt...->...", learn.request, x) / num_requests,
    )
    improvement, improved = learner.improve(config, state, view, reduction)

    mean_q = _mean(q[:, :-1], view.weight)  # [B, T, N]
    centred = q[:, :-1] - mean_q[..., None]
    average = reduction.sum(jnp.einsum("bt,btn->n", learn.request, mean_q)) / num_requests
    spread = reduction.sum(jnp.einsum("bt,btn->n", learn.request, _mean(centred**2, view.weight))) / num_requests
    loss = jnp.sum(jnp.asarray(config.loss_weights, jnp.float32) * feedback_loss) + stay_loss
    loss += _VALUE_WEIGHT * (base_loss + value_loss) + improvement
    if config.rewards_differ:
        loss += jnp.einsum("btk,btnk->", learn.exposed, shown.gap[:, :-1] ** 2) / num_exposed
    metrics = {f"loss/{s}": feedback_loss[i] for i, s in enumerate(config.all_signals.names)}
    metrics |= {"loss/stay": stay_loss, "loss/base": base_loss, "loss/value": value_loss}
    metrics |= improved
    metrics["value/main"] = jnp.sum(learn.request * value[:, :-1, -1]) / num_requests
    if simulated is not None and simulated.slates.shape[2]:
        terms = _simulated_losses(params, state, batch, simulated, r, pool, stay_main, items, config)
        terms = {name: jnp.sum(learn.request * term) / num_requests for name, term in terms.items()}
        loss += config.counterfactual_weight * sum(terms.values())
        metrics |= {f"loss/simulated_{name}": term for name, term in terms.items()}
    return loss, (metrics, average, jnp.sqrt(spread + 1e-12))


def _simulated_losses(params, state, batch, simulated, r, pool, stay_main, items, config) -> dict[str, chex.Array]:
    """Compute means over the simulated slates of each request, [B, T] each: the same losses as on shown videos.

    A slate is one step of the feedback model: (s, w', r, s', p_stay), where s' is the agents' state after the feedback
    sampled for the slate.
    """
    critic = networks.Critic(config)
    num_slates, k = simulated.slates.shape[2:]
    s = jax.tree.map(lambda x: x[:, :-1], simulated)

    def flat(x):
        return x.reshape(*x.shape[:2], num_slates * k, *x.shape[4:])  # [B, T, M, K, …] -> [B, T, M K, …]

    def apart(x):
        return x.reshape(*x.shape[:-1], num_slates, k)

    out = critic.apply(params["critic"], r.z[:, :-1], r.memory_mean[:, :-1], r.unseen[:, :-1])
    terms = {}
    if config.ablation != "constant_negative":  # a constant reward is not feedback
        feedback = heads.feedback_loss(config.all_signals, out.feedback, flat(s.expected), state.reward_scale)
        terms["feedback"] = jnp.einsum("s,btms->bt", jnp.asarray(config.loss_weights, jnp.float32), feedback) / (
            num_slates * k
        )
        logit = out.continue_logit[..., None] + apart(out.continue_item_logit).sum(axis=-1)
        terms["stay"] = optax.sigmoid_binary_cross_entropy(logit, s.stay).mean(axis=-1)
    reward = losses.simulated_rewards(config, flat(s.expected), flat(s.uncertainty), state.reward_scale)
    reward = jnp.moveaxis(reward, -1, -2)  # [B, T, N, M K]
    if config.rewards_differ:
        expected = flat(s.expected)
        if config.ablation == "constant_negative":  # the feedback heads are not fitted to the model
            expected = jnp.moveaxis(
                heads.expected_feedback(config.all_signals, out.feedback, state.reward_scale), -2, -1
            )
        expected = jnp.moveaxis(losses.rewards(config, expected, state.reward_scale), -1, -2)
        gap = jax.lax.stop_gradient(reward - expected)
        terms["gap"] = jnp.mean((out.gap - gap) ** 2, axis=-1).sum(axis=-1)

    shown_next = jax.lax.stop_gradient(r.unseen[:, :-1]).reshape(*s.slates.shape, -1)
    positions = flat(s.slates)
    duration = items.duration[jnp.take_along_axis(batch.candidates[:, :-1], positions, axis=-1)]
    encoder = encoders.Encoder(config)
    answered = encoder.apply(params["encoder"], s.sampled, duration.reshape(s.slates.shape), method="feedback")
    before = jax.tree.map(lambda x: jnp.repeat(x[:, :-1, None], num_slates, axis=2), r.memory)
    after = encoders.memory_write(config, before, shown_next, answered)
    context = representation.next_context(batch)

    def tile(x):
        return jnp.broadcast_to(x, (*s.stay.shape, x.shape[-1]))

    row = embeddings.lookup(state.tables, {embeddings.USER_TABLE: batch.user_id})[embeddings.USER_TABLE]
    user = (tile(row[:, None, None]), tile(batch.profile[:, None, None]), tile(context[:, :, None]))
    z = encoder.apply(params["encoder"], after, *user, method="user")
    nothing = jnp.zeros((*z.shape[:-1], 0, shown_next.shape[-1]), jnp.float32)
    value = critic.apply(state.target, z, after.mean(), nothing).value.min(axis=-2)  # [B, T, M, N]
    slate_reward = jnp.moveaxis(apart(reward).sum(axis=-1), -1, -2)  # [B, T, M, N]
    target = slate_reward + config.discount * s.stay[..., None] * value
    # Staying enters by its probability, not to first order: these slates are far from the main agent's, and the single
    # base of a state would be biased to absorb the difference.
    pool = jax.tree.map(lambda x: x[:, :-1], pool)

    def of_slates(x, axes):
        return apart(jnp.take_along_axis(x, jnp.expand_dims(positions, axes), axis=-1)).sum(axis=-1)

    stays = jax.nn.sigmoid(pool.continue_logit[..., None] + of_slates(pool.continue_item_logit, ()))  # [B, T, M]
    change = config.discount * (stays - stay_main[:, :-1, None])[:, :, None] * pool.value.min(axis=-2)[..., None]
    slate_q = of_slates(losses.video_rewards(config, pool, state.reward_scale), 2) + change  # [B, T, N, M]
    error = out.base[:, :, None] + jax.lax.stop_gradient(jnp.moveaxis(slate_q, -1, -2) - target)[..., None, :]
    terms["base"] = _VALUE_WEIGHT * jnp.sum(error**2, axis=(-2, -1)).mean(axis=-1)
    return terms
