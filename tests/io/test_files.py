import json
import os

import jax.numpy as jnp
import numpy as np
import pytest

from mmrf_jax.io import files
from mmrf_jax.io.files import write_json


def test_writes_sorted_plain_json(tmp_path):
    path = tmp_path / "new" / "results.json"
    write_json(
        path, {"b": np.float32(0.5), "a": {"x": jnp.arange(2), "n": np.int64(3), "none": None, "t": (True, "s")}}
    )
    assert json.loads(path.read_text()) == {"a": {"n": 3, "none": None, "t": [True, "s"], "x": [0, 1]}, "b": 0.5}
    assert path.read_text().index('"a"') < path.read_text().index('"b"')
    assert os.listdir(path.parent) == ["results.json"]


@pytest.mark.parametrize("bad", [float("nan"), np.float32("inf"), jnp.array(-jnp.inf)])
def test_refuses_what_is_not_finite_by_name_and_leaves_the_old_file(tmp_path, bad):
    path = tmp_path / "results.json"
    write_json(path, {"old": 1})
    with pytest.raises(ValueError, match=r"ab_test\.mmrf\.ci95\[1\] is -?(nan|inf)"):
        write_json(path, {"ab_test": {"mmrf": {"ci95": [0.0, bad]}}})
    assert json.loads(path.read_text()) == {"old": 1}


def test_refuses_what_json_has_no_form_for(tmp_path):
    with pytest.raises(TypeError, match=r"a\.b is a set"):
        write_json(tmp_path / "x.json", {"a": {"b": {1}}})


def test_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_json(path, {"old": 1})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        write_json(path, {"new": 1})
    assert json.loads(path.read_text()) == {"old": 1} and os.listdir(tmp_path) == ["results.json"]


def test_arrays_are_written_without_pickling(tmp_path):
    arrays = {"a": np.arange(3, dtype=np.int64), "text|b": np.array(["x", "yy"])}
    files.write_arrays(tmp_path / "a.npz", arrays)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as found:
        assert sorted(found.files) == sorted(arrays)  # under these names alone, with every NumPy
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array)
    with pytest.raises(TypeError, match="array 'b' holds Python objects"):
        files.write_arrays(tmp_path / "b.npz", {"b": np.array([{}])})
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
