"""Logs of platforms: KuaiRand, or your own."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mmrf_jax import types
from mmrf_jax.data import named_features, sessions, statistics, stream
from mmrf_jax.data.frame_log import SessionLog
from mmrf_jax.data.readers import kuairand, served_items
from mmrf_jax.data.session_log import InputSpec, Sessions
from mmrf_jax.io import files
from mmrf_jax.io.progress import Counter, counted, say
from mmrf_jax.parallel import multihost
from mmrf_jax.training import configs, own_logs, sources
from mmrf_jax.training.sources import Source

_MOST_STATISTICS = 2**28  # entries of the table of running means


def of_kuairand(config: configs.Run) -> Source:
    if not config.kuairand.dir:
        raise ValueError("no data directory; use --config.data.dir=DIR, the folder with KuaiRand's CSV files")
    d = config.kuairand
    wanted = kuairand_config(config)
    given = files.user_path(d.dir, "config.data.dir")
    cache = files.user_path(d.cache_dir, "config.data.cache_dir")
    progress = counted if jax.process_count() == 1 else kuairand.unchecked
    log = multihost.in_turn(lambda: kuairand.open_or_prepare(given, cache, wanted, progress=progress))
    parts: dict[str, Any] = dict(log.parts)
    if d.max_sessions:
        parts["train"] = stream.Beginning(parts["train"], d.max_sessions)
    for name, field in (("train", "train_until"), ("test", "test_from")):
        if not parts[name].sessions.sum():
            found = {split: sources.read_held(config, part, split).date for split, part in parts.items()}
            days = {split: [int(date.min()), int(date.max())] for split, date in found.items() if len(date)}
            raise ValueError(
                f"no session is in the {name} days with config.data.{field}={getattr(d, field)}; "
                f"the logs hold {days}: change it"
            )
    return _of_log(config, log, parts, progress)


def kuairand_config(config: configs.Run) -> kuairand.KuaiRandConfig:
    """Return the config of how KuaiRand's rows become sessions."""
    d = config.kuairand
    return kuairand.KuaiRandConfig(
        train_until=d.train_until,
        valid_until=d.valid_until,
        test_from=d.test_from,
        candidates=d.candidates,
        slate=d.slate,
        history=d.history,
        session_gap_minutes=d.session_gap_minutes or None,
        request_gap_minutes=d.request_gap_minutes,
    )


def of_own_log(config: configs.Run, workdir: Path | None) -> Source:
    log = own_logs.open_own_log(config, workdir)
    context = named_features.plain_encoders(["at_random"] if config.own_logs.random_log == "train" else [])
    context += [
        *named_features.plain_encoders(["hour_sin", "hour_cos", "hours_away"]),
        *log.encoders.get("context", ()),
    ]
    return dataclasses.replace(
        _of_log(config, log, log.parts, counted),
        users={"user_id": log.user_ids, "profile": log.profiles},
        unknown_video=0,
        names={"item": log.encoders["items"], "profile": log.encoders["users"], "context": context},
    )


def _of_log(
    config: configs.Run, log: SessionLog | kuairand.KuaiRand, parts: Mapping[str, stream.Blocks], progress: Counter
) -> Source:
    """Return the source of a prepared log; `parts` are its sessions, or some of them."""
    d: Any = config.data
    logs: dict[str, Any] = {
        name: functools.cache(functools.partial(sources.read_held, config, part, name)) for name, part in parts.items()
    }
    there = [name for name, part in parts.items() if part.sessions.sum()]
    items, spec, ids = log.items, log.spec, log.item_ids
    served = files.user_path(d.served, "config.data.served") if d.served else None
    if served is not None:
        items, ids = served_items.with_new(items, ids, served, log.encoders.get("items", ()), log.vocabularies)
        spec = dataclasses.replace(spec, num_videos=items.num_videos)
    if d.statistics:  # computed from the platform's logs, even when training on a service's log
        items, spec = _with_statistics(items, spec, [logs[name]() for name in ("train", "valid") if name in there])
    if d.random_log == "train":
        if "random_train" not in there:
            fix = "use --config.data.random_log=off" + ("" if "random_train" in logs else ", or name schema.random")
            raise ValueError(f"config.data.random_log is 'train', and no row of training was shown at random; {fix}")
        spec = dataclasses.replace(spec, context=spec.context + 1)
        logs = _with_random_log(logs)
    if served is not None:
        logs["train"] = functools.cache(lambda: sources.read_served_log(served, spec, ids, progress, log.user_ids))
    return Source(
        items=jax.tree.map(jax.numpy.asarray, items),
        spec=spec,
        train=logs["train"],
        valid=logs["valid"] if "valid" in there else None,
        test=lambda: {name: logs[name]() for name in ("test", "random_test") if name in there},
        report=dict(log.report),
        config=config,
        video_ids=lambda: ids,
        vocabularies=dict(log.vocabularies) or None,
        blocks=lambda: None if d.served or d.random_log == "train" else sources.streamed(config, parts["train"]),
    )


def _with_statistics(items: types.Items, spec: InputSpec, past: list[Sessions]) -> tuple[types.Items, InputSpec]:
    """Add running means of feedback in past logs to the items, if the table of all days fits on every device.

    Returns:
      The items, and the spec with the features that they have now.
    """
    days, added = len(np.unique(np.concatenate([log.date for log in past]))), statistics.num_features(spec.signals)
    if (days + 1) * items.num_videos * added > _MOST_STATISTICS:
        size = 4 * (days + 1) * items.num_videos * added / 2**30
        say(
            f"input: running means of {items.num_videos:,} videos over {days} days would take {size:.1f} GiB of each "
            "device and are left out"
        )
        return items, spec
    dates, table = statistics.by_day(past, items, spec.signals)
    spec = dataclasses.replace(spec, item_features=spec.item_features + added)
    return dataclasses.replace(items, dates=dates, statistics=table), spec


def _with_random_log(logs: Mapping[str, Callable[[], Sessions]]) -> dict[str, Any]:
    """Return the logs with a first context feature that flags requests exposed at random (1 or 0).

    The training and validation logs also include the random exposures of their days, each as a session of one request.
    """

    def said(name: str) -> Sessions:
        log = logs[name]()
        flag = np.full((log.num_requests, 1), name.startswith("random"), log.context.dtype)
        return dataclasses.replace(log, context=np.concatenate([flag, log.context], axis=1))

    def together(name: str) -> Sessions:
        return sessions.concatenate([said(name), said(f"random_{name}")])

    tests = {name: functools.cache(functools.partial(said, name)) for name in ("test", "random_test")}
    return tests | {name: functools.cache(functools.partial(together, name)) for name in ("train", "valid")}
