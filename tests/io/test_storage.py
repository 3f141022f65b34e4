"""Object storage: the verbs, conditional writes, what is half-written, trouble, locks, files that grow."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest

from mmrf_jax.io import appending, copies, files, lease, retries, storage

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(params=["memory", "gs", pytest.param("s3", marks=pytest.mark.slow)])
def folder(request):
    """A new folder, of each kind of storage."""
    if (emulator := {"gs": "google", "s3": "amazon"}.get(request.param)) is not None:
        request.getfixturevalue(emulator)
    return files.user_path(f"{request.param}://bucket/{uuid.uuid4().hex}", "--out")


@pytest.fixture
def gs(google):
    return files.user_path(f"gs://bucket/{uuid.uuid4().hex}", "--out")


@pytest.fixture
def said(monkeypatch):
    """Lines that are said."""
    lines: list[str] = []
    for module in (retries, lease, copies):
        monkeypatch.setattr(module, "say", lines.append)
    return lines


def test_an_address_has_the_verbs_of_a_path(folder):
    assert not folder.exists() and not folder.is_dir() and list(folder.iterdir()) == []
    (folder / "a.txt").write_text("α")
    with (folder / "deep" / "b.bin").open("wb") as file:
        file.write(b"12")
    assert folder.is_dir() and (folder / "a.txt").is_file() and not (folder / "a.txt").is_dir()
    assert (folder / "a.txt").read_text() == "α" and (folder / "deep" / "b.bin").stat().st_size == 2
    assert [path.name for path in folder.iterdir()] == ["a.txt", "deep"]
    assert [path.name for path in folder.glob("*.txt")] == ["a.txt"]
    assert list(folder.glob("*/b.*")) == list(folder.rglob("b.bin")) == [folder / "deep" / "b.bin"]
    assert (folder / "deep").parent == folder and (folder / "x.y").stem == "x" and (folder / "x.y").suffix == ".y"
    before = (folder / "a.txt").stat().st_mtime_ns
    (folder / "a.txt").write_text("β")
    assert (folder / "a.txt").stat().st_mtime_ns != before
    with pytest.raises(FileNotFoundError):
        (folder / "none").read_bytes()
    with pytest.raises(FileNotFoundError):
        (folder / "none").unlink()
    (folder / "none").unlink(missing_ok=True)
    for mode in ("w", "wb"):
        with pytest.raises(ZeroDivisionError), (folder / "half").open(mode) as file:
            file.write("half" if mode == "w" else b"half")
            raise ZeroDivisionError
        assert not (folder / "half").exists()
    with (folder / "whole").open("w") as file:
        file.write("α")
    assert (folder / "whole").read_text() == "α"
    files.remove(folder)
    assert not folder.exists()


def test_paths_of_this_machine_and_addresses_are_told_apart(tmp_path):
    assert storage.path(str(tmp_path)) == tmp_path and files.user_path(f"file://{tmp_path}", "--out") == tmp_path
    assert isinstance(storage.path("memory://bucket/x"), storage.RemotePath)
    assert str(storage.path("memory://bucket//x/./y/")) == "memory://bucket/x/y"
    for wrong, why in {"gs://": "no bucket", "nothing://bucket/x": "no protocol of fsspec"}.items():
        with pytest.raises(ValueError, match=f"--out={wrong}.*{why}"):
            files.user_path(wrong, "--out")


def test_of_several_that_create_an_object_one_is_first(folder):
    (folder / "claim").write_bytes(b"first", create=True)
    (folder / "claim").write_bytes(b"first", create=True)  # its own, of which the answer was lost
    with pytest.raises(FileExistsError):
        (folder / "claim").write_bytes(b"second", create=True)
    assert (folder / "claim").read_bytes() == b"first"


def test_a_folder_appears_when_all_of_it_is_there(folder, monkeypatch):
    uploaded: list[str] = []
    upload = storage.RemotePath.upload

    def seen(path, file):
        assert not folder.exists() and not list(folder.iterdir())
        uploaded.append(path.name)
        if len(uploaded) == 2:
            raise OSError("killed")
        upload(path, file)

    monkeypatch.setattr(storage.RemotePath, "upload", seen)
    with pytest.raises(OSError, match="killed"):
        write_folder(folder)
    assert not folder.exists() and (folder / "first").exists()  # left by a process that was killed
    (folder / "older").write_text("of another try")
    uploaded += [""]
    write_folder(folder)
    assert uploaded[-2:] == ["first", "manifest"] and [path.name for path in folder.iterdir()] == ["first", "manifest"]
    with pytest.raises(FileExistsError, match="exists; remove it"):
        write_folder(folder)


def write_folder(folder):
    with files.new_folder(folder) as made:
        for number, name in enumerate(("first", "manifest")):
            (made / name).write_text(name)
            os.utime(made / name, ns=(number, number))


def test_files_that_grow_are_parts_that_readers_join(folder, monkeypatch):
    monkeypatch.setattr(appending, "PARTS", 3)
    path = folder / "metrics.jsonl"
    file = appending.Appender(path)
    for number in range(3):
        file.write(f"{number}\n")
        file.sync()
    assert path.appended() == ["0000-00000000", "0000-00000001", "0000-00000002"]
    assert path.read_text() == "0\n1\n2\n" and path.is_file() and path.stat().st_size == 6
    file._parts.rewrite()
    assert path.appended() == ["0001-00000000"] and path.read_text() == "0\n1\n2\n"
    file.write("3\n")
    file.close()
    assert path.read_text() == "0\n1\n2\n3\n"
    file = appending.Appender(path)
    removed = appending._removed

    def fails(*_):
        raise OSError("the bucket does not answer")

    monkeypatch.setattr(appending, "_removed", fails)
    with pytest.raises(OSError, match="does not answer"):
        file._parts.rewrite()
    file.write("4\n")  # readers see what follows a rewriting that has failed at its end
    file.close()
    assert path.read_text() == "0\n1\n2\n3\n4\n"
    monkeypatch.setattr(appending, "_removed", removed)
    (path / "0000-00000002").write_bytes(b"left by a rewriting that was killed")
    assert path.read_text() == "0\n1\n2\n3\n4\n"
    appending.rewrite(path, "0\n")
    assert path.read_text() == "0\n" and len(path.names()) == 1
    again = appending.open_to_append(path, 1)
    again.append(b"!")
    again.close()
    assert path.read_text() == "0!"
    path.unlink()
    assert not path.exists()


def test_what_needs_a_disk_gets_a_copy_until_the_object_changes(folder):
    (folder / "log" / "a").write_text("1")
    here = copies.local(folder / "log")
    assert here.is_dir() and (here / "a").read_text() == "1" and copies.local(folder / "log") == here
    before = (here / "a").stat().st_mtime_ns
    (folder / "log" / "a").write_text("2")
    assert (copies.local(folder / "log") / "a").read_text() == "2"
    assert (copies.local(folder / "log") / "a").stat().st_mtime_ns != before
    assert copies.local(folder / "log" / "a").read_text() == "2"
    with pytest.raises(FileNotFoundError, match="log2"):
        copies.local(folder / "log2")


def test_a_mirror_copies_what_has_changed(folder, tmp_path):
    mirror = copies.Mirror(folder)
    (mirror.folder / "tensorboard").mkdir()
    (mirror.folder / "tensorboard" / "events").write_text("1")
    mirror.sync()
    assert (folder / "tensorboard" / "events").read_text() == "1"
    (mirror.folder / "tensorboard" / "events").write_text("12")
    mirror.close()
    assert (folder / "tensorboard" / "events").read_text() == "12"
    assert copies.Mirror(tmp_path).folder == tmp_path


def test_a_link_names_another_folder(folder, tmp_path):
    for place in (folder, tmp_path):
        files.point(place / "current", place / "artifacts" / "0")
        files.point(place / "current", place / "artifacts" / "1")
        assert (place / "current").resolve() == place / "artifacts" / "1"
    assert (folder / "artifacts").resolve() == folder / "artifacts"


def test_a_prepared_folder_is_built_once_and_resumed_after_a_kill(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(KeyboardInterrupt), copies.built(folder, "kind/a") as root:
        (root / ".unfinished").mkdir()
        raise KeyboardInterrupt
    with copies.built(folder, "kind/a") as root:
        assert (root / ".unfinished").exists()
        (root / "kind" / "a").mkdir(parents=True)
        (root / "kind" / "a" / "records").write_text("r")
    assert (folder / "kind" / "a" / "records").read_text() == "r"
    with copies.built(folder, "kind/a") as root:
        assert (root / "kind" / "a" / "records").read_text() == "r"
    with copies.built(folder, "kind/b") as root:
        (root / "kind" / "b").mkdir()
        (folder / "kind" / "b" / "records").write_text("another process was first")
    assert (folder / "kind" / "b" / "records").read_text() == "another process was first"


# ---------------------------------------------------------------------------------------------------------------- Locks


def test_a_lock_is_of_one_process_and_leaves_no_trace(folder):
    with files.held(folder):
        assert not folder.exists()
        with (
            pytest.raises(ValueError, match=rf"used by another process: process {os.getpid()} on "),
            files.held(folder),
        ):
            pass
    probe = folder / storage.LOCKS / "probe-1"
    probe.write_bytes(b"")  # of a process that was killed in `files.check_writable`, or still is there
    for _ in range(3):
        with files.held(folder):
            (folder / "a").write_text("")
    assert [path.name for path in folder.iterdir()] == ["a"] and probe.exists()
    assert len((folder / storage.LOCKS).names(every=True)) <= 3


def test_many_that_want_a_lock_have_it_one_after_another(folder):
    inside, most, count = 0, 0, 0

    def work():
        nonlocal inside, most, count
        with files.held(folder, patience=600):
            inside += 1
            most = max(most, inside)
            count += 1
            inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, count) == (1, 4)


HOLDER = "import sys, time\nfrom mmrf_jax.io import files\n"


def holding(folder) -> subprocess.Popen:
    script = (
        f"{HOLDER}with files.held(files.user_path(sys.argv[1], '')):\n    print(1, flush=True)\n    time.sleep(900)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "1\n"
    return process


def test_a_killed_process_of_this_machine_frees_its_lock(gs):
    process = holding(gs)
    with pytest.raises(ValueError, match=f"process {process.pid} on "), files.held(gs):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    with files.held(gs):
        pass


def test_a_lock_of_another_machine_is_free_when_its_beat_has_stopped(folder, monkeypatch, said):
    """Whether its holder lives is seen by its beats alone: clocks of machines are not compared."""
    monkeypatch.setattr(lease, "LEASE", 0.5)
    path = folder / storage.LOCKS / f"{7:08d}"
    other = {"holder": "process 1 on elsewhere", "machine": "elsewhere", "process": [1, 1], "beat": 3}
    path.write_bytes(json.dumps(other).encode())
    readings = []
    read = lease._read

    def beats(folder, number):  # the other writes another beat while it is looked at
        readings.append(number)
        return read(folder, number) | {"beat": len(readings)}

    monkeypatch.setattr(lease, "_read", beats)
    with pytest.raises(ValueError, match="used by another process: process 1 on elsewhere"), files.held(folder):
        pass
    monkeypatch.setattr(lease, "_read", read)
    with files.held(folder):
        assert lease._newest(folder) == 8
    assert any("waiting up to" in line for line in said)


def test_without_proc_a_lock_is_known_by_its_beats_alone(folder, monkeypatch, said):
    monkeypatch.setattr(lease, "LEASE", 0.2)
    monkeypatch.setattr(lease, "_process", lambda number: [])
    path = folder / storage.LOCKS / f"{1:08d}"
    path.write_bytes(json.dumps({"holder": "it", "machine": lease._machine(), "process": [], "beat": 3}).encode())
    with files.held(folder):
        assert lease._newest(folder) == 2
    assert any("was in use by it; waiting up to" in line for line in said)


def test_a_process_that_has_lost_its_lock_ends(gs, monkeypatch, said):
    monkeypatch.setattr(lease, "RENEW", 0.01)
    ends: list[int] = []
    ended = threading.Event()

    def end(code):
        ends.append(code)
        monkeypatch.setattr(lease, "RENEW", 900.0)
        ended.set()

    monkeypatch.setattr(os, "_exit", end)
    with files.held(gs):
        newest = lease._newest(gs)
        (gs / storage.LOCKS / f"{newest + 1:08d}").write_bytes(json.dumps({"holder": "another"}).encode())
        assert ended.wait(60)
    assert ends[0] == 2 and any("was taken over by another" in line for line in said)


# -------------------------------------------------------------------------------------------------------------- Trouble


@pytest.fixture
def impatient(monkeypatch):
    """Pauses between two tries are short."""
    monkeypatch.setattr(retries, "_LONGEST_PAUSE", 0.01)
    monkeypatch.setattr(retries, "_FIRST_PAUSE", 0.01)


@pytest.mark.parametrize("trouble", [429, 503, "silence"])
def test_a_bucket_that_does_not_answer_is_asked_again(trouble, gs, google, said, impatient):
    """Nothing is lost, and one line says so."""
    with google.in_trouble(trouble):
        threads = [threading.Thread(target=(gs / str(i)).write_text, args=(str(i),)) for i in range(3)]
        for thread in threads:
            thread.start()
        while google.met < (3 if trouble == "silence" else 10):
            time.sleep(0.01)
    for thread in threads:
        thread.join()
    assert [(gs / str(i)).read_text() for i in range(3)] == ["0", "1", "2"]
    assert [line.split(" (")[0] for line in said] == ["gs://bucket does not answer", "gs://bucket answers again"]


def test_patience_ends_with_one_line(gs, google, said, impatient, monkeypatch):
    monkeypatch.setattr(retries, "PATIENCE", 0.05)
    with google.in_trouble(503), pytest.raises(OSError, match="gs://bucket has not answered for"):
        (gs / "a").write_text("a")
    (gs / "a").write_text("a")
    assert len(said) == 2


def test_a_missing_permission_is_an_error_at_once(gs, google):
    with google.in_trouble(403):
        for refused in (lambda: (gs / "a").write_text("a"), lambda: (gs / "a").read_bytes(), lambda: gs.exists()):
            with pytest.raises(PermissionError, match=r"no permission .*docs/object-storage.md"):
                refused()
        with pytest.raises(ValueError, match=f"--out={gs} cannot be written: no permission"):
            files.check_writable(gs, "--out")
    assert not (gs / "a").exists()


def test_a_bucket_that_does_not_exist_is_named(google):
    with pytest.raises(FileNotFoundError, match=r"there is no such bucket; create it: 'gs://nothing'"):
        (storage.path("gs://nothing/a/b") / "c").write_text("")
