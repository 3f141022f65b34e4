"""Fields of configs: ranges, and what is said of a value outside of one."""

import dataclasses
import math

import pytest

from mmrf_jax import fields
from mmrf_jax.fields import field


@dataclasses.dataclass(frozen=True)
class Example:
    rate: float = field(0.1, "", fields.RATE)
    share: float = field(0.5, "", fields.SHARE)
    bonus: float = field(0.0, "", fields.FINITE)
    count: int = field(1, "", fields.COUNT)
    width: int | None = field(None, "", fields.WIDTH)
    rows: int = field(8, "", fields.COUNT, optional=True)
    pair: tuple[float, float] = field((0.0, 0.0), "", fields.DROPOUT)
    kind: str = field("a", "", among=("a", "b"))
    on: bool = field(False, "")

    def __post_init__(self):
        fields.check(self, "example")


@pytest.mark.parametrize(
    ("name", "value", "better"),
    [
        ("rate", 0.0, "a number above 0"),
        ("rate", math.nan, "a number above 0"),
        ("rate", math.inf, "a number above 0"),
        ("rate", "abc", "a number"),
        ("share", 1.5, "a number in [0, 1]"),
        ("share", True, "a number"),
        ("bonus", -math.inf, "a finite number"),
        ("count", 0, "1 or more"),
        ("count", 2**31, "a whole number in [1, 2147483647]"),
        ("count", 1.5, "a whole number"),
        ("count", None, "a whole number"),
        ("width", -1, "1 or more"),
        ("pair", (0.0, 1.0), "for each a number in [0, 1)"),
        ("pair", 0.5, "a tuple, such as (0.0, 0.0)"),
        ("on", 1, "True or False"),
    ],
)
def test_a_value_that_a_field_cannot_have(name, value, better):
    with pytest.raises(ValueError) as error:
        Example(**{name: value})
    assert str(error.value) == f"example.{name} is {value!r}; use {better}"


def test_a_name_that_a_field_cannot_have():
    with pytest.raises(ValueError, match=r"unknown example.kind='c'; choose among a, b"):
        Example(kind="c")


def test_values_that_fields_can_have():
    Example()
    Example(rate=3, share=1, bonus=-1e9, count=2**31 - 1, width=5, rows=None, pair=[0.1, 0.2], kind="b", on=True)


def test_a_number_without_a_range_is_refused_where_it_is_declared():
    with pytest.raises(TypeError, match=r"the number 3 .*needs a range"):
        field(3, "")
    with pytest.raises(ValueError, match="'0 to 1' is no range"):
        field(3, "", "0 to 1")


def test_the_nearest_names():
    assert fields.nearest("lerning_rate", ["learning_rate", "batch"]) == "did you mean learning_rate?"
    assert fields.nearest("xyz", ["b", "a"]) == "there are a, b"
    assert fields.nearest("uid", ["iid", "UID", "uids"]) == "did you mean UID?"
    assert fields.nearest("iid", [" iid", "uid"]) == "did you mean ' iid'?"
    assert fields.nearest("xyz", []) == "there are none"
