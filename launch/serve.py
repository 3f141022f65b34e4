"""The command `mmrf serve` as a script of the checkout: python -m launch.serve --help."""

from mmrf_jax.cli import serve

if __name__ == "__main__":
    serve.run()
