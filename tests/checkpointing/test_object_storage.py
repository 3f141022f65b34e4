"""Checkpoints in object storage: gs:// by TensorStore's driver, other protocols through a folder of this machine."""

import threading
import types
import uuid

import jax
import jax.numpy as jnp
import pytest
from absl import logging as absl_logging
from states import bits, like, make_state

from mmrf_jax.checkpointing import integrity, manager, staging
from mmrf_jax.checkpointing.manager import CheckpointError, Checkpoints, targets
from mmrf_jax.io import copies, retries, storage

#: Of what does not depend on the storage, one is fast enough.
MEMORY_FIRST = pytest.mark.parametrize(
    "folder", ["memory", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("gs", "s3"))], indirect=True
)


@pytest.fixture(params=["gs", "memory", pytest.param("s3", marks=pytest.mark.slow)])
def folder(request, tmp_path, monkeypatch):
    if (emulator := {"gs": "google", "s3": "amazon"}.get(request.param)) is not None:
        request.getfixturevalue(emulator)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return storage.path(f"{request.param}://bucket/{uuid.uuid4().hex}/checkpoints")


def fill(folder, steps, **kwargs):
    with Checkpoints(folder, **kwargs) as checkpoints:
        for step in steps:
            assert checkpoints.save(step, make_state(step))


def restore(folder, **kwargs):
    with Checkpoints(folder, **kwargs) as checkpoints:
        return checkpoints.restore(like(make_state()))


@pytest.fixture
def warnings(monkeypatch):
    """Of the manager alone: on a busy machine, orbax warns of slow saves."""
    lines: list[str] = []
    heard = vars(absl_logging) | {"warning": lambda text, *args: lines.append(text % args)}
    monkeypatch.setattr(manager, "logging", types.SimpleNamespace(**heard))
    return lines


def files_of(folder, step):
    return {name: folder / str(step) / name for name in (folder / str(step)).find()}


def test_states_come_back_bit_for_bit_and_old_ones_go(folder):
    fill(folder, (1, 2, 3), keep=2)
    restored, step = restore(folder, read_only=True)
    assert step == 3 and bits(restored) == bits(make_state(3))
    assert [path.name for path in folder.iterdir()] == ["2", "3"]
    assert {"commit_success.txt", "checksums.json"} < set(files_of(folder, 3))


@MEMORY_FIRST
def test_the_newest_is_damaged(folder, warnings):
    """A file lacks, is cut short, or is altered and as long as before."""
    fill(folder, (1, 2, 3, 4), keep=4)
    for step in (2, 3, 4):
        name, path = max(files_of(folder, step).items(), key=lambda item: item[1].stat().st_size)
        data = path.read_bytes()
        if step == 2:
            path.unlink()
        else:
            path.write_bytes(data[:-1] if step == 3 else data[:-1] + bytes([data[-1] ^ 1]))
        assert name.startswith("state/")
    restored, step = restore(folder)
    assert step == 1 and bits(restored) == bits(make_state(1))
    why = ("its checksum differs", "bytes instead of", "missing")
    assert len(warnings) == 3 and all(text in line for text, line in zip(why, warnings, strict=True))
    assert "falling back to step 1" in warnings[-1]


@MEMORY_FIRST
def test_a_step_without_its_commit_is_none(folder):
    """As of a process that was killed while it wrote, or while it deleted."""
    fill(folder, (1, 2))
    (folder / "2" / staging.COMMIT).unlink()
    with Checkpoints(folder, read_only=True) as reader:
        assert reader.all_steps() == [1]
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.restore(like(make_state()))[1] == 1
        assert checkpoints.save(2, make_state(5))
    restored, step = restore(folder)
    assert step == 2 and bits(restored) == bits(make_state(5))


def test_the_commit_is_written_last_and_deleted_first(folder, monkeypatch):
    order: list[str] = []
    for name in ("write_bytes", "upload", "_delete"):
        verb = getattr(storage.RemotePath, name)

        def seen(path, *args, _verb=verb, **kwargs):
            order.append(str(path).split("/checkpoints/")[-1])
            return _verb(path, *args, **kwargs)

        monkeypatch.setattr(storage.RemotePath, name, seen)
    fill(folder, (1,))
    written = [name for name in order if name.startswith("1/") and "checksums" not in name]
    assert written[-1] == "1/commit_success.txt"
    order.clear()
    fill(folder, (2,), keep=1)
    assert next(name for name in order if name.startswith("1/")) == "1/commit_success.txt"
    assert [path.name for path in folder.iterdir()] == ["2"]


def test_folders_move_between_a_disk_and_a_bucket(folder, tmp_path):
    fill(folder, (1,))
    here = copies.local(folder)
    restored, _ = restore(here)
    assert bits(restored) == bits(make_state(1))
    fill(tmp_path / "disk", (4,))
    for path in (tmp_path / "disk" / "4").rglob("*"):
        if path.is_file():
            (folder / path.relative_to(tmp_path / "disk")).upload(path)
    restored, step = restore(folder)
    assert step == 4 and bits(restored) == bits(make_state(4))


def test_a_save_waits_for_a_bucket_that_does_not_answer(google, tmp_path, monkeypatch):
    """It goes on in the background meanwhile, and nothing is lost."""
    said: list[str] = []
    monkeypatch.setattr(retries, "say", said.append)
    monkeypatch.setattr(retries, "_LONGEST_PAUSE", 0.1)
    folder = storage.path(f"gs://bucket/{uuid.uuid4().hex}/checkpoints")
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, make_state(1))
        checkpoints.wait()
        with google.in_trouble(503):
            saving = threading.Thread(target=lambda: (checkpoints.save(2, make_state(2)), checkpoints.wait()))
            saving.start()
            while google.met < 5:
                saving.join(0.01)
            assert saving.is_alive()
        saving.join()
        restored, step = checkpoints.restore(like(make_state()))
    assert step == 2 and bits(restored) == bits(make_state(2))
    assert [line.split(" (")[0] for line in said] == ["gs://bucket does not answer", "gs://bucket answers again"]


def test_a_bucket_that_cannot_be_read_damages_no_step(monkeypatch):
    step = storage.path(f"memory://bucket/{uuid.uuid4().hex}/3")
    with pytest.raises(integrity.Damaged, match="is missing"):
        integrity.load(step)
    (step / "arrays").write_bytes(b"1")
    integrity.write(step, 3, {})
    assert integrity.verify(step).step == 3
    real = storage.RemotePath.read_bytes
    for lost in ("arrays", integrity.CHECKSUMS):

        def read(path, lost=lost):
            if path.name == lost:
                raise PermissionError(13, "no permission")
            return real(path)

        monkeypatch.setattr(storage.RemotePath, "read_bytes", read)
        with pytest.raises(PermissionError):
            integrity.verify(step)


def test_no_permission_is_one_error_before_any_step(google):
    folder = storage.path(f"gs://bucket/{uuid.uuid4().hex}/checkpoints")
    with google.in_trouble(403), pytest.raises(CheckpointError, match=r"cannot write checkpoints in gs://.*permission"):
        Checkpoints(folder)


def test_several_processes_need_a_driver(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(CheckpointError, match=r"several processes cannot save to memory://.*use gs://"):
        Checkpoints("memory://bucket/x")


def test_a_failed_copy_is_an_error_and_not_a_step(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = storage.path(f"memory://bucket/{uuid.uuid4().hex}/checkpoints")
    target = {"x": targets(jnp.zeros(10))}

    def full(path, file):
        raise OSError(28, "no room", str(path))

    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, {"x": jnp.ones(10)})
        checkpoints.wait()
        with monkeypatch.context() as broken:
            broken.setattr(storage.RemotePath, "upload", full)
            checkpoints.save(2, {"x": jnp.ones(10)})
            with pytest.raises(CheckpointError, match=r"checkpoint 2 could not be written to memory://.*no room"):
                checkpoints.wait()
        assert checkpoints.all_steps() == [1] and checkpoints.restore(target)[1] == 1
        checkpoints.save(2, {"x": jnp.ones(10)})
    assert integrity.verify(copies.local(folder / "2")).step == 2
