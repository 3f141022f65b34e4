"""A full disk and a run folder that may not be written: one clear error each, and earlier checkpoints stay."""

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from comparing import assert_same
from processes import HANG, ROOT, error_line, steps

pytestmark = pytest.mark.slow


def in_a_namespace(launch, *lines: str) -> subprocess.CompletedProcess:
    """Shell lines with mounts of their own, which end with them; the exit code is that of the last."""
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*namespace, "true"], capture_output=True).returncode:
        pytest.skip("this system gives no mount namespace to its users")
    command = [*namespace, "bash", "-c", "\n".join(lines)]
    return subprocess.run(command, env=launch.environment(), cwd=ROOT, capture_output=True, text=True, timeout=HANG)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def size(reference) -> int:
    """Bytes of a checkpoint, each file rounded up to pages."""
    step = reference / "checkpoints" / str(steps(reference)[-1])
    return sum(-(-len(data) // 4096) * 4096 for data in contents(step).values())


def test_a_full_disk(launch, args, reference, size, tmp_path):
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    train = shlex.join(launch.command("train", *args, f"--workdir={disk / 'run'}"))
    done = in_a_namespace(
        launch,
        f"mount -t tmpfs -o size={4 * size} none {disk} || exit 99",
        train,
        f"code=$?; cp -r {disk / 'run'} {kept}; exit $code",
    )
    error_line(done, "No space left", str(disk / "run"))
    before = steps(kept)
    assert before and before[-1] < steps(reference)[-1]
    done = launch.ok("train", *args, f"--workdir={kept}")
    assert f"resumed at step {before[-1]}," in done.stderr
    assert_same(kept, reference)


def test_a_folder_that_may_not_be_written(launch, args, reference, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(reference, workdir)
    (workdir / "results.json").unlink()
    before = contents(workdir)
    train = shlex.join(launch.command("train", *args, f"--workdir={workdir}"))
    done = in_a_namespace(
        launch, f"mount --bind {workdir} {workdir} && mount -o remount,bind,ro {workdir} || exit 99", train
    )
    error_line(done, str(workdir), "Read-only file system")
    assert contents(workdir) == before
