"""Offline metrics of a ranker on a session log: its scores of the exposed videos, and GAUC per signal.

`gauc` ranks by the main agent's score, which is served; `gauc_agent` by the score of the signal's own agent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from mmrf_jax import types
from mmrf_jax.data import sessions
from mmrf_jax.data.session_log import Sessions
from mmrf_jax.io import tables
from mmrf_jax.metrics import ranking
from mmrf_jax.signals import Signals

MIN_USERS = 200  # metrics need at least this many eligible users
#: Segments scored at a time.
BATCH = 512


def key(name: str, log: str) -> str:
    """Return the key in results.json of the metrics `name`, such as "offline", of a held-out log."""
    return name if log == "test" else f"{name}/{log}"


def by_log(results: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return {held-out log: the metrics `name` of results.json}, the test log first."""
    found = {"test": results[name]} if name in results else {}
    prefix = key(name, "")
    return found | {at.removeprefix(prefix): entries for at, entries in results.items() if at.startswith(prefix)}


@dataclasses.dataclass
class Rows:
    """Exposures of a log, one per row."""

    user_id: np.ndarray  # [n] int32
    video: np.ndarray  # [n] int32
    feedback: np.ndarray  # [n, S] float32
    scores: np.ndarray  # [n, N] float32 of every agent, the main one last


def score_log(
    score: Callable[[types.SessionBatch], Any],
    log: Sessions,
    *,
    num_requests: int,
    batch: int = BATCH,
    part: slice = slice(None),
    progress: Callable[[int], None] = lambda done: None,
) -> Rows:
    """Score every exposure of a log, or of a part of its segments.

    Args:
      score: jitted, SessionBatch -> scores [B, T+1, N, K] of the slates, each from the state before its request.
      num_requests: T of a segment.
      batch: segments scored at a time; the last batch is padded, so that one trace serves all.
      part: the rows of `sessions.segment_index` to score; it may be empty.
      progress: called with the number of segments scored.
    """
    every = sessions.segment_index(log, num_requests)
    index, parts = every[part], list[Rows]()
    for start in range(0, max(len(index), 1), batch):
        rows = index[start : start + batch]
        padded = np.concatenate([rows, np.repeat(every[:1], batch - len(rows), axis=0)])
        data = sessions.gather_segments(log, padded, num_requests)
        scores = np.moveaxis(np.asarray(score(data)), -2, -1)  # [B, T+1, K, N]
        keep = np.array(data.slate_mask & data.mask[..., None])
        keep[:, -1] = False  # the last request is the first of the next segment
        keep[len(rows) :] = False
        video = np.take_along_axis(data.candidates, data.slate, axis=-1)
        user = np.broadcast_to(data.user_id[:, None, None], keep.shape)
        parts.append(Rows(user[keep], video[keep], data.feedback[keep], scores[keep]))
        progress(min(start + batch, len(index)))
    fields = [f.name for f in dataclasses.fields(Rows)]
    return Rows(*(np.concatenate([getattr(p, name) for p in parts]) for name in fields))


def exposures(log: Sessions) -> Rows:
    """Return the exposures of a log without scores."""
    session, request, slot = sessions.exposure_index(log)
    video = log.candidates[request, log.slate[request, slot]]
    return Rows(log.user_id[session], video, log.feedback[request, slot], np.zeros((len(video), 0), np.float32))


def metrics(
    rows: Rows,
    signals: Signals,
    agents: tuple[str, ...],
    train: Rows,
    duration: np.ndarray,
    baselines: Mapping[str, Mapping[str, np.ndarray]] | None = None,
    draws: int = 1000,
    each: Callable[..., Iterable[Any]] = map,
) -> dict[str, dict[str, Any]]:
    """Compute GAUC per signal, and two variants for numeric ones such as watch time, all with intervals over users.

    Those are `NAME_median`, the GAUC of values above the user's median, and `NAME_xauc`.

    Args:
      rows: scored test exposures.
      signals: of the log.
      agents: signals of the agents, in the order of `rows.scores`.
      train: training exposures, for the users' medians of numeric signals.
      duration: [n] seconds, of the videos.
      baselines: {ranker: {signal: scores [n]}}, compared by a paired bootstrap.
      draws: bootstrap samples.
      each: (function, names) -> its results, in order; several processes may compute them.

    Returns:
      {signal: {"gauc", "gauc_agent" if the signal has an agent, "ci95", "eligible_users", "by_duration"}}; the last is
      the served GAUC within duration deciles, where a ranker by duration has no advantage. If a baseline scores the
      signal, also "against" {ranker: {"gauc", "diff", "diff_ci95"}}, where diff is gauc_agent (else gauc) minus the
      ranker's GAUC. Metrics with fewer than MIN_USERS eligible users are None.
    """
    parts = _parts(rows, signals, train)

    def entry_of(name: str) -> dict[str, Any]:
        part = parts[name]
        served = part.measure(rows, rows.scores[:, -1])
        entry: dict[str, Any] = {"eligible_users": int(served.eligible_users)}
        if part.left_out is not None:
            entry["users_without_training_rows"] = part.left_out
        enough = served.eligible_users >= MIN_USERS
        interval = ranking.bootstrap_interval(served.per_user, served.impressions, draws) if enough else None
        entry["gauc"] = served.value if enough else None
        entry["ci95"] = [interval.low, interval.high] if interval else None
        entry["by_duration"] = part.by_duration(rows, duration)
        own = served
        if name in agents:
            own = part.measure(rows, rows.scores[:, agents.index(name)])
            entry["gauc_agent"] = own.value if enough else None
        for ranker, scores in (baselines or {}).items():
            if part.signal not in scores:
                continue
            other = part.measure(rows, scores[part.signal])
            against: dict[str, Any] = {"gauc": other.value if enough else None, "diff": None, "diff_ci95": None}
            if enough:
                diff = ranking.paired_bootstrap(own.per_user, other.per_user, own.impressions, draws)
                against |= {"diff": diff.estimate, "diff_ci95": [diff.low, diff.high]}
            entry.setdefault("against", {})[ranker] = against
        return entry

    return dict(zip(parts, each(entry_of, parts), strict=True))


class _Part(NamedTuple):
    """A metric: its signal, the rows that count, their labels or targets, and the metric of groups."""

    signal: str
    mask: np.ndarray  # [n] bool
    label: np.ndarray  # [n]
    of_groups: Callable[..., ranking.GroupedMetric]
    left_out: int | None = None  # users without training rows

    def measure(self, rows: Rows, scores: np.ndarray) -> ranking.GroupedMetric:
        if not self.mask.any():
            return ranking.NO_USERS
        return self.of_groups(rows.user_id[self.mask], scores[self.mask], self.label[self.mask])

    def by_duration(self, rows: Rows, duration: np.ndarray) -> list[dict[str, Any]]:
        """Return the served metric within duration deciles."""
        if not self.mask.any():
            return []
        durations, users, scores = (x[self.mask] for x in (duration, rows.user_id, rows.scores[:, -1]))
        return [
            {
                "duration": [decile.low, decile.high],
                "gauc": decile.metric.value if decile.metric.eligible_users >= MIN_USERS else None,
                "eligible_users": int(decile.metric.eligible_users),
            }
            for decile in ranking.by_decile(durations, users, scores, self.label[self.mask], self.of_groups)
        ]


def _parts(rows: Rows, signals: Signals, train: Rows) -> dict[str, _Part]:
    """Return the metrics by name."""
    everyone = np.ones(len(rows.user_id), bool)
    parts = {}
    for i, signal in zip(signals.binary, signals.binary_names, strict=True):
        parts[signal] = _Part(signal, everyone, rows.feedback[:, i] > 0.5, _auc)
    for i, signal in zip(signals.numeric, signals.numeric_names, strict=True):
        values = rows.feedback[:, i]
        above, known, left_out = ranking.above_median(train.user_id, train.feedback[:, i], rows.user_id, values)
        parts[f"{signal}_median"] = _Part(signal, known, above, _auc, int(left_out))
        parts[f"{signal}_xauc"] = _Part(signal, everyone, values, ranking.grouped_xauc)
    return parts


def _auc(groups: np.ndarray, scores: np.ndarray, label: np.ndarray) -> ranking.GroupedMetric:
    return ranking.grouped_auc(groups, scores, label[:, None])[0]


def format_offline(result: dict[str, dict[str, Any]]) -> str:
    """Format metrics as a Markdown table; differences are to the baseline on their left, with their 95 % interval.

    `too few` stands for a metric of fewer than MIN_USERS users.
    """
    rankers = list(dict.fromkeys(ranker for entry in result.values() for ranker in entry.get("against", {})))
    header = ["signal", "users", "GAUC (served)", "95 %", "GAUC (own agent)"]
    header += [cell for ranker in rankers for cell in (ranker, "difference")]

    def number(x):
        return "–" if x is None else f"{x:.4f}"

    def interval(x, sign=""):
        return "–" if x is None else f"[{x[0]:{sign}.4f}, {x[1]:{sign}.4f}]"

    rows = []
    for name, entry in result.items():
        served = "too few" if entry["gauc"] is None else number(entry["gauc"])
        cells = [name, str(entry["eligible_users"]), served, interval(entry["ci95"])]
        cells.append(number(entry.get("gauc_agent")))
        for ranker in rankers:
            other = entry.get("against", {}).get(ranker, {})
            cells += [number(other.get("gauc")), interval(other.get("diff_ci95"), "+")]
        rows.append(cells)
    return tables.markdown(header, rows)
