"""Runs from Python: train a ranker, load one, rank with it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmrf_jax import configs as packaged
from mmrf_jax import fields
from mmrf_jax.agents import registry
from mmrf_jax.data import named_features
from mmrf_jax.data.frame_log import SessionLog
from mmrf_jax.envs.learned import LearnedEnv
from mmrf_jax.envs.rankers import Ranker
from mmrf_jax.io import files, progress
from mmrf_jax.parallel.partitioner import Partitioner
from mmrf_jax.serving import artifact, export, ranker
from mmrf_jax.training import configs, inputs, run_folder, startup, steps
from mmrf_jax.training import train as training
from mmrf_jax.training.train_state import TrainState

_NEW_ITEMS = 1_024  # that may be newer than a run
_REQUEST = ("candidates", "user", "history", "profile", "context", "items")  # arguments of one request

#: Of a video or a user, as the platform names it.
Id = int | str
#: What a user was shown before, oldest first: (id of the video, {signal: feedback}).
History = Sequence[tuple[Id, Mapping[str, float]]]


@dataclasses.dataclass(frozen=True)
class Run:
    """A run folder of `train` or `mmrf train`, or an artefact of `mmrf export`.

        run = mmrf.load("runs/x")
        run.rank(candidates=[3, 500, 20], history=[(7, {"click": 1})], k=2)  # ids of the 2 best

    Attributes:
      path: the folder.
    """

    path: Path

    @property
    def exported(self) -> bool:
        """Whether the folder is an artefact."""
        return (self.path / artifact.MANIFEST).exists()

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """The config of the run, as nested dictionaries."""
        return self._about["config"] if self.exported else run_folder.read_config(self.path)

    @functools.cached_property
    def results(self) -> dict[str, Any]:
        """The results of the run: A/B test, offline metrics, quality of the feedback model; {} before its end."""
        if self.exported:
            return self._about.get("results") or {}
        path = self.path / "results.json"
        return run_folder.read_json(path) if path.exists() else {}

    @functools.cached_property
    def policy(self) -> Ranker:
        """The trained ranker as an `mmrf.Policy`, for environments with the run's videos and sizes.

        Raises:
          ValueError: for an artefact, which has no checkpoint.
        """
        config, found, state = self._trained
        return registry.get(config.method).make_policy(
            state.agents, found.items, steps.agent_config(config, found.spec.signals)
        )

    def export(self, out: str | Path) -> Run:
        """Export the trained ranker to a new folder; see `mmrf_jax.serving.export`.

        Raises:
          ValueError: if the folder exists, or this is an artefact already.
        """
        out = files.user_path(str(out), "out")
        if self.exported:
            raise ValueError(f"{self.path} is an artefact already; copy the folder")
        if out.exists():
            raise ValueError(f"{out} exists; name a folder that does not")
        export.export_workdir(configs.run_of(self.config), self.path, out)
        return Run(out)

    def rank(
        self,
        candidates: Sequence[Id],
        user: Id | None = None,
        history: History | None = None,
        k: int | None = None,
        profile: Sequence[float] | Mapping[str, Any] | None = None,
        context: Sequence[float] | Mapping[str, Any] | None = None,
        items: Sequence[Mapping[str, Any]] = (),
    ) -> list[Id]:
        """Rank candidates for a user, best first.

        Args:
          candidates: ids of different videos, as the platform names them.
          user: id of the user, for platforms whose users are known; None, or one that was not in the log, is unknown.
          history: what the user was shown before; videos that the run does not know are left out, and a line on
            stderr says so once.
          k: how many to return; None for all.
          profile: [Du] of the user, or {column: value} for runs on own logs; None for the one in the log, or zeros, the
            average user.
          context: [Dx] of the request, or {name: value} without the position; None for zeros, the first request of a
            session.
          items: candidates that came after the training, to be ranked from {"id", "features": [numbers] or {column:
            value}, "author", "tag": as in the log, "duration": s}, all but the id optional; the run knows them from
            then on.

        Returns:
          The k best ids, in the type in which they came.

        Raises:
          ValueError: for unknown or repeated candidates, unknown signals, or sizes that the model does not have.
        """
        request = {"candidates": candidates, "user": user, "history": history, "profile": profile, "context": context}
        return self.rank_batch([request | {"items": items}], k)[0]

    def rank_batch(self, requests: Sequence[Mapping[str, Any]], k: int | None = None) -> list[list[Id]]:
        """Rank several requests together; each has the arguments of `rank` by name, but for `k`, which holds for all.

        Raises:
          ValueError: as `rank` does, or for arguments that it does not have.
        """
        for n, request in enumerate(requests):
            if unknown := [name for name in request if name not in _REQUEST]:
                advice = "k is an argument of rank_batch" if unknown == ["k"] else fields.nearest(unknown[0], _REQUEST)
                raise ValueError(f"requests[{n}] has {unknown[0]!r}; {advice}")
            if isinstance(request.get("candidates"), str | None):
                raise ValueError(f"candidates is {request.get('candidates')!r}; give a list of ids")
        most = max((len(request["candidates"]) for request in requests), default=1)
        serving = self._ranker(1 << max(most - 1, 0).bit_length())
        jobs = [self._job(serving, **request) for request in requests]
        ranked = []
        for request, (scores, _) in zip(requests, serving.run(jobs), strict=True):
            order = np.argsort(-scores[-1], kind="stable")[:k]  # the main agent is last
            ranked.append([request["candidates"][i] for i in order])
        return ranked

    def _job(
        self, serving: ranker.Ranker, candidates, user=None, history=None, profile=None, context=None, items=()
    ) -> ranker.Job:
        for item in items:
            serving.check(item)
            self._described.setdefault(item["id"], item)
        if self._described and (left := serving.add(list(self._described.values()))):
            raise ValueError(f"item {left[0]!r} is one too many: {_NEW_ITEMS} may be newer than {self.path}")
        rows = serving.rows_of(np.asarray(candidates))
        other = serving.manifest.get("unknown_video")
        if other is None and len(unknown := np.flatnonzero(rows < 0)):
            raise ValueError(f"candidate {candidates[unknown[0]]!r} is no video of {self.path}; describe it in items")
        if len(np.unique(np.asarray(candidates))) < len(rows):
            raise ValueError("candidates repeat a video; name each once")
        rows = np.where(rows < 0, other or 0, rows)
        number, known_profile = serving.user_of(user)
        videos, feedback, known_signals = [], [], serving.spec.signals
        for n, event in enumerate(history or ()):
            if not (isinstance(event, tuple | list) and len(event) == 2 and isinstance(event[1], Mapping)):
                raise ValueError(f"history[{n}] is {event!r}; give pairs such as ('a', {{{known_signals.main!r}: 1}})")
            video, signals = event
            feedback.append(np.zeros(len(known_signals), np.float32))
            for name, value in signals.items():
                feedback[-1][known_signals.index(name)] = value
            videos.append(video)
        known = serving.rows_of(np.asarray(videos)) >= 0
        if not known.all() and not self._said:
            self._said.add("history")
            first = videos[int(np.argmin(known))]
            progress.say(
                f"history: {np.sum(~known)} of {len(videos)} videos are not of {self.path} and are left out, the first "
                f"is {first!r}; describe new ones in items (said once)"
            )
        return ranker.Job(
            user_id=number,
            profile=_vector(serving, "profile", known_profile if profile is None else profile),
            context=_vector(serving, "context", context),
            candidates=rows,
            memory=None,
            seen=serving.seen(
                np.asarray(videos), np.reshape(np.asarray(feedback, np.float32), (-1, len(known_signals)))
            ),
        )

    def _ranker(self, max_candidates: int) -> ranker.Ranker:
        if max_candidates not in self._rankers:
            self._rankers[max_candidates] = ranker.Ranker(self._artifact, max_candidates, _NEW_ITEMS)
        return self._rankers[max_candidates]

    @functools.cached_property
    def _trained(self) -> tuple[configs.Run, inputs.Inputs, TrainState]:
        if self.exported:
            raise ValueError(f"{self.path} is an artefact, which has no checkpoint; name the run folder")
        from mmrf_jax.training import restore  # imports every source of sessions

        config = configs.run_of(self.config)
        return config, *restore.load_trained(config, self.path, Partitioner())

    @functools.cached_property
    def _described(self) -> dict[Id, Mapping[str, Any]]:
        return {}

    @functools.cached_property
    def _said(self) -> set[str]:
        return set()

    @functools.cached_property
    def _rankers(self) -> dict[int, ranker.Ranker]:
        return {}

    @functools.cached_property
    def _artifact(self) -> artifact.Artifact:
        if self.exported:
            return artifact.load(self.path)
        return export.in_memory(configs.run_of(self.config), self.path)

    @functools.cached_property
    def _about(self) -> dict[str, Any]:
        return artifact.read_manifest(self.path)


def load(path: str | Path) -> Run:
    """Load a run folder or an artefact, as in `load("runs/x")`; what is heavy is read when it is first used.

    Raises:
      ValueError: if the folder does not exist or is neither.
    """
    run = Run(files.user_path(str(path), "path"))
    if not run.path.is_dir():
        raise ValueError(
            f"there is no folder {run.path} in {Path.cwd()}; name a run folder of `mmrf train` or an artefact of `mmrf "
            "export` (those of examples/ are in the checkout)"
        )
    if not run.exported:
        run_folder.read_config(run.path)
    return run


def train(
    config: Any,
    workdir: str | Path,
    overrides: Mapping[str, Any] | None = None,
    init_from: str | Path | None = None,
    log: SessionLog | None = None,
) -> Run:
    """Train and evaluate a ranker, or resume it, as `mmrf train` does, to the same numbers.

        run = mmrf.train("world", workdir="runs/x", overrides={"quick": True, "train": {"batch": 64}})

    JAX's settings that decide numbers, such as 32-bit floats, hold until it returns (`startup.NUMBERS`).

    Args:
      config: a packaged config's name such as `world`, the path of a config file, MODULE:FUNCTION, a ConfigDict, or a
        `configs.Run`.
      workdir: the run folder.
      overrides: fields, as nested dictionaries such as {"quick": True, "train": {"batch": 64}}, or by dotted name.
      log: `SessionLog.from_frame(...)`, for the config `logs`; the run folder then holds a copy.
      init_from: a run folder, to begin with what it has learned; it stays unchanged (`training.warm_start`).

    Raises:
      ValueError: for an unknown field or an invalid value, or a folder of another config.
    """
    run = _config(config, overrides or {})
    if init_from is not None:
        run = dataclasses.replace(run, init_from=str(init_from))
    with startup.run_settings(run.quick):
        training.train_run(run, files.user_path(str(workdir), "workdir"), log=log)
    return load(workdir)


def learned_environment(run: str | Path | Run, answers: str = "sampled") -> LearnedEnv:
    """Return the feedback model of a run as an environment, `mmrf.make("learned", run="runs/x")`.

    Sessions start as those of the run's training log do, and have its candidates; see `envs.learned`. The log is that
    of the run folder (own logs), or is collected or read again.

    Args:
      run: a run folder, or a `Run`.
      answers: `sampled` feedback, or `expected`: probabilities instead of 0 and 1, and mean seconds.

    Raises:
      ValueError: for an artefact, or a run without a feedback model.
    """
    from mmrf_jax.training import restore, simulated_tests

    run = run if isinstance(run, Run) else load(run)
    config, found, state = run._trained
    plan = steps.plan_of(config, found.spec.signals)
    if not plan.use_feedback_model:
        raise ValueError(
            f"run {run.path} has no feedback model: its method is {config.method}, its ablation "
            f"{config.agents.ablation}; name another run"
        )
    source = restore.source_of(config, Partitioner(), workdir=run.path)
    return simulated_tests.feedback_simulator(source, plan, state, source.train(), answers=answers)


def _config(config: Any, overrides: Mapping[str, Any]) -> configs.Run:
    if isinstance(config, configs.Run):
        values = configs.as_dict(config)
    elif isinstance(config, str | Path):
        values = packaged.load(str(config)).to_dict()
    else:
        values = config.to_dict()
    return configs.run_of(configs.resolve_config(values, overrides))


def _vector(serving: ranker.Ranker, name: str, given: Any) -> np.ndarray:
    size = getattr(serving.spec, name)
    if isinstance(given, Mapping):
        if name not in serving.names:
            raise ValueError(f"the model knows no names of {name}; give {size} numbers")
        try:
            given = named_features.encode_named(serving.names[name], given)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if name == "context":
            given = np.append(given, 0.0)  # the first request of a session
    vector = np.zeros(size, np.float32) if given is None else np.asarray(given, np.float32)
    if vector.shape != (size,):
        raise ValueError(f"{name} has shape {vector.shape}; the model has {size} numbers there")
    return vector
