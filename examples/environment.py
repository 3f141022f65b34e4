"""The short-video environment: reset, step, many users at once under `jit` and `scan`, and whole sessions.

python examples/environment.py
"""

import jax
import jax.numpy as jnp

import mmrf_jax as mmrf

env = mmrf.make("short-video", num_videos=5_000, num_candidates=40, slate_size=6)
params = env.default_params
key = jax.random.key(0)

# Sessions of 64 users. A slate is K positions among the candidates, in the order shown.
obs, state = env.reset(key, params, user_ids=jnp.arange(64))
slate = jnp.tile(jnp.arange(6), (64, 1))
obs, state, reward, terminated, truncated, info = env.step(key, state, slate, params)
print("candidates", obs.candidates.shape, "features", obs.features.shape)
print(f"the first slate earned {reward.mean():.0f} s per user; {int(terminated.sum())} of 64 users left")
like = env.signals.index("like")
print("likes:", int(info["feedback"][..., like].sum()))


# A policy scores the candidates; the loop runs on the device. Sessions that have ended earn nothing more.
def match(key, obs):
    return jnp.einsum("bd,bcd->bc", obs.profile[:, :16], obs.features[..., :16])


@jax.jit
def watch_time(key, user_ids):
    def step(carry, _):
        obs, state = carry
        slate = jax.lax.top_k(match(key, obs), env.slate_size)[1]
        obs, state, reward, *_ = env.step(key, state, slate, params)
        return (obs, state), reward

    return jax.lax.scan(step, env.reset(key, params, user_ids), length=64)[1].sum(axis=0)


print(f"64 users, one key: {watch_time(key, jnp.arange(64)).mean():.0f} s")
keys = jax.random.split(key, 3)
print("three keys:", jax.vmap(watch_time, in_axes=(0, None))(keys, jnp.arange(64)).mean(axis=1).round())


# Whole sessions of many users: slots whose session has ended are refilled with the next user.
def random(key, obs):
    return jax.random.uniform(key, obs.candidates.shape)


for name, policy in {"random": random, "match": match}.items():
    metrics = mmrf.rollout(env, policy, num_users=2_000, key=key)
    print(f"{name}: {metrics['watch_time'].mean():.0f} s, {metrics['depth'].mean():.1f} videos per session")
