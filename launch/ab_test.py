"""The command `mmrf ab-test` as a script of the checkout: python -m launch.ab_test --help."""

from mmrf_jax.cli import ab_test

if __name__ == "__main__":
    ab_test.run()
