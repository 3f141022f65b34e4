"""The command `mmrf multiprocess` as a script of the checkout: python -m launch.multiprocess --help."""

from mmrf_jax.cli import multiprocess

if __name__ == "__main__":
    multiprocess.run()
