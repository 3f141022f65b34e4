"""What is read whole of logs that are too long for it."""

import types

import numpy as np
import pytest
from ml_collections import ConfigDict

from mmrf_jax.training import sources


@pytest.mark.parametrize(
    ("stream", "large", "read"),
    [
        (None, 1_000, [0, 1, 2, 3]),  # short enough to be held
        (None, 600, [0, 2]),
        (False, 600, [0, 1, 2, 3]),  # wanted in memory, whatever its length
        (True, 600, [0, 2]),
        (True, 1_000, [0, 1, 2, 3]),
    ],
)
def test_of_a_long_log_blocks_from_all_over_are_held(stream, large, read, monkeypatch, capfd):
    monkeypatch.setattr(sources, "_LARGE", large)
    blocks = types.SimpleNamespace(sessions=np.full(4, 250), read=list)
    assert sources._held(ConfigDict({"data": {"stream": stream}}), blocks, "test") == read
    said = "of the test log, 500 of 1,000 sessions"
    assert (said in capfd.readouterr().err) == (len(read) < 4)
