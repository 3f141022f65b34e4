"""Features of one item, user or request from values by name, with the encoders that a log's tables were read with.

An encoder is the plain form of `readers.frame.features.ColumnEncoder`: {"name", "kind", "mean", "std", "log",
"vocabulary"}.
"""

from __future__ import annotations

import datetime
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Encoders = Sequence[Mapping[str, Any]]
_DAY_SECONDS = 86_400.0


def plain_encoders(names: Sequence[str]) -> list[dict[str, Any]]:
    """Return encoders that leave numbers unchanged."""
    same = {"kind": "number", "mean": [0.0], "std": [1.0], "log": False, "vocabulary": []}
    return [{"name": name, **same} for name in names]


def encode_named(encoders: Encoders, given: Mapping[str, Any]) -> np.ndarray:
    """Return features [D] float32 of values by name; what is left out or None is the average, zeros.

    Args:
      encoders: one for each name, in the order of their features.
      given: {name: a number, a text, a list of texts or numbers, or a date in ISO 8601}, as the encoder's kind asks.

    Raises:
      ValueError: for a name without an encoder, or a value of another kind, naming both.
    """
    names = [encoder["name"] for encoder in encoders]
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, 1)
            hint = f"did you mean {near[0]!r}" if near else f"there are {', '.join(names) or 'none'}"
            raise ValueError(f"no feature is called {name!r}; {hint}")
    parts = [np.zeros(0, np.float32)]
    for encoder in encoders:
        value = given.get(encoder["name"])
        try:
            parts.append(_one(encoder, value))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{encoder['name']}={value!r} is no {encoder['kind']} ({error})") from error
    return np.concatenate(parts)


def row_of(vocabulary: np.ndarray, given: Any) -> int:
    """Return 1 + the place of a value in a vocabulary, sorted texts or integers [n]; 0 for any other and None."""
    try:
        wanted = str(given) if vocabulary.dtype.kind == "U" else int(given)
        if given is None or (isinstance(wanted, str) and len(wanted) > vocabulary.dtype.itemsize // 4):
            return 0
        place = int(np.searchsorted(vocabulary, np.array(wanted, vocabulary.dtype)))
    except (TypeError, ValueError, OverflowError):
        return 0
    return place + 1 if place < len(vocabulary) and vocabulary[place] == wanted else 0


def _one(encoder: Mapping[str, Any], value: Any) -> np.ndarray:
    if encoder["kind"] in ("category", "categories"):
        vocabulary = list(encoder["vocabulary"])
        out = np.zeros(len(vocabulary) + 1, np.float32)
        several = encoder["kind"] == "categories"
        if several and value is not None and not isinstance(value, list | tuple):
            raise ValueError("give a list")
        for text in (value or ()) if several else () if value is None else (value,):
            if isinstance(text, list | tuple | Mapping):
                raise ValueError("give one text")
            out[vocabulary.index(str(text)) if str(text) in vocabulary else -1] = 1.0
        return out
    mean, std = np.array(encoder["mean"], np.float64), np.array(encoder["std"], np.float64)
    if value is None:
        return np.zeros(len(mean), np.float32)
    if encoder["kind"] == "date":
        values = np.array([_days(value)])
    else:
        values = np.array(value if encoder["kind"] == "vector" else [float(value)], np.float64)
    if values.shape != mean.shape or not np.isfinite(values).all():
        raise ValueError(f"give {len(mean)} finite number{'s' if len(mean) > 1 else ''}")
    values = np.log1p(np.maximum(values, 0.0)) if encoder["log"] else values
    return ((values - mean) / std).astype(np.float32)


def _days(value: Any) -> float:
    """Return days since 1970 of a date or time; without a zone it is UTC."""
    when = datetime.datetime.fromisoformat(value)
    when = when if when.tzinfo else when.replace(tzinfo=datetime.UTC)
    return when.timestamp() / _DAY_SECONDS
