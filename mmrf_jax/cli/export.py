"""Export a trained run for serving: its ranker, its feedback model, embedding tables, vocabularies, and a manifest.

  mmrf export --workdir=runs/world --out=artifacts/world

The artefact loads on CPUs, CUDA GPUs and TPUs, for about six months. `mmrf serve --artifact=DIR` serves it;
mmrf_jax/serving/export.py documents how to call its functions from other code.
"""

import sys

from mmrf_jax.cli import common

_WORKDIR = common.define_path("workdir", None, "Run folder of `mmrf train`.", required=True)
_OUT = common.define_path("out", None, "Folder to write; it must not exist.", required=True)
_CONFIG = common.define_run_config(sys.argv)


def main() -> None:
    from mmrf_jax.serving import export

    config, workdir, out = common.resolve_run(_CONFIG), _WORKDIR.value, _OUT.value
    if out.exists():
        raise ValueError(f"--out={out} exists; name a folder that does not")
    common.check_output("out", _OUT.value)
    made, step = export.export_workdir(config, workdir, out)
    print(f"artefact {made} of {config.method}, step {step} -> {out}")


def run() -> None:
    """Run this command."""
    common.run(main)
