"""The command `mmrf compare` as a script of the checkout: python -m launch.compare --help."""

from mmrf_jax.cli import compare

if __name__ == "__main__":
    compare.run()
