import subprocess
import sys
from pathlib import Path

from mmrf_jax.training import provenance


def test_each_start_is_kept(tmp_path, monkeypatch):
    assert provenance.read_starts(tmp_path) == []
    monkeypatch.setattr(sys, "argv", ["/x/launch/train.py", "--config=a b.py", "--seed=1"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    provenance.record_start(tmp_path)
    provenance.record_start(tmp_path)
    first, second = provenance.read_starts(tmp_path)
    assert first["command"] == second["command"] == "train.py '--config=a b.py' --seed=1"
    assert first["start"].endswith(" UTC") and first["host"] and first["commit"]


def test_the_commit_and_whether_files_differ_from_it(tmp_path):
    def git(*arguments):
        who = ("-c", "user.name=x", "-c", "user.email=x@x")
        subprocess.run(["git", *who, "-C", tmp_path, *arguments], check=True, capture_output=True)

    (tmp_path / "sub").mkdir()
    git("init")
    (tmp_path / "a.txt").write_text("a")
    git("add", "a.txt")
    git("commit", "-m", "one")
    head = provenance.commit(tmp_path)
    assert len(head) == 12
    (tmp_path / "new.txt").write_text("of no commit")
    assert provenance.commit(tmp_path) == head
    (tmp_path / "a.txt").write_text("b")
    assert provenance.commit(tmp_path) == f"{head} + changes"
    # A folder inside a checkout of another project, such as a virtual environment's, has no commit.
    assert head not in provenance.commit(tmp_path / "sub") and head not in provenance.commit(Path("/"))
