"""Configs by packaged name, path and function."""

import sys

import pytest
from ml_collections import ConfigDict

from experiments import kuairand, world
from mmrf_jax import configs

FILE = """from ml_collections import ConfigDict


def get_config(text="none"):
    return ConfigDict({"text": text})
"""


def test_packaged_configs_are_those_of_the_experiments():
    assert configs.names() == ["kuairand", "logs", "world"]
    assert configs.load("world").to_dict() == world.get_config().to_dict()
    assert configs.load("kuairand").to_dict() == kuairand.get_config().to_dict()


def test_a_file_and_its_argument(tmp_path):
    path = tmp_path / "a:b.py"  # a colon ends a name only where there is no such file
    path.write_text(FILE)
    assert configs.load(str(path)) == ConfigDict({"text": "none"})
    (tmp_path / "c.py").write_text(FILE)
    assert configs.load(f"{tmp_path / 'c.py'}:some:text") == ConfigDict({"text": "some:text"})


def test_a_function_of_a_module(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "of_functions.py").write_text(
        FILE + "\n\ndef typed():\n    from mmrf_jax.training import configs\n\n    return configs.Run(seed=5)\n"
    )
    assert configs.load("of_functions:get_config") == ConfigDict({"text": "none"})
    assert configs.load("of_functions:typed").seed == 5
    del sys.modules["of_functions"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"config=.*/x\.py cannot be read \(No such file"),
        ("def get_config(:", r"config=.*/x\.py is no Python file \(invalid syntax"),
        ("def config(): pass", r"config=.*/x\.py does not define get_config\(\)"),
    ],
)
def test_a_file_that_is_no_config(text, message, tmp_path):
    if text is not None:
        (tmp_path / "x.py").write_text(text)
    with pytest.raises(ValueError, match=message):
        configs.load(str(tmp_path / "x.py"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wrld", "config=wrld is no packaged config; did you mean world"),
        ("no_such_module_here:f", "config=no_such_module_here:f: no module 'no_such_module_here'"),
        ("math:config", "config=math:config: module 'math' has no attribute 'config'"),
        ("", "config is empty"),
    ],
)
def test_names_of_no_config(name, message):
    with pytest.raises(ValueError, match=message):
        configs.load(name)
