"""An estimate with its interval, and checks of the arrays that `mmrf_jax.metrics`, `ope` and `abtest` take."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import numpy as np

#: Independent units with any event, below which no interval is given. Several events of one unit count once.
MIN_EVENTS = 25


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A value with its interval; what is undefined is NaN, and `note` says why.

        print(mmrf.metrics.gauc(clicks, scores, users))  # such as 0.6123 [0.6011, 0.6231], n=812

    `str` gives one line; a format spec, as in `f"{estimate:.3f}"`, applies to the value and to both ends.

    Attributes:
      value: the estimate.
      low, high: ends of its interval.
      n: independent units behind it, such as eligible groups.
      ess: effective sample size in rows (Kish) of a weighted estimate; NaN elsewhere.
      note: why a number is NaN; empty where none is.
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    n: int = 0
    ess: float = math.nan
    note: str = ""

    def __str__(self) -> str:
        return format(self, ".4g")

    def __format__(self, spec: str) -> str:
        spec = spec or ".4g"
        text = f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}], n={self.n}"
        text += "" if math.isnan(self.ess) else f", ess={self.ess:.1f}"
        return f"{text} ({self.note})" if self.note else text


def unit_numbers(units: Iterable[Hashable], name: str = "group", rows: int | None = None) -> np.ndarray:
    """Return the number [n] int64 of each row's unit, in order of first appearance; ids are of any hashable type.

    Args:
      units: [n] ids.
      name: of the argument, for errors.
      rows: n, if known.

    Raises:
      ValueError: for another number of ids, ids that are missing (None, NaN), or ids that cannot be hashed.
    """
    found: dict[Hashable, int] = {}
    try:
        ids = units.tolist() if hasattr(units, "tolist") else list(units)
        codes = np.array([found.setdefault(one, len(found)) for one in ids], np.int64)
    except TypeError:
        raise ValueError(f"{name} is {_short(units)}; give one hashable id for each row") from None
    if rows is not None and len(codes) != rows:
        raise ValueError(f"{name} has {len(codes)} ids for {rows} rows; give one id for each row")
    for one, number in found.items():
        if _missing(one):
            raise ValueError(f"{name} of row {int((codes == number).argmax())} is {one}; leave out rows without an id")
    return codes


def column(name: str, values: Any, like: tuple[str, int] | None = None, finite: bool = True) -> np.ndarray:
    """Return numbers [n]: integers and floats keep their type (large integers stay exact), bools and all else do not.

    Args:
      name: of the argument, for errors.
      values: a list, an array, or a column of a data frame.
      like: (name, n) of the argument that has the same rows.
      finite: whether infinities are refused; NaN always is.

    Raises:
      ValueError: for strings, missing values, other shapes or numbers that are not finite.
    """
    if np.ma.is_masked(values):
        raise ValueError(f"{name} has {int(np.ma.getmaskarray(values).sum())} masked rows; leave them out")
    try:
        array = np.asarray(values)
    except ValueError:
        raise ValueError(f"{name} has rows of several lengths; give one number for each row") from None
    if array.ndim != 1 or (like and len(array) != like[1]):
        wanted = f" and {like[0]} ({like[1]},)" if like else ""
        raise ValueError(f"{name} has shape {array.shape}{wanted}; give one number for each row")
    if array.dtype.kind in "OV":  # objects, and bfloat16 of an accelerator
        try:
            array = np.array([_number(x) for x in array.tolist()], np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name} has a row that is no number ({error}); leave it out or convert it") from None
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} is of {array.dtype}, such as {array[:1].tolist()}; give numbers")
    array = array.astype(np.float64) if array.dtype.kind == "b" else array
    if array.dtype.kind == "f":
        bad_rows = np.flatnonzero(~np.isfinite(array) if finite else np.isnan(array))
        if len(bad_rows):
            raise ValueError(
                f"{name} has {len(bad_rows)} numbers that are not finite, first {array[bad_rows[0]]} in row "
                f"{bad_rows[0]}; leave out rows without a finite one"
            )
    return array


def require(name: str, value: Any, holds: Callable[[Any], bool], wanted: str) -> None:
    """Raise ValueError unless an argument is a number for which `holds` is true."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not holds(value):
        plain = value is None or isinstance(value, str | numbers.Number)
        raise ValueError(f"{name}{f'={value!r}' if plain else f' of type {type(value).__name__}'} must be {wanted}")


def require_interval(level: float, draws: int, seed: int) -> None:
    """Raise ValueError unless the arguments of a bootstrap interval are of use."""
    require("level", level, lambda x: 0 < x < 1, "a coverage between 0 and 1, such as 0.95")
    require("draws", draws, lambda x: x >= 1 and _whole(x), "the number of bootstrap samples, 1 or more")
    require("seed", seed, lambda x: x >= 0 and _whole(x), "an integer, 0 or more")


def _whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral)


def _missing(one: Any) -> bool:
    """Return whether an id or a value stands for none: None, NaN, NaT, or pandas' NA."""
    if one is None or type(one).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(one, numbers.Real) and bool(one != one)


def _number(one: Any) -> float:
    if isinstance(one, (str, bytes)) or (_missing(one) and not isinstance(one, numbers.Real)):
        raise TypeError(f"{one!r}")
    return float(one)


def _short(value: Any) -> str:
    text = repr(value).replace("\n", " ")
    return text if len(text) < 60 else f"{text[:57]}..."
