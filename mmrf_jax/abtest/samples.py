"""Per-user samples of metrics from the tables of an experiment's arms: columns, functions, ratios and CUPED.

A sample's mean is the metric and its variance that of a user's contribution, so that one test serves all metrics.
Letters: n users of an arm.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from mmrf_jax.estimate import column

#: Numbers of users that differ by less than this share of their size differ by rounding alone.
_ROUNDING = 1e-14


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """A metric of an arm.

    Attributes:
      values: [n] whose mean is the metric and whose variance is that of a user's contribution to it.
      events: users with any of it.
      scale: size of the numbers that `values` were computed from.
      note: why the metric is undefined, or what adjusts nothing.
    """

    values: np.ndarray
    events: int
    scale: float
    note: str = ""


def tables_of(arms: Mapping[Hashable, Any], control: Hashable) -> dict[Hashable, dict[Hashable, Any]]:
    """Return {arm: {column: values}} of tables of any kind."""
    if not isinstance(arms, Mapping):
        raise ValueError(f"arms is of type {type(arms).__name__}; give a table for each arm, {{arm: table}}")
    if control not in arms:
        raise ValueError(f"control={control!r} is no arm; choose among {', '.join(map(repr, arms)) or 'none at all'}")
    tables: dict[Hashable, dict[Hashable, Any]] = {}
    for arm, table in arms.items():
        if hasattr(table, "column_names"):  # pyarrow
            names = list(table.column_names)
        elif isinstance(table, Mapping) or hasattr(table, "columns"):
            names = list(getattr(table, "columns", table))
        else:
            table, names = {"value": table}, ["value"]
        tables[arm] = {name: table[name] for name in names}
        if not names:
            raise ValueError(f"arm {arm!r} has no columns; give one number for each user and metric")
    return tables


def parts_of(
    metrics: Mapping[Hashable, Any] | Sequence[Hashable] | None,
    tables: Mapping[Hashable, Mapping[Hashable, Any]],
    control: Hashable,
    covariate: Hashable | None,
) -> dict[Hashable, Any]:
    """Return {metric: column, function or pair of these}, checked against the columns of every arm."""
    own = tables[control]
    if metrics is None:
        for arm, table in tables.items():
            if set(table) != set(own):
                raise ValueError(f"arm {arm!r} has columns {listed(table)}, the control {listed(own)}")
        texts = [name for name in own if name != covariate and np.asarray(own[name]).dtype.kind in "US"]
        if texts and len(own) > 1:
            others = [name for name in own if name not in (covariate, *texts)]
            raise ValueError(
                f"column {texts[0]!r} of arm {control!r} is text; name the metrics, such as metrics={others}"
            )
    if isinstance(metrics, (str, bytes)):
        raise ValueError(f"metrics={metrics!r} is one string; give a list of columns, such as [{metrics!r}]")
    named = metrics if isinstance(metrics, Mapping) else {name: name for name in own if name != covariate}
    if metrics is not None and not isinstance(metrics, Mapping):
        named = {name: name for name in metrics}
    for arm, table in tables.items():
        if covariate is not None and covariate not in table:
            raise ValueError(f"covariate={covariate!r} is no column of arm {arm!r}; choose among {listed(table)}")
    return dict(named)


def sample_of(arm: Hashable, metric: Hashable, part: Any, table: Mapping[Hashable, Any]) -> Sample:
    """Return a metric of an arm; of a ratio, its linearised values."""
    if not isinstance(part, (tuple, list)) or _is_column(part, table):
        values = of_users(arm, table, part, metric)
        sample = Sample(values, int(np.count_nonzero(values)), float(np.abs(values).max(initial=0.0)))
    elif len(part) != 2:
        raise ValueError(f"metrics[{metric!r}] has {len(part)} parts; give (numerator, denominator)")
    else:
        sample = _ratio(arm, *(of_users(arm, table, x, metric) for x in part))
    if sample.note or math.isfinite(sample.values.sum()):
        return sample
    note = f"the numbers of {arm} are too large"
    return dataclasses.replace(sample, values=np.full(len(sample.values), math.nan), note=note)


def _ratio(arm: Hashable, top: np.ndarray, bottom: np.ndarray) -> Sample:
    """Return Σ top / Σ bottom of users, linearised: its mean is the ratio, its variance that of the delta method."""
    events, total = int(np.count_nonzero(top)), bottom.sum()
    if not total:
        return Sample(np.full(len(top), math.nan), events, 0.0, f"the denominator of {arm} is 0" if len(top) else "")
    ratio, mean = top.sum() / total, total / len(bottom)
    scale = float((np.abs(top).max() + abs(ratio) * np.abs(bottom).max()) / abs(mean))
    return Sample(ratio + (top - ratio * bottom) / mean, events, scale)


def of_users(arm: Hashable, table: Mapping[Hashable, Any], part: Any, metric: Hashable = None) -> np.ndarray:
    """Return a column, or a function of all columns, as float64 [n]."""
    rows = rows_of(table)
    if callable(part):
        arrays = {name: np.asarray(x) for name, x in table.items()}
        return column(f"{metric} of arm {arm!r}", part(arrays), ("its users", rows)).astype(np.float64)
    if not _is_column(part, table):
        raise ValueError(f"metrics[{metric!r}] needs {part!r}, no column of arm {arm!r}; it has {listed(table)}")
    values = column(f"{part} of arm {arm!r}", table[part])
    if len(values) != rows:
        shapes = {name: np.shape(x) for name, x in table.items()}
        raise ValueError(f"arm {arm!r} has columns of shapes {shapes}; give one number for each user")
    return values.astype(np.float64)


def _is_column(part: Any, table: Mapping[Hashable, Any]) -> bool:
    try:
        return part in table
    except TypeError:  # not hashable
        return False


def rows_of(table: Mapping[Hashable, Any]) -> int:
    first = next(iter(table.values()))
    return len(first) if hasattr(first, "__len__") else 0


def adjusted(
    samples: dict[Hashable, Sample], x: Mapping[Hashable, np.ndarray], covariate: Hashable
) -> dict[Hashable, Sample]:
    """CUPED: values minus θ (x − mean of x over all arms), θ the pooled within-arm regression."""
    defined = {arm: x[arm] for arm, sample in samples.items() if len(x[arm]) and not np.isnan(sample.values).any()}
    if not defined:
        return samples
    if not any(differ(part, np.abs(part).max()) for part in defined.values()):
        note = f"the covariate {covariate!r} is constant and adjusts nothing"
        return samples | {arm: dataclasses.replace(samples[arm], note=note) for arm in defined}
    centred = {arm: part - part.mean() for arm, part in defined.items()}
    spread = sum(float(part @ part) for part in centred.values())
    theta = sum(float(part @ samples[arm].values) for arm, part in centred.items()) / spread
    overall = np.concatenate(list(defined.values())).mean()
    made = dict(samples)
    for arm, part in defined.items():
        scale = samples[arm].scale + float(np.abs(theta) * np.abs(part).max())
        values = samples[arm].values - theta * (part - overall)
        made[arm] = dataclasses.replace(samples[arm], values=values, scale=scale)
    return made


def differ(values: np.ndarray, scale: float) -> bool:
    """Return whether values differ by more than rounding."""
    return bool(np.ptp(values) > _ROUNDING * scale)


def listed(names: Any) -> str:
    return str(sorted(map(str, names)))
