"""PPO, with Optax and Flax alone, learns to rank short videos: slates are sampled by Plackett–Luce.

python examples/ppo.py
"""

import functools
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import mmrf_jax as mmrf

USERS, STEPS, UPDATES = 256, 20, 40  # users of an update, requests of each, updates
EPOCHS, MINIBATCHES = 3, 4
DISCOUNT, TRACE, CLIP, ENTROPY = 0.95, 0.95, 0.2, 0.002
SECONDS = 100.0  # unit of the rewards

env = mmrf.make("short-video", num_videos=5_000, num_candidates=40, slate_size=6)
params = env.default_params


class ActorCritic(nn.Module):
    """Scores [B, C] of the candidates, and the value [B] of the session from here on."""

    @nn.compact
    def __call__(self, obs):
        shown = obs.history.mask[..., None] * jnp.log1p(obs.history.feedback)  # [B, H, S]
        user = jnp.concatenate([obs.profile, obs.context, shown.mean(axis=1)], axis=-1)
        user = nn.tanh(nn.Dense(64)(user))
        match = nn.Dense(32)(user)[:, None] * nn.Dense(32)(obs.features)  # [B, C, 32]
        hidden = nn.tanh(nn.Dense(32)(jnp.concatenate([match, obs.features], axis=-1)))
        scores = nn.Dense(1, kernel_init=nn.initializers.zeros)(hidden)[..., 0]
        value = nn.Dense(1)(nn.tanh(nn.Dense(64)(jnp.concatenate([user, hidden.mean(axis=1)], axis=-1))))
        return scores, value[..., 0]


network = ActorCritic()
optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(2e-3))


def log_prob_and_entropy(scores, slate):
    """Return the log-probability of slates [..., K] by scores [..., C], and the entropy at the top."""
    chosen = jax.nn.one_hot(slate, scores.shape[-1])
    above = jnp.cumsum(chosen, axis=-2) - chosen > 0  # [..., K, C], taken by the slots above
    log_p = jax.nn.log_softmax(jnp.where(above, -1e9, scores[..., None, :]))
    first = log_p[..., 0, :]
    return (chosen * log_p).sum(axis=(-1, -2)), -(jnp.exp(first) * first).sum(axis=-1)


def collect(weights, key, user_ids):
    """Serve STEPS requests of new users; returns what an update needs, with axes [STEPS, USERS]."""
    world, noise = jax.random.split(key)
    obs, state = env.reset(world, params, user_ids)

    def step(carry, key):
        obs, state = carry
        live = ~(state.terminated | state.truncated)
        scores, value = network.apply(weights, obs)
        _, slate = jax.lax.top_k(scores + jax.random.gumbel(key, scores.shape), env.slate_size)
        after, state, reward, terminated, _, _ = env.step(world, state, slate, params)
        log_p = log_prob_and_entropy(scores, slate)[0]
        return (after, state), (obs, slate, log_p, value, reward / SECONDS, terminated, live)

    (obs, _), (seen, slate, log_p, value, reward, terminated, live) = jax.lax.scan(
        step, (obs, state), jax.random.split(noise, STEPS)
    )
    values = jnp.concatenate([value, network.apply(weights, obs)[1][None]])
    error = reward + DISCOUNT * jnp.where(terminated, 0.0, values[1:]) - value

    def trace(total, now):
        total = now[0] + DISCOUNT * TRACE * jnp.where(now[1], 0.0, total)
        return total, total

    advantage = jax.lax.scan(trace, jnp.zeros(USERS), (error, terminated), reverse=True)[1]
    return {"obs": seen, "slate": slate, "log_p": log_p, "target": advantage + value, "adv": advantage, "live": live}


def loss_of(weights, batch):
    scores, value = network.apply(weights, batch["obs"])
    log_p, entropy = log_prob_and_entropy(scores, batch["slate"])
    ratio, adv = jnp.exp(log_p - batch["log_p"]), batch["adv"]
    surrogate = jnp.minimum(ratio * adv, jnp.clip(ratio, 1 - CLIP, 1 + CLIP) * adv)
    loss = -surrogate + 0.5 * (value - batch["target"]) ** 2 - ENTROPY * entropy
    return (loss * batch["live"]).sum() / batch["live"].sum()


@jax.jit
def update(weights, opt_state, key, number):
    """Collect sessions of new users and improve the policy on them."""
    collecting, shuffling = jax.random.split(jax.random.fold_in(key, number))
    batch = collect(weights, collecting, 1_000_000 + number * USERS + jnp.arange(USERS))
    live = batch["live"]
    mean = (batch["adv"] * live).sum() / live.sum()
    spread = jnp.sqrt((((batch["adv"] - mean) * live) ** 2).sum() / live.sum())
    batch = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch | {"adv": (batch["adv"] - mean) / spread})

    def minibatch(carry, rows):
        weights, opt_state = carry
        gradient = jax.grad(loss_of)(weights, jax.tree.map(lambda x: x[rows], batch))
        changes, opt_state = optimizer.update(gradient, opt_state)
        return (optax.apply_updates(weights, changes), opt_state), None

    keys = jax.random.split(shuffling, EPOCHS)
    rows = jax.vmap(lambda key: jax.random.permutation(key, USERS * STEPS).reshape(MINIBATCHES, -1))(keys)
    (weights, opt_state), _ = jax.lax.scan(minibatch, (weights, opt_state), rows.reshape(-1, rows.shape[-1]))
    return weights, opt_state


def random_scores(key, obs):
    return jax.random.uniform(key, obs.candidates.shape)


def learned_scores(weights, key, obs):
    return network.apply(weights, obs)[0]


def main():
    start, key = time.monotonic(), jax.random.key(0)
    measure = functools.partial(mmrf.rollout, env, num_users=2_000, key=jax.random.key(1))
    before = measure(random_scores)["watch_time"].mean()
    print(f"random: {before:.0f} s of watch time per session")
    weights = network.init(key, env.reset(key, params, jnp.arange(1))[0])
    opt_state = optimizer.init(weights)
    for number in range(UPDATES):
        weights, opt_state = update(weights, opt_state, key, number)
    after = measure(jax.tree_util.Partial(learned_scores, weights))["watch_time"].mean()
    print(f"PPO: {after:.0f} s, {100 * (after / before - 1):+.0f} %, in {time.monotonic() - start:.0f} s of training")


if __name__ == "__main__":
    main()
