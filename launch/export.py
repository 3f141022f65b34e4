"""The command `mmrf export` as a script of the checkout: python -m launch.export --help."""

from mmrf_jax.cli import export

if __name__ == "__main__":
    export.run()
