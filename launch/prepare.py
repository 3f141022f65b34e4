"""The command `mmrf prepare` as a script of the checkout: python -m launch.prepare --help."""

from mmrf_jax.cli import prepare

if __name__ == "__main__":
    prepare.run()
