"""The command `mmrf sweep` as a script of the checkout: python -m launch.sweep --help."""

from mmrf_jax.cli import sweep

if __name__ == "__main__":
    sweep.run()
