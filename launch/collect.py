"""The command `mmrf collect` as a script of the checkout: python -m launch.collect --help."""

from mmrf_jax.cli import collect

if __name__ == "__main__":
    collect.run()
