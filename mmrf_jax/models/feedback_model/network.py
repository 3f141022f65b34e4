"""The feedback fitting model g: twin predictors of every signal and of staying (MMRF, section 4).

The recurrence over the session is a user encoder (`models.user_encoders`). One batched product scores all candidates of
a request. The twins have separate parameters and embedding rows; where both are in one array, they are the first axis,
2.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import struct

from mmrf_jax import types
from mmrf_jax.data.session_log import InputSpec
from mmrf_jax.models import embedding_table, embeddings, encoders, heads, kinds, representation, user_encoders
from mmrf_jax.models.feedback_model import exposure
from mmrf_jax.models.feedback_model.config import TWINS, FeedbackConfig
from mmrf_jax.models.optimization import make_optimizer
from mmrf_jax.parallel import programs

BINS, QUANTILES = 16, 65  # of the residuals of levels: bins by prediction, quantiles per bin


@struct.dataclass
class FeedbackState:
    """The full state of fitting; all of it is checkpointed."""

    step: chex.Array  # int32, updates so far
    params: Any  # {"encoder", "heads"}, leading axis TWINS
    optimizer: Any
    tables: dict[str, embedding_table.Table]  # rows of both twins, concatenated
    scale: chex.Array  # [S] standard deviation of each signal in the first log
    uncertainty_scale: chex.Array  # [S] mean uncertainty on impressions
    calibration: chex.Array  # [E, 2, S - Q] slope and offset of the log-odds of binary signals, on held-out days
    residual: chex.Array  # [Q] standard deviation of the residuals of each numeric signal's level (`models.kinds`)
    edges: chex.Array  # [Q, BINS - 1] of the predicted level
    quantiles: chex.Array  # [Q, BINS, QUANTILES] of the residuals in each bin
    key: chex.Array  # typed key


def _heads(config: FeedbackConfig) -> heads.FeedbackHeads:
    """Return the heads of one twin; the extra ones predict the mean levels of the Q numeric signals."""
    numeric = len(config.all_signals.numeric)
    return heads.FeedbackHeads(config.all_signals, extra=numeric, ceilings=True, dtype=config.compute_dtype)


def _exposure_head(config: FeedbackConfig) -> exposure.ExposureHead:
    return exposure.ExposureHead(config.compute_dtype)


def init_feedback_state(
    key: types.Key,
    config: FeedbackConfig,
    spec: InputSpec,
    items: types.Items,
    feedback_mean: chex.Array,
    feedback_std: chex.Array,
) -> FeedbackState:
    """Initialise the state.

    Args:
      feedback_mean: [S] of the exposures in the first log; the heads start from it, binary signals from 0.88 of it (the
        first ceiling).
      feedback_std: [S] of the same exposures.
    """
    k_params, k_tables, k_state = jax.random.split(key, 3)
    z_size, dim = encoders.sizes(config, spec)
    z = jnp.zeros((1, z_size), jnp.float32)
    reads = user_encoders.of(config).init((1,), dim).mean()
    signals = config.all_signals
    scale = jnp.maximum(jnp.asarray(feedback_std, jnp.float32), 1e-3)
    below = [0.5 if i in signals.amounts else 0.0 for i in signals.numeric]  # a mean of logarithms is the smaller one
    level = kinds.levels(signals, feedback_mean, scale) - jnp.asarray(below, jnp.float32)
    prior = jnp.append(heads.prior(signals, feedback_mean, feedback_std), level)

    def one(key):
        k1, k2 = jax.random.split(key)
        head = _heads(config).init(k2, z, reads, jnp.zeros((1, 1, dim), jnp.float32))
        head["params"]["prior"] = prior[:, None].astype(jnp.float32)
        params = {"encoder": encoders.init_encoder(k1, config, spec), "heads": head}
        if config.debias is not None:
            k3 = jax.random.fold_in(key, 2)
            params["exposure"] = _exposure_head(config).init(k3, z, reads, jnp.zeros((1, 1, dim), jnp.float32))
        return params

    params = jax.vmap(one)(jax.random.split(k_params, TWINS))
    ones, num_binary, num_numeric = jnp.ones(len(signals), jnp.float32), len(signals.binary), len(signals.numeric)
    return FeedbackState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        optimizer=make_optimizer(config).init(params),
        tables=embeddings.init_tables(k_tables, config, spec, items, copies=TWINS),
        scale=scale,
        uncertainty_scale=ones,
        calibration=jnp.stack([jnp.stack([ones[:num_binary], 0.0 * ones[:num_binary]])] * config.exposures),
        residual=jnp.ones((num_numeric,), jnp.float32),
        edges=jnp.zeros((num_numeric, BINS - 1), jnp.float32),
        quantiles=jnp.zeros((num_numeric, BINS, QUANTILES), jnp.float32),
        key=k_state,
    )


def twin_rows(rows: dict[str, chex.Array]) -> dict[str, chex.Array]:
    """Split looked-up rows [..., 2 d] into twins [2, ..., d]."""
    return {name: embeddings.split_rows(row, TWINS) for name, row in rows.items()}


def encode(
    config: FeedbackConfig,
    params: Any,
    rows: dict[str, chex.Array],
    inputs: representation.EncoderInputs,
    key: types.Key | None = None,
) -> representation.Encoded:
    """Apply `models.representation.encode` per twin, leading axis 2; `key` gives each twin its dropout masks."""

    def one(p, r, k, feature_dropout):
        return representation.encode(config, p, r, inputs, k, feature_dropout)

    keys = None if key is None else jax.random.split(key, TWINS)
    feature_dropout = jnp.asarray(config.twin_feature_dropout, jnp.float32) if any(config.twin_feature_dropout) else 0.0
    axes = (0, 0, None if key is None else 0, 0 if any(config.twin_feature_dropout) else None)
    return jax.vmap(one, in_axes=axes)(params["encoder"], twin_rows(rows), keys, feature_dropout)


def encode_batch(
    config: FeedbackConfig,
    state: FeedbackState,
    batch: types.SessionBatch,
    items: types.Items,
    unseen: chex.Array | None = None,
    at_random: bool = False,
) -> representation.Encoded:
    """Gather, look up and `encode` a batch without dropout.

    Args:
      at_random: as of `models.representation.gather`.
    """
    inputs = representation.gather(batch, items, unseen, at_random)
    return encode(config, state.params, embeddings.lookup(state.tables, inputs.ids), inputs)


def encode_videos(
    config: FeedbackConfig,
    state: FeedbackState,
    items: types.Items,
    videos: chex.Array,
    date: chex.Array | None = None,
) -> chex.Array:
    """Encode videos [...] by both twins, without dropout: [2, ..., D]; `date` as of `Items.features_of`."""
    tables = {name: state.tables[name] for name in embeddings.VIDEO_TABLES}
    rows = twin_rows(embeddings.lookup(tables, embeddings.video_ids(items, videos)))

    def apply(p, r):
        return encoders.Encoder(config).apply(p, r, items.features_of(videos, date), method="items")

    return jax.vmap(apply)(state.params["encoder"], rows)


@programs.program(calls="few", static_argnames="config")
def encode_items(state: FeedbackState, items: types.Items, config: FeedbackConfig) -> chex.Array:
    """Encode all V videos by both twins: [2, V, D]."""

    def encode(videos):
        return jnp.moveaxis(encode_videos(config, state, items, videos), 0, 1)

    return jnp.moveaxis(embeddings.map_over_items(encode, items.num_videos), 1, 0)


def encode_known(
    config: FeedbackConfig, state: FeedbackState, encodings: chex.Array, inputs: representation.EncoderInputs
) -> representation.Encoded:
    """Compute `encode` without dropout, from the encodings [2, V, D] of `encode_items`."""
    users = {embeddings.USER_TABLE: inputs.ids[embeddings.USER_TABLE]}
    rows = twin_rows(embeddings.lookup(state.tables, users))[embeddings.USER_TABLE]
    # One lookup, in the order of the products that use it: slices of one array would be copied twice.
    first = encodings.shape[1] * jnp.arange(TWINS, dtype=jnp.int32)

    def of(videos):
        twins = first.reshape(TWINS, *(1,) * videos.ndim)
        place = jax.lax.broadcast_to_rank(videos, twins.ndim) + twins
        return encodings.reshape(-1, encodings.shape[-1])[place]

    def one(p, seen, unseen, r):
        return representation.encode_users(config, p, (seen, unseen), r, inputs)

    return jax.vmap(one)(state.params["encoder"], of(inputs.seen), of(inputs.unseen), rows)


def predict(config: FeedbackConfig, params: Any, z: chex.Array, memory_mean: chex.Array, videos: chex.Array):
    """Predict by both twins: z [2, ..., Z], memory [2, ..., L, F, D], encodings [2, ..., M, D]."""
    return jax.vmap(_heads(config).apply)(params["heads"], z, memory_mean, videos)


def exposure_scores(
    config: FeedbackConfig, params: Any, encoded: representation.Encoded, videos: chex.Array
) -> chex.Array:
    """Score videos [2, ..., M, D] as the logging ranker would, by both twins: [2, ..., M]. Only the head learns."""
    inputs = jax.lax.stop_gradient((*encoded.user, videos))
    return jax.vmap(_exposure_head(config).apply)(params["exposure"], *inputs)


def calibrated(
    config: FeedbackConfig, out: heads.Prediction, calibration: chex.Array, context: chex.Array
) -> heads.Prediction:
    """Scale and shift the log-odds of binary signals (Platt, 1999).

    Args:
      out: predictions at requests [...], twins on the first axis.
      calibration: [E, 2, S - Q] slopes and offsets of each kind of exposure.
      context: [..., Dx] of the requests. If E is 2, its first column is 1 for videos exposed at random.
    """
    chosen = calibration[0]
    if len(calibration) == 2:
        random = types.exposed_at_random(jnp.asarray(context))[..., None, None]
        chosen = jnp.where(random, *(jax.lax.broadcast_to_rank(x, random.ndim) for x in calibration[::-1]))
    slope, offset = (jax.lax.broadcast_to_rank(chosen[..., i, :, None], out.feedback.ndim) for i in range(2))
    binary, numeric = config.all_signals.binary, config.all_signals.numeric
    scaled = slope * kinds.take(out.feedback, binary, -2) + offset
    feedback = kinds.join({binary: scaled, numeric: kinds.take(out.feedback, numeric, -2)}, axis=-2)
    return dataclasses.replace(out, feedback=feedback)


def mean_of_twins(x: chex.Array) -> chex.Array:
    """Average the twins, [2, ...] -> [...]; a sum that fuses with its inputs is faster than so short a reduction."""
    return 0.5 * (x[0] + x[1])


def expected(config: FeedbackConfig, out: heads.Prediction, scale: chex.Array) -> chex.Array:
    """Return expected feedback [..., M, S], the mean of the twins: probabilities, seconds, counts and values."""
    return jnp.moveaxis(mean_of_twins(heads.expected_feedback(config.all_signals, out.feedback, scale)), -2, -1)


def mean_levels(out: heads.Prediction) -> chex.Array:
    """Return the predicted levels [..., M, Q] of the numeric signals, the mean of the twins (`models.kinds`)."""
    return jnp.moveaxis(mean_of_twins(out.extra), -2, -1)


def continue_prob(out: heads.Prediction, w: chex.Array) -> chex.Array:
    """Return the probability [...] of another request after exposures w [..., M], the mean of the twins."""
    return mean_of_twins(heads.continue_prob(out, w))


def divergence(config: FeedbackConfig, out: heads.Prediction, residual: chex.Array) -> chex.Array:
    """Compute the KL divergence between the twins [..., M, S]: u = (KL(p || q) + KL(q || p)) / 2.

    Bernoulli for binary signals; for the others Gaussian on their levels (log1p seconds), both with the standard
    deviation `residual` [Q].
    """
    binary, numeric = config.all_signals.binary, config.all_signals.numeric
    log_odds = kinds.take(out.feedback, binary, -2)
    p = jax.nn.sigmoid(log_odds)
    # KL(p || q) + KL(q || p) = (p - q) (logit p - logit q)
    bernoulli = 0.5 * (p[0] - p[1]) * (log_odds[0] - log_odds[1])
    mean = out.extra
    gaussian = (mean[0] - mean[1]) ** 2 / jax.lax.broadcast_to_rank((2.0 * residual**2)[:, None], mean.ndim - 1)
    return jnp.moveaxis(kinds.join({binary: bernoulli, numeric: gaussian}, axis=-2), -2, -1)


def uncertainty(
    config: FeedbackConfig,
    state: FeedbackState,
    inputs: representation.EncoderInputs,
    key: types.Key,
) -> chex.Array:
    """Average the divergence of the twins over dropout masks: [B, T+1, K + M, S], shown videos first."""
    rows = embeddings.lookup(state.tables, inputs.ids)

    def one(key):
        encoded = encode(config, state.params, rows, inputs, key)
        videos = jnp.concatenate([encoded.shown, encoded.unseen], axis=-2)
        return divergence(config, predict(config, state.params, *encoded.user, videos), state.residual)

    return jax.vmap(one)(jax.random.split(key, config.num_mc_dropout_samples)).mean(axis=0)
