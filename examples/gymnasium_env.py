"""The short-video environment behind Gymnasium's interfaces: `pip install '.[gym]'`.

python examples/gymnasium_env.py
"""

import numpy as np

import mmrf_jax as mmrf

env = mmrf.make("short-video", num_videos=5_000, num_candidates=40, slate_size=6)

# One user per session.
single = mmrf.wrappers.GymnasiumEnv(env, seed=0)
obs, info = single.reset()
over, earned = False, 0.0
while not over:
    obs, reward, terminated, truncated, info = single.step(single.action_space.sample())
    over, earned = terminated or truncated, earned + reward
print(f"user {info['user_id']} watched {earned:.0f} s")

# 16 users at a time; the session of the next user follows one that has ended.
vector = mmrf.wrappers.GymnasiumVectorEnv(env, num_envs=16)
obs, info = vector.reset(seed=0)
watched, sessions = 0.0, 0
for _ in range(50):
    match = np.einsum("nd,ncd->nc", obs["profile"][:, :16], obs["features"][..., :16])
    obs, reward, terminated, truncated, info = vector.step(np.argsort(-match, axis=1)[:, :6])
    watched, sessions = watched + reward.sum(), sessions + int((terminated | truncated).sum())
print(f"{sessions} sessions ended; {watched / 50 / 16:.0f} s per step of a user")
