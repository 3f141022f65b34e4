"""Schemas of logs: what is required, what is refused, and back from plain values."""

import json
import subprocess
import sys

import pytest

import mmrf_jax as mmrf
from mmrf_jax import schema as schemas

LIKE, WATCH = mmrf.Signal("like", column="liked"), mmrf.Signal("watch", column="ms", kind="duration", unit="ms")


def make(**given):
    return mmrf.Schema(**{"user": "u", "item": "i", "time": "t", "signals": [LIKE, WATCH], "main": "like"} | given)


def test_one_signal_is_the_main_one_and_the_main_one_is_the_last_agent():
    assert make(signals=[LIKE], main=None).as_signals().main == "like"
    assert make().as_signals().agents == ("watch", "like")
    assert make(agents=["like"]).as_signals().agents == ("like",)
    assert make(request="r").columns() == {
        "user": "u",
        "item": "i",
        "time": "t",
        "request": "r",
        "signal like": "liked",
        "signal watch": "ms",
    }


def test_a_schema_is_read_back_from_json():
    schema = make(split=("2024-05-02", "2024-05-03"), candidates="c", num_candidates=20, time_zone="Asia/Shanghai")
    assert schemas.of(json.loads(json.dumps(schema.as_dict()))) == schema
    assert schemas.of(json.loads(json.dumps(make().as_dict()))) == make()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"main": None}, "schema.main is None; choose the main signal among like, watch"),
        ({"main": "buy"}, "schema.main is 'buy'; choose among like, watch"),
        ({"agents": ["watch"]}, "schema.agents watch lack the main signal 'like'; add it"),
        ({"signals": []}, "schema.signals is (); give at least one Signal"),
        ({"user": "liked"}, "schema.signal like and schema.user are both 'liked'; name a column once"),
        ({"time_unit": "days"}, "schema.time_unit is 'days'; choose among s, ms, us, ns"),
        ({"time_zone": "Moon"}, "schema.time_zone is 'Moon'"),
        ({"split": (0.5, 0.5)}, "schema.split is (0.5, 0.5); give three shares that sum to 1"),
        ({"split": ("2024-05-03", "2024-05-02")}, "schema.split is ('2024-05-03', '2024-05-02')"),
        ({"split": 0}, "schema.split is 0; give"),
        ({"slate_size": 0}, "schema.slate_size is 0; give a whole number of at least 1"),
        ({"slate_size": 9, "num_candidates": 3}, "schema.num_candidates=3 is less than slate_size=9"),
        ({"session_gap": 0}, "schema.session_gap is 0; give minutes above 0"),
        ({"session_gap": "30m"}, "schema.session_gap is '30m'; give minutes above 0"),
        ({"signals": LIKE}, "schema.signals is Signal("),
        ({"context": "device"}, "schema.context is 'device'; give a list, such as ['device']"),
        ({"agents": "like"}, "schema.agents is 'like'; give a list, such as ['like']"),
        ({"user": None}, "schema.user is None; give the name of a column"),
        ({"request": 3}, "schema.request is 3; give the name of a column"),
        ({"context": ["device", None]}, "schema.context[1] is None; give the name of a column"),
        ({"author": ""}, "schema.author is ''; give the name of a column"),
    ],
)
def test_schemas_that_cannot_be(given, message):
    with pytest.raises(ValueError) as error:
        make(**given)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_a_file_defines_a_schema(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import mmrf_jax as mmrf\n"
        "schema = mmrf.Schema(user='u', item='i', time='t', signals=[mmrf.Signal('like', column='liked')])\n"
    )
    assert schemas.load(file) == make(signals=[LIKE])
    file.write_text("schema = 3\n")
    with pytest.raises(ValueError, match="defines no `schema` of type mmrf_jax"):
        schemas.load(file)
    with pytest.raises(ValueError, match="is no Python file; name one that defines `schema`"):
        schemas.load(tmp_path / "other.py")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Schema(user='u')", "line 2: Schema.__init__() missing 3 required positional arguments"),
        (
            "Schema(user='u', item='i', time='t', signal=1)",
            "line 2: Schema.__init__() got an unexpected keyword argument",
        ),
        ("Schema(user='u' item='i')", "line 2: invalid syntax"),
        ("Scheme()", "line 2: name 'Scheme' is not defined"),
        ("__import__('nosuch_module')", "line 2: No module named 'nosuch_module'"),
    ],
)
def test_a_wrong_file_is_named_with_its_line(text, message, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(f"from mmrf_jax import Schema\nschema = {text}\n")
    with pytest.raises(ValueError) as error:
        schemas.load(file)
    assert str(error.value).startswith(f"{file}, {message}") and str(error.value).endswith("; correct the file")


def test_schemas_are_written_without_jax_or_polars():
    script = (
        "import sys, mmrf_jax as mmrf\n"
        "schema = mmrf.Schema(user='u', item='i', time='t', signals=[mmrf.Signal('like')])\n"
        "assert not {'jax', 'polars'} & set(sys.modules)\n"
        "mmrf.SessionLog, mmrf.train\n"
        "assert 'polars' not in sys.modules\n"
        "sys.modules['polars'] = None  # as where it is not installed\n"
        "try:\n"
        "    mmrf.SessionLog.from_frame('log.csv', schema)\n"
        "except ImportError as error:\n"
        "    assert 'polars is not installed; pip install' in str(error), error\n"
        "else:\n"
        "    raise AssertionError\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
