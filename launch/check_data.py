"""The command `mmrf check-data` as a script of the checkout: python -m launch.check_data --help."""

from mmrf_jax.cli import check_data

if __name__ == "__main__":
    check_data.run()
