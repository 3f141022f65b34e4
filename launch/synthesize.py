"""The command `mmrf synthesize` as a script of the checkout: python -m launch.synthesize --help."""

from mmrf_jax.cli import synthesize

if __name__ == "__main__":
    synthesize.run()
