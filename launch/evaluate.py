"""The command `mmrf evaluate` as a script of the checkout: python -m launch.evaluate --help."""

from mmrf_jax.cli import evaluate

if __name__ == "__main__":
    evaluate.run()
