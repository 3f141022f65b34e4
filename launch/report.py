"""The command `mmrf report` as a script of the checkout: python -m launch.report --help."""

from mmrf_jax.cli import report

if __name__ == "__main__":
    report.run()
