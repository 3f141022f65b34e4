"""Warm start: a new run begins with what another run has learned (`init_from` of a config).

Parameters whose names, shapes and dtypes agree are copied; optimiser states, step counters and keys start afresh. Rows
of embedding tables are copied, with their accumulators, for the ids that both runs know:

* videos by the platform's ids; where these are row numbers, as in the world, if author, tag and duration agree,
* authors and tags by the videos that both runs know: two rows match if each is the other's most frequent partner,
* users by the platform's ids, or by number on the same kind of source where these are the ids.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmrf_jax.io import files
from mmrf_jax.io.progress import say
from mmrf_jax.models import embedding_table, embeddings
from mmrf_jax.parallel.partitioner import Partitioner
from mmrf_jax.training import configs, inputs, restore, run_folder, steps
from mmrf_jax.training.train_state import TrainState

_AGENTS = ("params", "target", "reward_scale", "q_mean", "q_scale")
_MODEL = ("params", "scale", "uncertainty_scale", "calibration", "residual", "edges", "quantiles")
_OF_AGENT = ("params/critic", "params/actor", "target", "q_mean", "q_scale")  # whose entries belong to agents' signals
_ALL = ("",)  # where the logs have other signals

Pairs = dict[str, tuple[np.ndarray, np.ndarray]]  # {table: ids in the new run, and in the old one}


def check_init_from(config: configs.Run, workdir: Path) -> None:
    """Refuse a run that cannot be started from, before anything is written.

    Raises:
      ValueError: if it does not exist, has not finished training, or is `workdir`.
    """
    if not config.init_from:
        return
    path = files.user_path(config.init_from, "init_from")
    if path.resolve() == workdir.resolve():
        raise ValueError(f"init_from={config.init_from} is the run folder itself; use another workdir for the new run")
    if run_folder.has_learned(workdir):  # it has begun already
        return
    run_folder.read_config(path)
    if not (path / "learned.json").exists():
        raise ValueError(
            f"init_from={config.init_from} has not finished training; finish it first: mmrf train --workdir={path}"
        )


def begin_from_run(config: configs.Run, new: inputs.Inputs, state: TrainState, partitioner: Partitioner) -> TrainState:
    """Return a new run's state with what the run `config.init_from` has learned; one line says what was copied.

    Args:
      config: of the new run.
      new: its inputs.
      state: its initial state; donated.
      partitioner: of the devices that `state` is on.
    """
    assert config.init_from
    path = files.user_path(config.init_from, "init_from")
    given = configs.run_of(run_folder.read_config(path))
    old, known = restore.load_trained(given, path, partitioner)
    pairs, report = shared_ids(new, old, users=config.source == given.source), _Report()

    def merged(part: str, mine: Any, theirs: Any, names: tuple[str, ...], without: tuple[str, ...] = ()) -> Any:
        learned = _merge(part, mine, theirs, names, report, without)
        return dataclasses.replace(learned, tables=_merge_tables(part, mine.tables, theirs.tables, pairs, report))

    mine, theirs = steps.agent_config(config, new.spec.signals), steps.agent_config(given, old.spec.signals)
    same = new.spec.signals == old.spec.signals
    fresh = () if same and mine.agent_signals == theirs.agent_signals else _OF_AGENT if same else _ALL
    agents = merged("agents", state.agents, known.agents, _AGENTS, fresh)
    feedback = state.feedback
    if feedback is not None and known.feedback is not None:
        feedback = merged("feedback", feedback, known.feedback, _MODEL, () if same else _ALL)
    elif feedback is not None:
        report.fresh.append("feedback")
    say(f"init_from {config.init_from}: {report}")
    return dataclasses.replace(state, agents=agents, feedback=feedback)


@dataclasses.dataclass
class _Report:
    """What was copied, and what was not."""

    copied: int = 0
    fresh: list[str] = dataclasses.field(default_factory=list)
    rows: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        modules = list(dict.fromkeys(self.fresh))
        fresh = f"fresh: {', '.join(modules)}" if modules else "none fresh"
        return f"{self.copied} arrays copied, {fresh}; rows copied: {', '.join(self.rows)}"


def _merge(
    part: str, new: Any, old: Any, names: tuple[str, ...], report: _Report, without: tuple[str, ...] = ()
) -> Any:
    """Return a state with the arrays of another under `names` where paths, shapes and dtypes agree."""

    def named(state: Any) -> list[tuple[str, Any]]:
        flat, _ = jax.tree_util.tree_flatten_with_path({name: getattr(state, name) for name in names})
        return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in flat]

    known, taken = dict(named(old)), []
    for name, leaf in named(new):
        other = known.get(name)
        fits = other is not None and (other.shape, other.dtype) == (leaf.shape, leaf.dtype)
        if fits and not name.startswith(without):
            report.copied += 1
            taken.append(other)
        else:
            report.fresh.append(f"{part}/{name.rpartition('/')[0] or name}")
            taken.append(leaf)
    tree = jax.tree.structure({name: getattr(new, name) for name in names})
    return dataclasses.replace(new, **jax.tree.unflatten(tree, taken))


def _merge_tables(part: str, new: Any, old: Any, pairs: Pairs, report: _Report) -> dict[str, embedding_table.Table]:
    merged = {}
    for name, table in new.items():
        other, merged[name] = old[name], table
        if (table.dim, table.rows.dtype) != (other.dim, other.rows.dtype):
            report.fresh.append(f"{part}/tables/{name}")
            continue
        at, there = matching_rows(table, other, *pairs[name])
        report.rows.append(f"{part}/{name} {len(at):,} of {table.num_rows:,}")
        if len(at):
            shardings = jax.tree.map(lambda x: x.sharding, table)
            copy = jax.jit(_with_rows, donate_argnums=0, out_shardings=shardings)
            merged[name] = copy(table, other.rows, other.accumulator, at, there)
    return merged


def _with_rows(table: embedding_table.Table, rows, accumulator, at, there) -> embedding_table.Table:
    return dataclasses.replace(
        table, rows=table.rows.at[at].set(rows[there]), accumulator=table.accumulator.at[at].set(accumulator[there])
    )


def shared_ids(new: inputs.Inputs, old: inputs.Inputs, users: bool) -> Pairs:
    """Return the ids of each table that both runs know, as arrays [n] in the new run and in the old one.

    Args:
      users: whether the runs number users alike.
    """
    here, there = _shared_videos(new, old)
    pairs = {
        table: (np.asarray(getattr(new.items, field))[here], np.asarray(getattr(old.items, field))[there])
        for table, field in (("author", "author"), ("id", "embedding_id"), ("tag", "tag"))
    }
    if new.users is not None and old.users is not None:
        return pairs | {embeddings.USER_TABLE: _shared(new.users["user_id"], old.users["user_id"])}
    alike = users and len(here) > 0 and new.users is None and old.users is None
    number = np.arange(min(new.spec.num_users, old.spec.num_users) if alike else 0, dtype=np.int32)
    return pairs | {embeddings.USER_TABLE: (number, number)}


def _shared_videos(new: inputs.Inputs, old: inputs.Inputs) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows [n] of the videos that both runs know, in the new run and in the old one."""
    if new.video_ids is not None and old.video_ids is not None:
        return _shared(new.video_ids, old.video_ids)
    if new.video_ids is not None or old.video_ids is not None:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    n = min(new.items.num_videos, old.items.num_videos)
    fields = [(np.asarray(getattr(x.items, name))[:n] for x in (new, old)) for name in ("author", "tag", "duration")]
    rows = np.flatnonzero(functools.reduce(np.logical_and, [a == b for a, b in fields]))
    return rows, rows


def _shared(new: np.ndarray, old: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions [n] of the ids that two arrays share; numbers and texts share none."""
    if new.dtype.kind != old.dtype.kind:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    _, here, there = np.intersect1d(new, old, return_indices=True)
    return here, there


def matching_rows(
    new: embedding_table.Table, old: embedding_table.Table, here: np.ndarray, there: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows [m] of two tables that stand for the same ids, each row at most once.

    Several ids may share a row, by a hash or as unknown ones: two rows match if each is the other's most frequent
    partner.

    Args:
      new, old: the tables.
      here, there: [n] the same ids in each.
    """
    a, b = (
        np.asarray(embedding_table.row_of(t, jnp.asarray(ids, jnp.int32))) for t, ids in ((new, here), (old, there))
    )
    exists = (a < new.num_rows) & (b < old.num_rows)
    pairs, count = np.unique(np.stack([a[exists], b[exists]], axis=1), axis=0, return_counts=True)
    pairs = pairs[np.argsort(-count, kind="stable")]
    first = [np.unique(column, return_index=True)[1] for column in pairs.T]
    mutual = pairs[np.intersect1d(first[0], first[1])]
    return mutual[:, 0], mutual[:, 1]
