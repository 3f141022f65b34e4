"""The command `mmrf closed-loop` as a script of the checkout: python -m launch.closed_loop --help."""

from mmrf_jax.cli import closed_loop

if __name__ == "__main__":
    closed_loop.run()
