"""Collect session logs of a policy in the world, as array_record files that `--config.data.dir` reads.

mmrf collect --config=world --sessions=65536 --out=logs/production
mmrf collect --config=world --policy=runs/world --sessions=65536 --out=logs/mmrf
"""

from absl import flags

from mmrf_jax.cli import common

_CONFIG = common.define_config()
_SESSIONS = flags.DEFINE_integer("sessions", None, "Sessions to collect.", lower_bound=1, required=True)
_OUT = common.define_path("out", None, "Folder to write; it must not exist.", required=True)
_POLICY = flags.DEFINE_string("policy", "production", "production, random, an oracle, or a run folder.")
_FIRST_USER = flags.DEFINE_integer("first_user", 100_000_000, "First user id.", lower_bound=0)


def main() -> None:
    from mmrf_jax.data import records
    from mmrf_jax.parallel import multihost
    from mmrf_jax.parallel.partitioner import Partitioner
    from mmrf_jax.training import arms, restore, simulator_source

    config = common.resolve_run(_CONFIG)
    common.check_world(config)
    if _OUT.value.exists():
        raise ValueError(f"--out={_OUT.value} exists; name a folder that does not")
    common.check_output("out", _OUT.value)
    partitioner = Partitioner()
    source = restore.source_of(config, partitioner)
    policy = arms.policy_of(_POLICY.value, source, partitioner)
    log = simulator_source.collect_log(
        source,
        policy,
        first_user=_FIRST_USER.value,
        sessions=_SESSIONS.value,
        progress=restore.counted_in_parts,
        keep_scores=True,
        random_share=config.collect.random_share,
    )
    if not multihost.is_primary():
        return
    records.write_log(log, _OUT.value, source.spec, simulator_source.world_origin(config))
    print(f"{log.num_sessions} sessions, {log.num_requests} requests -> {_OUT.value}")


def run() -> None:
    """Run this command."""
    common.run(main, several=True)
