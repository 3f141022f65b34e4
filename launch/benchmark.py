"""The command `mmrf benchmark` as a script of the checkout: python -m launch.benchmark --help."""

from mmrf_jax.cli import benchmark

if __name__ == "__main__":
    benchmark.run()
