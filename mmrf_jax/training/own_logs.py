"""The log of a run on `logs`: read from the config's tables or given, and then stored in the run folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from mmrf_jax import schema as schemas
from mmrf_jax.data import frame_log
from mmrf_jax.data.frame_log import SessionLog
from mmrf_jax.io import files
from mmrf_jax.parallel import multihost
from mmrf_jax.training import config_sections, configs, run_folder

_CACHE = "~/.cache/mmrf_jax/logs"


def prepare_own_log(
    config: configs.Run, workdir: Path, log: SessionLog | None
) -> tuple[configs.Run, SessionLog | None]:
    """Return a run's config with the sizes of its log, and the log; both unchanged for other sources.

    A run that has learned something already keeps the log of its folder, unless another one is given.

    Raises:
      ValueError: for a log that does not fit the config, or none.
    """
    if log is not None and not isinstance(log, SessionLog):
        raise ValueError(f"log is of type {type(log).__name__}; give SessionLog.from_frame(log, schema)")
    if config.source != "logs":
        if log is not None:
            raise ValueError(f"config.source={config.source!r} reads no log that is given; use the config 'logs'")
        return config, None
    if log is None:
        stored = workdir / run_folder.LOG
        resumes = run_folder.has_learned(workdir) and stored.exists()
        log = SessionLog.open(stored) if resumes else multihost.in_turn(lambda: read_own_log(config.own_logs))
    found = {"slate": log.spec.slate, "candidates": log.spec.candidates, "digest": log.digest()}
    for name, value in found.items():
        if (asked := getattr(config.own_logs, name)) and asked != value:
            raise ValueError(
                f"config.data.{name} is {asked!r}, and the log has {value!r}; leave it out or read the log again"
            )
    return configs.override(config, data=found), log


def open_own_log(config: configs.Run, workdir: Path | None) -> SessionLog:
    """Return the log in a run's folder; without a folder, that of the config's tables.

    Raises:
      ValueError: if the config has other sizes than the log; a run's own config has those of its log.
    """
    stored = None if workdir is None else workdir / run_folder.LOG
    if stored is not None and stored.exists():
        log = SessionLog.open(stored)
    else:
        log = multihost.in_turn(lambda: read_own_log(config.own_logs))
    if (config.sizes.slate, config.sizes.candidates) != (log.spec.slate, log.spec.candidates):
        raise ValueError(
            f"the log has slates of {log.spec.slate} among {log.spec.candidates} candidates, the config of "
            f"{config.sizes.slate} among {config.sizes.candidates}; use --config.data.slate={log.spec.slate} "
            f"--config.data.candidates={log.spec.candidates}"
        )
    return log


def read_own_log(
    data: config_sections.OwnLogs, quiet: bool = False, folder: Path | None = None, engine: Any = None
) -> SessionLog:
    """Return the prepared log of the tables that a config names, or of the folder that `mmrf prepare` wrote.

    Args:
      data: names the tables.
      quiet: whether to say nothing.
      folder: a new folder for the prepared log; None for one in `data.cache_dir`, where the next call with the same
        files and schema finds it.
      engine: as of `SessionLog.from_frame`.

    Raises:
      ValueError: if a path is missing, or as `SessionLog.from_frame`.
    """
    if not data.path:
        raise ValueError("no log to read: config.data.path is empty; use --config.data.path=PATH")
    path = files.user_path(data.path, "config.data.path")
    if (path / frame_log.ABOUT).exists():
        return SessionLog.open(path)
    if not data.schema:
        raise ValueError("no log to read: config.data.schema is empty; use --config.data.schema=PATH")
    schema = schemas.load(data.schema)
    sizes: dict[str, Any] = {
        "slate_size": data.slate or schema.slate_size,
        "num_candidates": data.candidates or schema.num_candidates,
    }
    schema = dataclasses.replace(schema, **sizes)
    tables: dict[str, Any] = {"log": data.path}
    tables |= {"items": data.item_table or None, "users": data.user_table or None}
    tables |= {"candidates": data.candidate_table or None}
    if folder is None:
        cache = files.user_path(data.cache_dir or _CACHE, "config.data.cache_dir")
        folder = cache / frame_log.log_key(tables, schema)
    if not folder.exists():
        return SessionLog.from_frame(**tables, schema=schema, quiet=quiet, folder=folder, engine=engine)
    log = SessionLog.open(folder)
    return log if quiet else log.said()
