"""Checkpoints of the whole training state: asynchronous, limited in number and verified before use.

This is the only module that imports orbax. A step has two items, each in a folder: the embedding tables, which may be
orders of magnitude larger than the rest, and the rest of the state. If the process is killed

* during a save: a temporary directory remains. It is not a step; training removes it when it opens the folder again.
* after the commit: a step with checksums (`integrity`) remains. It is complete or, if damaged later, detected as such.
* during the deletion of an old step: a step with missing files remains. It counts as damaged; the next clean-up
  removes it.

In object storage a step is complete when it has `commit_success.txt`, which is written last and deleted first. Orbax
and TensorStore write to gs:// directly, from every process; other protocols go through `staging`, from one process.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from mmrf_jax.checkpointing import backend, integrity, leaves, literal, staging
from mmrf_jax.checkpointing.leaves import targets
from mmrf_jax.io import storage
from mmrf_jax.io.storage import RemotePath
from mmrf_jax.types import PyTree

_ITEMS = ("state", "tables")
_WRITTEN = 2  # peak disk usage in bytes for each byte of a state: orbax writes, then merges

literal.make_globs_literal()

__all__ = ["CheckpointError", "Checkpoints", "targets"]


class CheckpointError(RuntimeError):
    """An error in writing or reading checkpoints; the message names the folder, the step and the fix."""


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Hide what orbax logs below the level of errors."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)


class Checkpoints:
    """The checkpoints of one run, one directory per step.

    Use it as a context manager, or call `close()`, which finishes the last save. Steps newer than the one being saved
    belong to an abandoned history (the run fell back past a damaged step, or was reset to an older one). They are
    deleted after the new step is committed, so the newest step always belongs to the current history.

    Args:
      directory: folder of the steps; created if needed.
      keep: number of undamaged steps to retain (one more during a save).
      save_interval: `save` without `force` saves the steps that are multiples of it.
      read_only: for a process that only reads what another may be writing: it creates, cleans and deletes nothing.
      agree: calls a function in one process and returns the result in all, so only one of several processes reads the
        checksums.

    Raises:
      CheckpointError: if the directory is not writable, or does not exist with `read_only`.
      ValueError: for `keep` or `save_interval` below 1.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        keep: int = 3,
        save_interval: int = 1,
        *,
        read_only: bool = False,
        agree: Callable[[Callable[[], Any]], Any] = lambda say: say(),
    ) -> None:
        if keep < 1 or save_interval < 1:
            raise ValueError(f"keep is {keep} and save_interval {save_interval}; both must be at least 1")
        self._directory: Any = storage.path(directory)
        self._keep, self._save_interval, self._read_only = keep, save_interval, read_only
        self._agree = agree
        self._pending: tuple[int, leaves.Spec] | None = None  # the step whose save may still be in progress
        self._current: int | None = None  # the step last saved or restored here; saving it again changes nothing
        self._damaged: set[int] = set()
        self._check_directory()
        self._staging: staging.Staging | None = None
        if not storage.is_remote(directory):
            self._directory = epath.Path(os.path.abspath(directory))
        elif str(directory).startswith("gs://"):
            backend.use_storage()
            self._directory = epath.Path(str(directory))
        elif jax.process_count() > 1:
            raise CheckpointError(f"several processes cannot save to {directory}; use gs://, or a folder that all see")
        else:
            self._staging = staging.Staging(RemotePath(str(directory)), read_only)
        asynchronous = None if read_only else ocp.AsyncOptions(post_finalization_callback=self._write_checksums)
        with _without_warnings() if read_only else contextlib.nullcontext():  # orbax warns that it is read-only
            self._manager = ocp.CheckpointManager(
                self._local,
                item_names=_ITEMS,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=None,  # `_settle` deletes, once the new step is committed
                    create=not read_only,
                    read_only=read_only,
                    cleanup_tmp_directories=not read_only,
                    lightweight_initialize=True,  # `verify` handles damaged metadata files
                    async_options=asynchronous,
                ),
            )

    @property
    def _local(self) -> epath.Path:
        """Return the folder that orbax writes to."""
        return self._directory if self._staging is None else epath.Path(self._staging.folder)

    def save(self, step: int, state: PyTree, force: bool = False, again: bool = False) -> bool:
        """Copy the state to the host, then write it in the background; the state may be donated immediately.

        Waits first for a save in progress. An existing step of this number, damaged or from an abandoned history, is
        replaced.

        Args:
          step: number of the step, at least 0.
          state: arrays, typed keys included, NumPy arrays and Python numbers.
          force: also save between the intervals.
          again: also save a step that was just saved or restored, because the state has changed since.

        Returns:
          Whether a save was started: False between the intervals, or if this step was just saved or restored.

        Raises:
          CheckpointError: if this save, or the previous one in the background, cannot be written.
          TypeError: for a leaf with a dtype that JAX does not support.
        """
        if self._read_only:
            raise CheckpointError(f"checkpoints in {self._directory} were opened read-only; step {step} is not saved")
        if (step == self._current and not again) or not (force or step % self._save_interval == 0):
            return False
        arrays = leaves.to_arrays(state)
        self.wait()
        if step in self.all_steps():
            self._delete(step)
        self._check_space(step, arrays)
        self._pending = (step, leaves.spec_of(arrays))
        saved = {name: leaf for name, leaf in arrays.items() if not leaves.empty(leaf)}
        items = {item: ocp.args.StandardSave(part) for item, part in _by_item(saved).items()}
        try:
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        except BaseException as error:
            self._pending = self._current = None
            if isinstance(error, OSError):
                raise self._failed_save(step, error) from error
            raise
        if self._staging is not None:
            self._staging.push(step, lambda: self._written(step))
        self._current = step
        return True

    def restore(self, target: PyTree, step: int | None = None) -> tuple[PyTree, int]:
        """Restore a state bit for bit from the newest step that passes verification.

        Args:
          target: `ShapeDtypeStruct`s with shardings (see `targets`), for any number of devices.
          step: the only step to read; None falls back past damaged steps, with a warning for each.

        Returns:
          The state, with the structure of `target`, and the step it was read from.

        Raises:
          FileNotFoundError: if there is no step, or not this one.
          CheckpointError: if every step, or the requested one, is damaged.
          ValueError: if the target has leaves, shapes or dtypes that differ from the checkpoint, or no shardings.
        """
        self.wait()
        steps = self.all_steps()
        if not steps or (step is not None and step not in steps):
            raise FileNotFoundError(
                f"no checkpoint {'' if step is None else step} in {self._directory}; it has {steps}"
            )
        found = self._agree(lambda: self._newest_intact(steps if step is None else [step]))
        step, saved = found["step"], found["leaves"]
        self._damaged.update(found["damaged"])
        wanted = leaves.named_leaves(target)
        leaves.check_targets(wanted, saved, step, self._directory)
        arrays = self._read(step, {name: targets(leaf) for name, leaf in wanted.items() if not leaves.empty(leaf)})
        restored = [arrays[n] if n in arrays else leaves.fill_empty(t) for n, t in wanted.items()]
        self._current = step
        return jax.tree.unflatten(jax.tree.structure(target), restored), step

    def all_steps(self) -> list[int]:
        """Return the committed steps on disk, oldest first, damaged ones included."""
        if self._staging is not None:
            found = self._staging.steps()
        else:
            if self._read_only:
                self._manager.reload()
            found = self._manager.all_steps()
        return sorted(step for step in found if self._pending is None or step != self._pending[0])

    def latest_step(self) -> int | None:
        """Return the newest committed step, damaged or not; None if there is none."""
        return max(self.all_steps(), default=None)

    def wait(self) -> None:
        """Wait until the save in progress is committed, then delete the steps above the limit.

        Raises:
          CheckpointError: if the save failed in the background.
        """
        if self._pending is None:
            return
        step, _ = self._pending
        try:
            if self._staging is not None:
                try:
                    self._staging.wait()
                finally:
                    self._manager.delete(step)  # on this machine
            else:
                self._written(step)
        except Exception as error:
            self._pending = self._current = None
            raise self._failed_save(step, error) from error
        self._pending = None
        self._settle(step)

    def saving(self) -> bool:
        """Return whether a save is being written."""
        if self._staging is not None:
            return self._staging.pushing()
        return self._manager.is_saving_in_progress()

    def delete(self, step: int) -> None:
        """Delete a step."""
        self._delete(step)

    def close(self) -> None:
        """Finish the save in progress and free orbax's threads; further calls are errors."""
        try:
            self.wait()
        finally:
            self._manager.close()
            if self._staging is not None:
                self._staging.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, step: int, stored: dict[str, Any]) -> dict[str, jax.Array]:
        """Return the arrays of a step by name, each restored onto its target."""
        if self._staging is not None:
            folder, found = self._folder(step), dict[str, Any]()
            for item, part in (items := _by_item(stored)).items():
                with ocp.StandardCheckpointer() as checkpointer:
                    found[item] = checkpointer.restore(folder / item, part)
        else:
            items = {item: ocp.args.StandardRestore(part) for item, part in _by_item(stored).items()}
            found = self._manager.restore(step, args=ocp.args.Composite(**items))
        return {name: array for item in items for name, array in found[item].items()}

    def _folder(self, step: int) -> epath.Path:
        """Return the folder of a step, or its copy on this machine."""
        return self._directory / str(step) if self._staging is None else epath.Path(self._staging.fetch(step))

    def _newest_intact(self, steps: list[int]) -> dict[str, Any]:
        """Return the newest intact step: {"step", "leaves": its `Spec`, "damaged": newer damaged steps}."""
        reasons: dict[int, str] = {}
        for step, older in zip(steps[::-1], [*steps[-2::-1], None], strict=True):
            try:
                manifest = integrity.verify(self._folder(step))
                return {"step": step, "leaves": manifest.leaves, "damaged": list(reasons)}
            except (integrity.Damaged, FileNotFoundError) as damage:  # not found: its trainer deletes it meanwhile
                reasons[step] = f"{step}: {damage}"
                if older is not None:
                    message = "checkpoint %d in %s is damaged: %s; falling back to step %d"
                    logging.warning(message, step, self._directory, damage, older)
        raise CheckpointError(
            f"no usable checkpoint in {self._directory} ({'; '.join(reasons.values())}); restore it from a copy, or "
            "remove it to start afresh"
        )

    def _write_checksums(self) -> None:
        """Write the checksums; orbax calls this on one process, after writing all files and before the commit."""
        assert self._pending is not None
        step, spec = self._pending
        final = self._local / str(step)
        paths = [p for p in self._local.glob(f"{step}.orbax-checkpoint-tmp*") if p.is_dir()]
        integrity.write(paths[0] if paths else final, step, spec)

    def _written(self, step: int) -> None:
        """Wait until orbax has committed a step, and seal it."""
        self._manager.wait_until_finished()
        if ocp.utils.is_primary_host(0):
            integrity.seal(self._local / str(step))

    def _settle(self, step: int) -> None:
        """Delete damaged, abandoned and old steps."""
        self._damaged.discard(step)
        steps = self.all_steps()
        kept = [s for s in steps if s <= step and s not in self._damaged][-self._keep :]
        for other in steps:
            if other not in kept:
                if other > step:
                    logging.warning("deleting checkpoint %d: the run went back and is now at step %d", other, step)
                self._delete(other)

    def _delete(self, step: int) -> None:
        if self._staging is not None:
            self._staging.delete(step)
        else:
            if storage.is_remote(self._directory) and ocp.utils.is_primary_host(0):
                (self._directory / str(step) / staging.COMMIT).unlink(missing_ok=True)  # first: it is incomplete now
            self._manager.delete(step)
        self._damaged.discard(step)

    def _check_directory(self) -> None:
        if "\\" in str(self._directory):
            raise CheckpointError(
                f"checkpoints cannot be in {self._directory}: TensorStore takes a backslash for a slash; choose "
                "another workdir"
            )
        try:
            if self._read_only:
                next(iter(self._directory.iterdir()), None)
            else:
                self._directory.mkdir(parents=True, exist_ok=True)
                probe = self._directory / ".writable"
                probe.write_bytes(b"")
                probe.unlink(missing_ok=True)
        except OSError as error:
            verb = "read" if self._read_only else "write"
            raise CheckpointError(
                f"cannot {verb} checkpoints in {self._directory}: {error.strerror}; choose another workdir"
            ) from error

    def _check_space(self, step: int, arrays: dict[str, Any]) -> None:
        """Raise if the disk has too little space; orbax detects this only half-way, in many threads at once."""
        needed = _WRITTEN * sum(leaf.size * leaf.dtype.itemsize for leaf in arrays.values())
        if storage.is_remote(self._local):
            return
        free = shutil.disk_usage(self._local).free
        if free < needed:

            def mib(size):
                return f"{size / 2**20:,.1f} MiB"

            raise self._failed_save(step, f"No space left for {mib(needed)}, {mib(free)} are free")

    def _failed_save(self, step: int, error: Exception | str) -> CheckpointError:
        return CheckpointError(
            f"checkpoint {step} could not be written to {self._directory}: {error}; "
            "free some space or choose another workdir"
        )


def _by_item(arrays: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return {item: its arrays}; leaves under a `tables` key belong to the tables. Empty items are left out."""
    parts: dict[str, dict[str, Any]] = {item: {} for item in _ITEMS}
    for name, array in arrays.items():
        parts["tables" if "tables" in name.split("/") else "state"][name] = array
    return {item: part for item, part in parts.items() if part}
