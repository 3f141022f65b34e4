"""The command `mmrf configs` as a script of the checkout: python -m launch.configs --help."""

from mmrf_jax.cli import configs

if __name__ == "__main__":
    configs.run()
