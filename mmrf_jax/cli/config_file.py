"""The file that ml_collections reads for --config=NAME, as config_file.py:NAME."""

from ml_collections import ConfigDict

from mmrf_jax import configs


def get_config(name: str) -> ConfigDict:
    """Return the config of this name; see `mmrf_jax.configs.load`."""
    return configs.load(name)
