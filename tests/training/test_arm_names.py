"""Arms have the same names in tables, plots and on pages: a run's is its method."""

import json

import pytest

from mmrf_jax.training import run_folder


def test_a_run_is_named_by_its_method_and_by_its_folder_where_that_is_not_enough(tmp_path):
    def run(folder, method):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text(json.dumps({"method": method}))
        return str(tmp_path / folder)

    one, two, other = run("a", "mmrf"), run("b", "mmrf"), run("c/a", "mmrf")
    assert run_folder.arm_names(["production", one, run("d", "bc")]) == ["production", "mmrf", "bc"]
    assert run_folder.arm_names(["production", one, two]) == ["production", "mmrf (a)", "mmrf (b)"]
    with pytest.raises(ValueError, match=r"repeats a name; name each arm once"):
        run_folder.arm_names(["production", one, other])
    with pytest.raises(ValueError, match=r"repeats a name"):
        run_folder.arm_names(["random", "random"])
