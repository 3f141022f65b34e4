"""The videos of the world: hidden ground truth, and the features that the platform sees."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mmrf_jax import types
from mmrf_jax.envs.short_video import parameters

# Durations follow the quantiles over videos of KuaiRand's random log (seconds).
_DURATION_Q = (0.0, 0.02, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
_DURATION_S = (5.0, 8.0, 28.4, 77.6, 147.0, 235.0, 330.0, 600.0)
TASTE_SPREAD = 0.5  # of tastes about the centroid of their topic
QUALITY_SPREAD = 0.7  # of an author's quality and clickbait, and of a video's about its author's
POPULARITY = 0.3  # weight of quality and of clickbait in the logarithm of popularity, whose noise is 1
CONTENT_NOISE = 0.06  # of the platform's view of a taste vector
MIX_NOISE = 0.8  # of its view of quality and clickbait
MIX = ((1.0, 0.6, -0.5, 0.8), (0.5, -0.9, 1.0, 0.7))  # quality and clickbait, in what the platform sees of them
_AUTHORS_PER_TOPIC = 1 / 60  # authors per video of a topic


def _unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def make_world_params(config: parameters.WorldConfig) -> parameters.WorldParams:
    """Build the world's parameters, with the platform's view of its V videos; a pure function of the config."""
    arrays = _draw(config.seed, config.num_videos)
    topic, upload, rank = (np.asarray(arrays[k]) for k in ("topic", "upload", "popularity"))
    num_popular = max(config.candidates, config.num_videos // 50)
    if config.candidates == config.num_videos:
        num_popular = max(1, config.num_videos // 50)
    # Popular videos were all uploaded before day 0; the others are sorted by topic, oldest first.
    old = np.where(upload < -3)[0]
    popular = old[np.argsort(-rank[old], kind="stable")][:num_popular]
    num_popular = len(popular)
    rest = np.setdiff1d(np.arange(config.num_videos), popular)
    rest = rest[np.lexsort((upload[rest], topic[rest]))]
    order = np.concatenate([popular, rest])
    rest_topic, rest_upload = topic[rest], upload[rest]
    days = np.arange(parameters.FIRST_DAY, parameters.LAST_DAY + 1)
    start = num_popular + np.searchsorted(rest_topic, np.arange(parameters.TOPICS))
    live = np.zeros((len(days), parameters.TOPICS), np.int32)
    for t in range(parameters.TOPICS):
        live[:, t] = np.searchsorted(rest_upload[rest_topic == t], days - 3, side="right")
    by_upload = np.argsort(rest_upload, kind="stable")
    uploaded = np.searchsorted(rest_upload[by_upload], days, side="right")
    ordered = _order(
        arrays, order.astype(np.int32), np.arange(parameters.TOPICS, dtype=np.int32), config.seed, config.variant
    )

    def put(x):
        return jax.device_put(np.asarray(x, np.int32))

    items = types.Items(
        author=ordered["author"],
        tag=ordered["topic"],
        duration=ordered["duration"],
        features=ordered["features"],
        embedding_id=put(np.arange(config.num_videos)),
        num_embeddings=config.num_videos,
        num_authors=parameters.TOPICS * _authors(config.num_videos),
        num_tags=parameters.TOPICS,
    )
    return parameters.WorldParams(
        hidden=ordered["hidden"],
        topic=ordered["topic"],
        centroids=arrays["centroids"],
        topic_weight=ordered["topic_weight"],
        cluster_start=put(start),
        cluster_live=put(live),
        by_upload=put(num_popular + by_upload),
        uploaded=put(uploaded),
        popular_edges=put(_zipf_edges(num_popular, split(config.candidates)[1])),
        user_key=ordered["user_key"],
        behaviour=parameters.behaviour(config.variant),
        items=items,
        config=config,
    )


def _authors(num_videos: int) -> int:
    return max(2, int(num_videos / parameters.TOPICS * _AUTHORS_PER_TOPIC))


@functools.partial(jax.jit, static_argnames="variant")
def _order(arrays, order, topics, seed, variant: str):
    """Put the arrays of `_draw` in the final order of videos, and add those that do not depend on it; one program."""
    at = {name: arrays[name][order] for name in ("hidden", "topic", "author", "visible", "popularity")}
    # `topics` is an argument because XLA folds constants with a different logarithm.
    zipf = -0.4 * jnp.log(1.0 + topics.astype(jnp.float32))
    return {
        "hidden": at["hidden"],
        "topic": at["topic"],
        "author": at["author"],
        "duration": jnp.exp(at["hidden"][:, parameters.LATENT + 2]),
        "features": jnp.concatenate([at["visible"], at["popularity"][:, None] / 2.0], axis=-1).astype(jnp.float32),
        # The shifted mix of users: the rare topics of the base world are its common ones.
        "topic_weight": zipf[::-1] if variant == "users" else zipf,
        "user_key": jax.random.fold_in(types.make_key(seed), 2),
    }


@functools.partial(jax.jit, static_argnames=("num_videos",))
def _draw(seed, num_videos: int):
    """Draw V videos in arbitrary order."""
    keys = jax.random.split(jax.random.fold_in(types.make_key(seed), 1), 12)

    def normal(i, *shape):
        return jax.random.normal(keys[i], shape, jnp.float32)

    def uniform(i, **ends):
        return jax.random.uniform(keys[i], (num_videos,), jnp.float32, **ends)

    centroids = _unit(normal(0, parameters.TOPICS, parameters.LATENT))
    topic = jax.random.categorical(
        keys[1], -0.4 * jnp.log(1.0 + jnp.arange(parameters.TOPICS, dtype=jnp.float32)), shape=(num_videos,)
    )
    taste = _unit(centroids[topic] + TASTE_SPREAD * _unit(normal(2, num_videos, parameters.LATENT)))
    per_topic = _authors(num_videos)
    # Within a topic, author r has a share proportional to 1 / r.
    author = jnp.floor(jnp.exp(uniform(3) * jnp.log(jnp.float32(per_topic + 1.0))) - 1.0)
    topic = topic.astype(jnp.int32)
    author = topic * per_topic + jnp.clip(author.astype(jnp.int32), 0, per_topic - 1)
    author_quality, author_bait, appeal = normal(4, 3, parameters.TOPICS * per_topic)
    quality = QUALITY_SPREAD * author_quality[author] + QUALITY_SPREAD * normal(5, num_videos)
    clickbait = QUALITY_SPREAD * author_bait[author] + QUALITY_SPREAD * normal(6, num_videos)
    u = uniform(7)
    log_duration = jnp.log(jnp.interp(u, jnp.array(_DURATION_Q, jnp.float32), jnp.array(_DURATION_S, jnp.float32)))
    popularity = POPULARITY * quality + POPULARITY * clickbait + normal(8, num_videos)
    upload = jnp.floor(uniform(9, minval=parameters.FIRST_DAY, maxval=parameters.LAST_DAY + 1))
    # The platform's content models see the taste vector, and mixtures of quality and clickbait, all with noise. The
    # production ranker sees no more of a video than this, so its choices depend on nothing hidden from the agents.
    mix = jnp.array(MIX, jnp.float32)
    noisy = jnp.stack([quality, clickbait], -1) @ mix + MIX_NOISE * normal(10, num_videos, 4)
    estimate = noisy @ jnp.linalg.pinv(mix)
    content = parameters.LATENT**0.5 * (taste + CONTENT_NOISE * normal(11, num_videos, parameters.LATENT))
    scaled = log_duration[:, None] - 4.2
    visible = jnp.concatenate(
        [content, noisy, scaled, scaled**2 - 1.0, (u[:, None] < 0.25).astype(jnp.float32)], axis=-1
    )
    truth = jnp.stack([quality, clickbait, log_duration, appeal[author]], axis=-1)
    hidden = jnp.concatenate([taste, truth, estimate], axis=-1)
    return {
        "hidden": hidden,
        "topic": topic,
        "centroids": centroids,
        "author": author,
        "popularity": popularity,
        "upload": upload.astype(jnp.int32),
        "visible": visible,
    }


def split(candidates: int) -> tuple[int, int, int]:
    """Return the numbers of candidates from clusters, popular and new: 60 %, 30 % and 10 %."""
    popular, new = (3 * candidates) // 10, candidates // 10
    return candidates - popular - new, popular, new


def _zipf_edges(num: int, strata: int) -> np.ndarray:
    """Return the edges of `strata` disjoint ranges of 0 … num - 1, with geometric widths of at least 1."""
    strata = max(strata, 1)
    edges = np.floor(np.geomspace(1.0, num, strata + 1)).astype(np.int64) - 1
    edges[0], edges[-1] = 0, num
    for i in range(1, strata + 1):  # widths of at least 1, from the left
        edges[i] = max(edges[i], edges[i - 1] + 1)
    for i in range(strata, 0, -1):  # never past the end, from the right
        edges[i] = min(edges[i], num - (strata - i))
    return edges.astype(np.int32)
