"""`python -m mmrf_jax.cli` is `mmrf`."""

from mmrf_jax.cli import main

if __name__ == "__main__":
    main.main()
