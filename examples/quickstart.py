"""Train a ranker in the simulated world, load it, rank with it, and export it.

  python examples/quickstart.py

It writes runs/quickstart and artifacts/quickstart below the current folder; the core install is enough. A second start
reuses the files of the first. 400 sessions are too few to learn from; without the overrides this is the main job, whose
ranker beats production.
"""

from pathlib import Path

import mmrf_jax as mmrf

TINY = {
    "quick": True,
    "world": {"num_videos": 1_000, "candidates": 20},
    "collect": {"sessions": 200, "test_sessions": 200},
    "ab_test": {"sessions": 64},
}

run = mmrf.train("world", workdir="runs/quickstart", overrides=TINY)
watch_time = run.results["ab_test"]["mmrf"]["watch_time"]
print(f"watch time: {watch_time['mean']:.0f} s per session, {watch_time['diff_pct']:+.1f} % against production")

run = mmrf.load("runs/quickstart")  # reads the run folder alone
candidates = [7, 42, 99, 512]  # ids of videos
print("best two:", run.rank(candidates=candidates, k=2))
seen = [(7, {"click": 1.0, "watch_time": 60.0}), (8, {"click": 0.0})]  # oldest first
print("after two videos:", run.rank(candidates=candidates, history=seen, k=2))

if not Path("artifacts/quickstart").exists():
    run.export("artifacts/quickstart")
print("exported:", mmrf.load("artifacts/quickstart").rank(candidates=candidates, k=2))
