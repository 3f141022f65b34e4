"""Config fields: declare the default, the range and the meaning of each in one place, and validate values.

    @dataclasses.dataclass(frozen=True)
    class Train:
        batch: int = field(32, "segments of one update", within="[1, 2147483647]")

This module does not import JAX, so config files can be read and rejected without it.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

COUNT, NATURAL = "[1, 2147483647]", "[0, 2147483647]"  # the range of an int32
WIDTH = "[1, 65536]"  # units of a layer, or columns of a table
RATE, FINITE, NOT_NEGATIVE = "(0, inf)", "(-inf, inf)", "[0, inf)"
SHARE, PART, DROPOUT = "[0, 1]", "(0, 1]", "[0, 1)"

_RANGE = re.compile(r"([\[(])(\S+), (\S+)([\])])")
_WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "True or False"}


class Range(NamedTuple):
    """A numeric interval, written as in `[0, 1)`. It contains only finite numbers."""

    low: float
    high: float
    low_belongs: bool
    high_belongs: bool

    @classmethod
    def parse(cls, text: str) -> Range:
        """Parse an interval.

        Raises:
          ValueError: if the text is not an interval.
        """
        if (found := _RANGE.fullmatch(text)) is None:
            raise ValueError(f"{text!r} is no range; write it as in '[0, 1)'")
        return cls(float(found[2]), float(found[3]), found[1] == "[", found[4] == "]")

    def holds(self, value: float) -> bool:
        """Return whether the interval contains a number."""
        if not math.isfinite(value):
            return False
        above = value >= self.low if self.low_belongs else value > self.low
        return above and (value <= self.high if self.high_belongs else value < self.high)


def field(
    default: Any,
    meaning: str,
    within: str | None = None,
    among: Sequence[str] | None = None,
    optional: bool = False,
    internal: bool = False,
) -> Any:
    """Declare a field of a config dataclass.

    Args:
      default: value of the field if a config does not set it.
      meaning: one line of help.
      within: range of a number, or of each number of a tuple, such as `[0, 1)`.
      among: allowed strings, for a string or for each string of a tuple.
      optional: whether None in a config stands for the default.
      internal: whether the program sets the field, so that it is not a field of config files.

    Raises:
      TypeError: if a number has no range.
    """
    numbers = default if isinstance(default, tuple) else (default,)
    if within is None and any(isinstance(x, int | float) and not isinstance(x, bool) for x in numbers):
        raise TypeError(f"the number {default!r} ({meaning}) needs a range; give `within`")
    if within is not None:
        Range.parse(within)
    metadata = {"within": within, "among": among, "optional": optional, "internal": internal, "meaning": meaning}
    return dataclasses.field(default=default, metadata=metadata)


def fix(spec: dataclasses.Field, value: Any) -> str | None:
    """Return a suggestion for an invalid value of a field, or None if the value is valid."""
    if value is None and (spec.default is None or spec.metadata["optional"]):
        return None
    if not isinstance(spec.default, tuple):
        return _fix_one(spec, value)
    if not isinstance(value, tuple | list):
        return f"a tuple, such as {spec.default!r}"
    wrong = (better for one in value if (better := _fix_one(spec, one)) is not None)
    return next((f"for each {better}" for better in wrong), None)


def kind(spec: dataclasses.Field) -> type:
    """Return the type of a field's value, or of the entries of a tuple."""
    return next(kind for kind in _WORDS if re.search(rf"\b{kind.__name__}\b", str(spec.type)))


def _fix_one(spec: dataclasses.Field, value: Any) -> str | None:
    wanted = kind(spec)
    number = _WORDS[wanted]
    if type(value) not in ((int, float) if wanted is float else (wanted,)):
        return number
    if (among := spec.metadata["among"]) is not None and value not in among:
        return f"one of {', '.join(among)}"
    if (within := spec.metadata["within"]) is None or (bounds := Range.parse(within)).holds(value):
        return None
    if bounds.high != math.inf and not (wanted is int and value < bounds.low):
        return f"{number} in {within}"
    if bounds.low == -math.inf:
        return "a finite number"
    return f"{bounds.low:g} or more" if bounds.low_belongs else f"a number above {bounds.low:g}"


def refuse(spec: dataclasses.Field, name: str, value: Any) -> None:
    """Raise an error if a value is invalid for a field.

    Args:
      name: name of the field in messages; a name that starts with `config.` is also a flag.

    Raises:
      ValueError: if the value is invalid; the message suggests a valid one.
    """
    if (better := fix(spec, value)) is None:
        return
    if better.startswith("one of "):
        raise ValueError(f"unknown {name}={value!r}; choose among {better.removeprefix('one of ')}")
    flag = f"--{name}=" if better.endswith(" or more") and name.startswith("config.") else ""
    raise ValueError(f"{name} is {value!r}; use {flag}{better}")


def check(config: Any, name: str) -> None:
    """Validate the fields of a config dataclass.

    Args:
      config: the instance.
      name: name of the instance in messages.

    Raises:
      ValueError: for the first invalid value; the message suggests a valid one.
    """
    for spec in dataclasses.fields(config):
        value = getattr(config, spec.name)
        if spec.metadata and not dataclasses.is_dataclass(value):  # those check themselves
            refuse(spec, f"{name}.{spec.name}", value)


def nearest(name: str, names: Iterable[str]) -> str:
    """Return advice for an unknown name: the same ones but for case and blanks, the closest ones, or all."""
    names = list(names)
    same = [known for known in names if known.strip().casefold() == name.strip().casefold()]
    close = same or difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(x if x == x.strip() else repr(x) for x in close)}?"
    return f"there are {', '.join(sorted(names)) or 'none'}"
