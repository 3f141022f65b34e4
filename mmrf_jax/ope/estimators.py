"""Off-policy estimators: the value of a ranker, estimated from a log that another policy collected.

The weighted decision is one exposed video, given the videos above it; weights of whole slates and sessions are products
of these, and their estimates are reported separately (`propensity` has the weights). Estimators: inverse propensity
scores, IPS (Horvitz & Thompson, JASA 1952); self-normalised, SNIPS (Swaminathan & Joachims, NeurIPS 2015); normalised
and capped, NCIS (Gilotte et al., WSDM 2018), which without a cap is SNIPS; the direct and the doubly robust method, DM
and DR (Dudík et al., ICML 2011); per decision over sessions (Precup et al., ICML 2000; normalised: Thomas, "Safe
reinforcement learning", 2015). A high effective sample size does not imply a good estimate: wrong propensities can
also give one.

NumPy on the host, in float64. Letters: n decisions, r requests, N sessions, U users, M sums, S signals.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmrf_jax.abtest import statistics
from mmrf_jax.io import tables

CAPS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, np.inf)
PRINTED_CAP = 10.0  # of the doubly robust estimate in the table
_LOG_LARGEST = 300.0  # of a weight, so that its square is finite; such a log is uninformative anyway
_DRAW_CELLS = 1 << 22  # maximum resampled users held at a time by the bootstrap


@dataclasses.dataclass
class LoggedDecisions:
    """Decisions of a log, one per row, and another policy's view of them.

    A row is an exposed video or, with summed rewards, a slate; all estimates are means per video.

    Raises:
      ValueError: for inconsistent shapes or numbers that are not finite.
    """

    user_id: np.ndarray  # [n] integers; the bootstrap resamples users
    log_weight: np.ndarray  # [n] log of the policy's probability over the propensity, `propensity.log_ratio`
    reward: np.ndarray  # [n, S], summed over the row's videos
    predicted: np.ndarray | None = None  # [n, S] a model's expectation of `reward`
    direct: np.ndarray | None = None  # [n, S] the same, in expectation over the policy's own decision
    videos: np.ndarray | None = None  # [n] videos per row; None if each row is one

    def __post_init__(self):
        n = len(np.atleast_1d(self.user_id))
        if (self.predicted is None) != (self.direct is None):
            raise ValueError("of `predicted` and `direct` only one is given; give both or neither")
        if np.ndim(self.reward) != 2 or not n:
            raise ValueError(f"reward has shape {np.shape(self.reward)}, expected [n, S] with n >= 1")
        per_signal = (n, np.shape(self.reward)[1])
        shapes = {"user_id": (n,), "log_weight": (n,), "reward": per_signal, "predicted": per_signal}
        for name, shape in (shapes | {"direct": per_signal, "videos": (n,)}).items():
            value = getattr(self, name)
            if value is None:
                continue
            if np.shape(value) != shape:
                raise ValueError(f"{name} has shape {np.shape(value)}, expected {shape}: one row for each decision")
            bad = np.flatnonzero(~np.isfinite(value).reshape(n, -1).all(axis=1))
            if len(bad):
                raise ValueError(f"{name} of row {bad[0]} is {value[bad[0]]}; leave out rows without a finite one")


def estimate(
    rows: LoggedDecisions,
    signals: Sequence[str],
    caps: Sequence[float] = CAPS,
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Any]:
    """Compute all estimators on one log, with percentile intervals from a bootstrap over users.

    Args:
      signals: names of the columns of `rows.reward`.
      caps: of the weights, `inf` for none.
      draws: bootstrap samples.

    Returns:
      {"rows", "users", "weights": {cap: {"mean": of the weights, near 1 if propensities are right and no cap binds,
      "ess": effective sample size in rows (Kish), "capped": share of rows above the cap, "clipped_mass": share of the
      sum of the weights that the cap removed}}, "signals": {signal: {"logged", "dm",
      "ips": {cap}, "ncis": {cap}, "dr": {cap}: each {"value", "ci95"}}}}; "dm" and "dr" only if `rows` has a model.
      Caps are named as in "10" and "inf". If fewer than `statistics.MIN_EVENTS` users have any of a signal, "ci95" is
      None and "note" gives the reason, except for "dm", which does not count events.

    Raises:
      ValueError: for caps that are not positive, or a number of names that differs from the reward columns.
    """
    names = _cap_names(caps)
    s = np.shape(rows.reward)[1]
    if len(signals) != s:
        raise ValueError(f"{len(signals)} names for {s} signals; name each column of the reward")
    reward = np.asarray(rows.reward, np.float64)
    videos = np.ones(len(reward)) if rows.videos is None else np.asarray(rows.videos, np.float64)
    weight = _weights(rows.log_weight)
    users, user = np.unique(rows.user_id, return_inverse=True)
    columns = [videos, *reward.T]
    if rows.direct is not None:
        columns += [*np.asarray(rows.direct, np.float64).T]
        error = reward - np.asarray(rows.predicted, np.float64)
    for cap in caps:
        capped = np.minimum(weight, cap)
        columns += [capped * videos, *(capped * reward.T)]
        columns += [] if rows.direct is None else [*(capped * error.T)]
    sums = np.stack([np.bincount(user, column, len(users)) for column in columns], axis=1)
    totals = np.concatenate(
        [sums.sum(axis=0, keepdims=True), resampled_sums(sums, draws, seed)]
    )  # the log itself first

    after = iter(np.split(totals, np.cumsum([1, s] + [s] * (rows.direct is not None)), axis=1))
    number, observed = next(after), next(after)
    values: dict[str, Any] = {"logged": observed / number}
    if rows.direct is not None:
        values["dm"] = next(after) / number
    values |= {"ips": {}, "ncis": {}} | ({} if rows.direct is None else {"dr": {}})
    each = np.split(next(after), len(names), axis=1)
    for name, part in zip(names, each, strict=True):
        mass, weighted = part[:, :1], part[:, 1 : 1 + s]
        values["ips"][name], values["ncis"][name] = weighted / number, weighted / mass
        if rows.direct is not None:
            values["dr"][name] = values["dm"] + part[:, 1 + s :] / number
    return {
        "rows": len(reward),
        "users": len(users),
        "weights": dict(zip(names, (_of_weights(weight, cap) for cap in caps), strict=True)),
        "signals": _by_signal(values, signals, level, np.count_nonzero(sums[:, 1 : 1 + s], axis=0)),
    }


def per_decision(
    user_id: np.ndarray,
    offsets: np.ndarray,
    log_weight: np.ndarray,
    reward: np.ndarray,
    discount: float,
    signals: Sequence[str],
    caps: Sequence[float] = CAPS,
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Any]:
    """Estimate the discounted sum over a session; each request's weight is the product of the slates' weights up to it.

    "ips" is the per-decision estimator; "ncis" normalises at each request by the weights of all sessions, where
    sessions that have ended keep their last weight. Caps apply to the products.

    Args:
      user_id: [N] of the sessions.
      offsets: [N + 1]; the requests of session i are rows offsets[i]:offsets[i + 1].
      log_weight: [r] of the slates.
      reward: [r, S], summed over the slate.
      discount: per request, in [0, 1].

    Returns:
      As `estimate`, where "rows" are sessions and "weights" those of whole sessions.

    Raises:
      ValueError: for inconsistent shapes, sessions without requests, or numbers that are not finite.
    """
    names, lengths = _cap_names(caps), np.diff(offsets)
    requests = LoggedDecisions(np.repeat(user_id, lengths), log_weight, reward)
    if len(offsets) != len(user_id) + 1 or (lengths < 1).any():
        raise ValueError(f"offsets {np.shape(offsets)} must give each of {len(user_id)} sessions at least one request")
    s, longest = requests.reward.shape[1], int(lengths.max())
    total = np.cumsum(log_weight, dtype=np.float64)
    before = np.concatenate([[0.0], total])[offsets[:-1]]
    position = np.minimum(np.arange(longest), lengths[:, None] - 1)
    weight = _weights(total[offsets[:-1, None] + position] - before[:, None])  # [N, T]; the last weight is repeated
    gains = np.zeros((len(lengths), longest, s))
    live = np.arange(longest) < lengths[:, None]
    gains[live] = requests.reward
    gains *= discount ** np.arange(longest)[:, None]
    users, user = np.unique(user_id, return_inverse=True)
    order = np.argsort(user, kind="stable")
    starts = np.searchsorted(user[order], np.arange(len(users)))

    def resampled(sums):
        return np.concatenate([sums.sum(axis=0, keepdims=True), resampled_sums(sums, draws, seed)])

    def by_user(x):
        return np.add.reduceat(x.reshape(len(x), -1)[order], starts, axis=0)

    earned = by_user(np.concatenate([gains.sum(axis=1), np.ones((len(gains), 1))], axis=1))
    plain = resampled(earned)
    number = plain[:, -1:]
    values: dict[str, Any] = {"logged": plain[:, :-1] / number, "ips": {}, "ncis": {}}
    for name, cap in zip(names, caps, strict=True):
        capped = np.minimum(weight, cap)[..., None]
        sums = resampled(by_user(np.concatenate([capped * gains, capped], axis=2)))
        sums = sums.reshape(len(sums), longest, s + 1)
        values["ips"][name] = sums[..., :-1].sum(axis=1) / number
        values["ncis"][name] = (sums[..., :-1] / sums[..., -1:]).sum(axis=1)
    return {
        "rows": len(lengths),
        "users": len(users),
        "weights": dict(zip(names, (_of_weights(weight[:, -1], cap) for cap in caps), strict=True)),
        "signals": _by_signal(values, signals, level, np.count_nonzero(earned[:, :-1], axis=0)),
    }


def format_estimates(units: Mapping[str, Mapping[str, Any]]) -> str:
    """Format one log's estimates as two Markdown tables: weights by unit and cap, and values with intervals."""
    header = ["unit", "rows", "users", "cap", "mean weight", "effective rows", "capped, %", "clipped mass, %"]
    weights = []
    for unit, result in units.items():
        for cap, entry in result["weights"].items():
            cells = [
                unit,
                str(result["rows"]),
                str(result["users"]),
                cap,
                f"{entry['mean']:.3f}",
                f"{entry['ess']:.1f}",
            ]
            weights.append(cells + [f"{100 * entry[key]:.2f}" for key in ("capped", "clipped_mass")])
    first = tables.markdown(header, weights)
    caps = list(next(iter(units.values()))["weights"])
    printed = _cap_names([PRINTED_CAP])[0]
    header = ["unit", "signal", "logged", "DM", f"DR, cap {printed}", *(f"NCIS, cap {cap}" for cap in caps)]
    values = []
    for unit, result in units.items():
        for signal, entry in result["signals"].items():
            cells = [entry["logged"], entry.get("dm"), entry.get("dr", {}).get(printed)]
            cells += [entry["ncis"].get(cap) for cap in caps]
            values.append([unit, signal, *(_cell(x) for x in cells)])
    return f"{first}\n\n{tables.markdown(header, values)}"


def _cell(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "–"
    if entry["ci95"] is None:
        return f"{entry['value']:.4g}, {statistics.reason(entry)}"
    return f"{entry['value']:.4g} [{entry['ci95'][0]:.4g}, {entry['ci95'][1]:.4g}]"


def _weights(log_weight: np.ndarray) -> np.ndarray:
    return np.exp(np.clip(np.asarray(log_weight, np.float64), -_LOG_LARGEST, _LOG_LARGEST))


def _of_weights(weight: np.ndarray, cap: float) -> dict[str, float]:
    capped = np.minimum(weight, cap)
    return {
        "mean": float(capped.mean()),
        "ess": float(capped.sum() ** 2 / (capped**2).sum()),
        "capped": float((weight > cap).mean()),
        "clipped_mass": float(1.0 - capped.sum() / weight.sum()),
    }


def _cap_names(caps: Sequence[float]) -> list[str]:
    if not len(caps) or not all(cap > 0 for cap in caps):
        raise ValueError(f"caps {tuple(caps)} must be positive, inf for none; name at least one")
    return [f"{cap:g}" for cap in caps]


def resampled_sums(sums: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """Return sums [draws, M] over users drawn with replacement, given each user's sums [U, M]."""
    rng, users = np.random.default_rng(seed), len(sums)
    chunk = max(1, _DRAW_CELLS // users)
    parts = []
    for first in range(0, draws, chunk):
        size = min(chunk, draws - first)
        # Offsetting the users of draw i by i * users lets one count serve all draws of the chunk.
        drawn = rng.integers(0, users, (size, users), dtype=np.int32) + users * np.arange(size, dtype=np.int32)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * users).reshape(size, users)
        parts.append(counts.astype(np.float64) @ sums)
    return np.concatenate(parts) if parts else np.empty((0, sums.shape[1]))


def _by_signal(values: dict[str, Any], signals: Sequence[str], level: float, events: np.ndarray) -> dict[str, Any]:
    """Return {signal: {estimator: entry, or {cap: entry}}} of values [1 + draws, S], the first row being the log's own.

    Args:
      events: [S] number of users with any of a signal.
    """
    notes = [statistics.too_few({"the log": int(number)}) for number in events]

    def entries(estimator: str, x: np.ndarray) -> list[dict[str, Any]]:
        low, high = np.quantile(x[1:], [0.5 - level / 2, 0.5 + level / 2], axis=0)
        found: list[dict[str, Any]] = []
        for value, bounds, note in zip(x[0], zip(low, high, strict=True), notes, strict=True):
            if note and estimator != "dm":
                found.append({"value": float(value), "ci95": None, "note": note})
            else:
                found.append({"value": float(value), "ci95": [float(bound) for bound in bounds]})
        return found

    made = {
        name: {cap: entries(name, x) for cap, x in value.items()} if isinstance(value, dict) else entries(name, value)
        for name, value in values.items()
    }

    def pick(made, i):
        return {cap: x[i] for cap, x in made.items()} if isinstance(made, dict) else made[i]

    return {signal: {name: pick(x, i) for name, x in made.items()} for i, signal in enumerate(signals)}
