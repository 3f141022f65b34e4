"""Off-policy estimates from logged decisions. NumPy and SciPy only: importing this does not import JAX.

Example:
  >>> from mmrf_jax import ope
  >>> found = ope.estimate([1, 0, 1, 0], pscore=[0.5] * 4, target_pscore=[0.9, 0.1, 0.9, 0.1], estimators=("ips",))
  >>> round(found["ips"].value, 3)
  0.9
"""

from mmrf_jax.ope.policy_value import estimate

__all__ = ["estimate"]
