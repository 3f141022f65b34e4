"""Export a trained run for serving: its ranker, its feedback model, embedding tables, vocabularies, and a manifest.

  python -m launch.export --workdir=runs/world --out=artifacts/world

The artefact loads on CPUs, CUDA GPUs and TPUs, for about six months. `python -m launch.serve --artifact=DIR` serves it;
mmrf_jax/serving/export.py documents how to call its functions from other code.
"""

import sys

from launch import common
from mmrf_jax.training import configs, run_folder

_WORKDIR = common.define_path("workdir", None, "Run folder of launch.train.", required=True)
_OUT = common.define_path("out", None, "Folder to write; it must not exist.", required=True)
_CONFIG = common.define_run_config(sys.argv)


def main() -> None:
    from mmrf_jax.parallel import sharding
    from mmrf_jax.serving import export
    from mmrf_jax.training import restore, steps

    config, workdir, out = common.resolve_run(_CONFIG), _WORKDIR.value, _OUT.value
    if out.exists():
        raise ValueError(f"--out={out} exists; name a folder that does not")
    common.check_output("out", _OUT.value)
    source = restore.source_of(config, sharding.make_mesh())
    state = restore.load_state(config, source, workdir, sharding.make_mesh())
    about = {"config": configs.as_dict(config), "step": int(state.agents.step)}
    for name in ("learned", "results"):  # the metrics files that exist
        path = workdir / f"{name}.json"
        about[name] = run_folder.read_json(path) if path.exists() else None
    ids = None if source.video_ids is None else source.video_ids()
    made = export.export_run(out, steps.plan_of(config), source.schema, source.items, ids, state, about)
    print(f"artefact {made} of {config.method}, step {about['step']} -> {out}")


if __name__ == "__main__":
    common.run(main)
