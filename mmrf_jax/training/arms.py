"""Arms of A/B tests by name: rankers that need no training, and the policies of finished runs.

The world defines its own arms (production, random, oracles) in `envs.short_video.reference_policies`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import jax

from mmrf_jax import plugins, types
from mmrf_jax.agents import popularity, registry
from mmrf_jax.envs import policies, rankers
from mmrf_jax.io import files
from mmrf_jax.metrics import offline
from mmrf_jax.parallel.partitioner import Partitioner
from mmrf_jax.training import configs, restore, run_folder, sources, steps

POPULARITY = "popularity"  # an arm built from a log, not from the simulator


def check_arms(names: Iterable[str], policies: Collection[str], field: str) -> None:
    """Refuse names in a config field that are not policies.

    Raises:
      ValueError: for the first such name.
    """
    for name in names:
        if name not in policies:
            raise ValueError(f"unknown arm {name!r} in {field}; choose among {', '.join(policies)}")


def untrained_arm(name: str, source: sources.Source) -> rankers.AnyRanker:
    """Return the policy of an arm that needs no training: the name of a simulator's ranker, or of a plug-in's policy.

    Raises:
      ValueError: for an unknown name.
    """
    if name in source.policies:
        return source.policies[name]
    policy = plugins.POLICIES.get(name, source.config.plugins)
    key = jax.random.fold_in(types.make_key(source.config.seed), 15)
    return policies.as_ranker(policy, source.items, key, source.spec.slate)


def policy_of(name: str, source: sources.Source, partitioner: Partitioner) -> rankers.AnyRanker:
    """Return the policy of an arm: the name of a ranker that needs no training, `popularity`, or a run folder.

    Raises:
      ValueError: for an unknown name, or a run trained on another source or world.
    """
    if name == POPULARITY:
        rows = offline.exposures(source.train())
        signals, number = source.spec.signals, source.items.num_videos
        return popularity.make_popularity_ranker(
            signals, popularity.smoothed_means(signals, rows.video, rows.feedback, number)
        )
    if name in source.policies or plugins.POLICIES.find(name, source.config.plugins):
        return untrained_arm(name, source)
    path = files.user_path(name, "policy")
    if not path.is_dir():
        known = ", ".join([*source.policies, POPULARITY, *plugins.POLICIES.entries])
        raise ValueError(
            f"unknown policy {name!r}: neither a run folder nor one of {known}; one of a plug-in needs --import=MODULE"
        )
    config = configs.run_of(run_folder.read_config(path))
    restore.check_same_world(name, config, source)
    state = restore.load_state(config, source, path, partitioner)
    return registry.get(config.method).make_policy(
        state.agents, source.items, steps.agent_config(config, source.spec.signals)
    )
