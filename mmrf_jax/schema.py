"""What the columns of a log mean. This module does not import JAX, so schemas can be written and read without it."""

from __future__ import annotations

import dataclasses
import importlib.util
import traceback
import zoneinfo
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmrf_jax.io import copies, files
from mmrf_jax.signals import UNITS, Signal, Signals

TIME_UNITS = {"s": 1_000.0, "ms": 1.0, "us": 1e-3, "ns": 1e-6}  # milliseconds of one unit
#: Columns of a log other than the signals' and the three required ones.
OPTIONAL = ("request", "position", "propensity", "candidates", "duration", "random")


@dataclasses.dataclass(frozen=True)
class Schema:
    """The columns of a log, and how its rows become sessions. A row is one shown item.

        schema = Schema(user="user_id", item="item_id", time="ts", signals=[Signal("like", column="liked")])

    Attributes:
      user, item: columns of ids: strings, or integers of at most 64 bits.
      time: column of times: datetimes, ISO strings, or numbers in `time_unit`.
      signals: the feedback, at least one.
      main: name of the signal that decides what is shown; needed with several signals.
      request: column that is equal for the items that were shown together.
      position: column of the item's place in its request; smaller is shown first.
      propensity: column of the logging policy's probability of the item at its place, given the items above it.
      candidates: column of a list of item ids: what the logging policy chose from; all rows of a request have the same.
      duration: column of the item's own length, such as a video's, in the log or in the item table.
      random: column that is true where the item was drawn uniformly from the candidates. Such rows are sessions of one
        request with propensity 1/C, in parts of their own (`random_train` …) and in no history; nothing is fitted on
        them.
      context: columns that say something of the request, such as the device: features of it, like those of items.
      agents: names of the signals with an agent; None for all. The main one is put last.
      author, tag: columns of the item table; None if it has none.
      available: column of the item table: the day from which an item may be sampled as a candidate, such as that of its
        upload; None, or an empty cell, for the day that first shows it.
      time_unit: `s`, `ms`, `us` or `ns`; None to infer it.
      time_zone: in which days begin, and of times that name no zone.
      duration_unit: `ms`, `s`, `min` or `h`; None to infer it from the column's name, such as `duration_ms`.
      split: how time is cut into training, validation and test: three shares of the rows; a number N, for the last N
        days as test and the N before as validation; or two dates such as "2024-05-02", the last days of training and of
        validation.
      session_gap: minutes without a row that end a session.
      request_gap: minutes without a row that end a reconstructed request; None for those of a session.
      request_by: columns that rows of a reconstructed request share, such as the tab.
      slate_size: K, the most items of a request; None to infer it.
      num_candidates: C, the candidates of a request; None to infer it.
      history: H, how many earlier items a user arrives with.

    Raises:
      ValueError: for fields that cannot be, naming the field, its value and the fix.
    """

    user: str
    item: str
    time: str
    signals: Sequence[Signal]
    main: str | None = None
    request: str | None = None
    position: str | None = None
    propensity: str | None = None
    candidates: str | None = None
    duration: str | None = None
    random: str | None = None
    agents: Sequence[str] | None = None
    context: Sequence[str] = ()
    author: str | None = None
    tag: str | None = None
    available: str | None = None
    time_unit: str | None = None
    time_zone: str = "UTC"
    duration_unit: str | None = None
    split: Sequence[float] | Sequence[str] | int = (0.8, 0.1, 0.1)
    session_gap: float = 30.0
    request_gap: float | None = None
    request_by: Sequence[str] = ()
    slate_size: int | None = None
    num_candidates: int | None = None
    history: int = 32

    def __post_init__(self):
        for name in ("signals", "agents", "context", "split", "request_by"):
            value = getattr(self, name)
            if name != "split" and value is not None and not isinstance(value, list | tuple):
                raise ValueError(f"schema.{name} is {value!r}; give a list, such as [{value!r}]")
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        self._check_names()
        if self.main is None and len(self.signals) == 1:
            object.__setattr__(self, "main", self.signals[0].name)
        self._check_signals()
        for name, among in (("time_unit", TIME_UNITS), ("duration_unit", UNITS)):
            if (value := getattr(self, name)) is not None and value not in among:
                raise ValueError(f"schema.{name} is {value!r}; choose among {', '.join(among)}, or None to infer it")
        if self.time_zone not in zoneinfo.available_timezones():
            raise ValueError(f"schema.time_zone is {self.time_zone!r}; name a zone such as UTC or Asia/Shanghai")
        self._check_split()
        self._check_sizes()
        roles: dict[str, str] = {}
        for role, column in self.columns().items():
            if column in roles:
                raise ValueError(f"schema.{role} and schema.{roles[column]} are both {column!r}; name a column once")
            roles[column] = role

    def _check_names(self) -> None:
        optional = {role: getattr(self, role) for role in (*OPTIONAL, "author", "tag", "available")}
        named = {role: getattr(self, role) for role in ("user", "item", "time")}
        named |= {role: column for role, column in optional.items() if column is not None}
        for of in ("context", "request_by"):
            named |= {f"{of}[{i}]": name for i, name in enumerate(getattr(self, of))}
        for role, column in named.items():
            if not (isinstance(column, str) and column):
                raise ValueError(f"schema.{role} is {column!r}; give the name of a column")

    def _check_signals(self) -> None:
        if not self.signals or not all(isinstance(signal, Signal) for signal in self.signals):
            raise ValueError(f"schema.signals is {self.signals!r}; give at least one Signal")
        if self.main is None:
            raise ValueError(
                f"schema.main is None; choose the main signal among {', '.join(s.name for s in self.signals)}"
            )
        if self.agents is not None and self.main not in self.agents:
            raise ValueError(f"schema.agents {', '.join(self.agents)} lack the main signal {self.main!r}; add it")
        self.as_signals()

    def _check_split(self) -> None:
        given: Any = self.split
        if isinstance(given, tuple) and len(given) == 3 and all(isinstance(x, int | float) for x in given):
            if min(given) >= 0 and given[0] > 0 and given[2] > 0 and abs(sum(given) - 1) < 1e-6:
                return
        elif isinstance(given, tuple) and len(given) == 2 and all(isinstance(x, str) for x in given):
            days = [x.replace("-", "") for x in given]
            if all(day.isdigit() and len(day) == 8 for day in days) and days[0] < days[1]:
                return
        elif isinstance(given, int) and not isinstance(given, bool) and given > 0:
            return
        raise ValueError(
            f"schema.split is {self.split!r}; give three shares that sum to 1 such as (0.8, 0.1, 0.1), a number of "
            "last days such as 7, or the last days of training and validation such as ('2024-05-02', '2024-05-03')"
        )

    def _check_sizes(self) -> None:
        for name in ("slate_size", "num_candidates", "history"):
            if (value := getattr(self, name)) is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"schema.{name} is {value!r}; give a whole number of at least 1")
        for name in ("session_gap", *(["request_gap"] if self.request_gap is not None else [])):
            if not isinstance(gap := getattr(self, name), int | float) or not gap > 0:
                raise ValueError(f"schema.{name} is {gap!r}; give minutes above 0")
        if self.request and (self.request_by or self.request_gap):
            raise ValueError("schema.request names the requests, so leave out request_gap and request_by")
        if self.slate_size and self.num_candidates and self.num_candidates < self.slate_size:
            raise ValueError(
                f"schema.num_candidates={self.num_candidates} is less than slate_size={self.slate_size}; raise it"
            )

    def as_signals(self) -> Signals:
        """Return the signals with the agents' order: the main one last."""
        names = [signal.name for signal in self.signals] if self.agents is None else list(self.agents)
        if self.main not in names:
            raise ValueError(f"schema.main is {self.main!r}; choose among {', '.join(names)}")
        others = tuple(name for name in names if name != self.main)
        return Signals(tuple(self.signals), (*others, str(self.main)))

    def columns(self) -> dict[str, str]:
        """Return {role: column} of the log: `user`, `item`, `time`, the optional ones that are named, `signal NAME`."""
        named = {role: getattr(self, role) for role in ("user", "item", "time", *OPTIONAL)}
        named |= {f"signal {signal.name}": signal.column or signal.name for signal in self.signals}
        named |= {f"context {name}": name for name in self.context}
        named |= {f"request_by {name}": name for name in self.request_by if name not in self.context}
        return {role: column for role, column in named.items() if column is not None}

    def as_dict(self) -> dict[str, Any]:
        """Return the schema as plain values, which `of` reads back."""
        return dataclasses.asdict(self) | {"signals": [dataclasses.asdict(signal) for signal in self.signals]}


def of(values: Mapping[str, Any]) -> Schema:
    """Return the schema of `Schema.as_dict`."""
    return Schema(**{**values, "signals": [Signal(**signal) for signal in values["signals"]]})


def load(path: str | Path) -> Schema:
    """Load the `schema` that a Python file defines.

    Raises:
      ValueError: if the file does not exist, is wrong, or defines no `Schema` of that name.
    """
    path = files.user_path(str(path), "schema")
    spec = importlib.util.spec_from_file_location(path.stem, copies.local(path) if path.is_file() else path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ValueError(f"{path} is no Python file; name one that defines `schema`")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, ImportError, NameError, TypeError, AttributeError) as error:
        file, lines = spec.loader.get_filename(), traceback.walk_tb(error.__traceback__)  # type: ignore[attr-defined]
        line = max((number for frame, number in lines if frame.f_code.co_filename == file), default=None)
        line = error.lineno if isinstance(error, SyntaxError) else line
        reason = error.msg if isinstance(error, SyntaxError) else str(error).split("\n")[0]
        raise ValueError(f"{path}, line {line}: {reason}; correct the file") from error
    found = getattr(module, "schema", None)
    if not isinstance(found, Schema):
        raise ValueError(f"{path} defines no `schema` of type mmrf_jax.Schema, but {found!r}; assign one")
    return found
