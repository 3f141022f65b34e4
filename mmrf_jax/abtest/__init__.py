"""Statistics of A/B tests. NumPy and SciPy only: importing this does not import JAX.

effects = mmrf.abtest.compare({"control": old, "treatment": new}, control="control")  # tables of [n] per column
print(effects["treatment"]["watch_time"])
"""

from mmrf_jax.abtest.effects import Effect, compare, sample_ratio_mismatch

__all__ = ["Effect", "compare", "sample_ratio_mismatch"]
