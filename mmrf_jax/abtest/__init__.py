"""Statistics of A/B tests. NumPy and SciPy only: importing this does not import JAX."""

from mmrf_jax.abtest.effects import Effect, compare, sample_ratio_mismatch

__all__ = ["Effect", "compare", "sample_ratio_mismatch"]
