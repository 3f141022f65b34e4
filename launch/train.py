"""The command `mmrf train` as a script of the checkout: python -m launch.train --help."""

from mmrf_jax.cli import train

if __name__ == "__main__":
    train.run()
