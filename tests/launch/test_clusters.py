"""The files that start a run on a cluster: what they call, when they start again, and what they tell each process."""

import os
import re
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from processes import HANG

ROOT = Path(__file__).resolve().parents[2]


def stub(folder: Path, name: str, code: str) -> Path:
    """A program that writes its arguments to NAME.calls, a line a call, and then runs some shell code."""
    path = folder / name
    path.write_text(f'#!/usr/bin/env bash\necho "$*" >> {folder}/{name}.calls\n{code}\n')
    path.chmod(0o755)
    return path


def calls(folder: Path, name: str) -> list[str]:
    path = folder / f"{name}.calls"
    return path.read_text().splitlines() if path.exists() else []


def run(folder: Path, *command: object, **env: str) -> subprocess.CompletedProcess:
    env = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"} | env
    return subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, cwd=ROOT, timeout=HANG)


@pytest.mark.parametrize(
    ("code", "restarts", "again"), [(0, 0, 0), (2, 0, 0), (75, 0, 1), (75, 99, 1), (1, 0, 1), (1, 10, 0), (137, 3, 1)]
)
def test_slurm_queues_a_stopped_job_again(code, restarts, again, tmp_path):
    stub(tmp_path, "srun", f"exit {code}")
    stub(tmp_path, "scontrol", "")
    slurm = {"SLURM_JOB_ID": "4711", "SLURM_RESTART_COUNT": str(restarts), "PYTHON": "python"}
    done = run(tmp_path, "bash", "launch/slurm/train.sbatch", "--config=a b.py", "--workdir=w", **slurm)
    assert done.returncode == code
    assert calls(tmp_path, "srun") == [
        "--kill-on-bad-exit=1 python -m launch.train --multihost --config=a b.py --workdir=w"
    ]
    assert calls(tmp_path, "scontrol") == ["requeue 4711"] * again


def test_slurm_asks_for_time_to_save():
    text = (ROOT / "launch/slurm/train.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.MULTILINE))
    assert options["signal"] == "TERM@120" and "requeue" in options
    assert options["ntasks-per-node"] == options["gpus-per-node"]  # JAX gives each SLURM task one GPU


JOIN = """
import sys
from mmrf_jax.parallel import multihost
multihost.join()
import jax
print(jax.process_index(), [x.decode() for x in multihost.gather(f"of {jax.process_index()}".encode())])
"""


def test_processes_that_slurm_started_find_each_other():
    with socket.socket() as free:  # JAX makes the port of the job's number
        while True:
            job = 1 + int(time.time() * 1e6) % 4096
            try:
                free.bind(("127.0.0.1", 65535 - 2**12 + 1 + job % 2**12))
                break
            except OSError:
                continue
    slurm = {"SLURM_JOB_ID": str(job), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    fixed = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}

    def start(n):
        return subprocess.Popen(
            [sys.executable, "-c", JOIN],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | fixed | slurm | {"SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)},
        )

    processes = [start(n) for n in range(2)]
    said = [process.communicate(timeout=HANG) for process in processes]
    for n, (out, error) in enumerate(said):
        assert out.splitlines()[-1:] == [f"{n} ['of 0', 'of 1']"], error[-3000:]


@pytest.fixture(scope="module")
def job_set() -> dict:
    return yaml.safe_load((ROOT / "launch/gke/jobset.yaml").read_text())


def test_a_job_set_of_one_pod_a_host(job_set):
    assert (job_set["apiVersion"], job_set["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (workers,) = job_set["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    assert job["completionMode"] == "Indexed" and job["parallelism"] == job["completions"]
    rows, columns = map(int, job["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    (container,) = job["template"]["spec"]["containers"]
    chips = int(container["resources"]["limits"]["google.com/tpu"])
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert job["completions"] * chips == rows * columns
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        v["name"] for v in job["template"]["spec"]["volumes"]
    }


def test_a_job_set_restarts_what_may_go_on(job_set):
    """Exit code 75 and dead hosts restart the set, a wrong command ends it."""
    policy, job = job_set["spec"]["failurePolicy"], job_set["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert policy["maxRestarts"] >= 10
    assert policy["rules"] == [
        {"name": "wrong-command", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    ]
    (rule,) = job["podFailurePolicy"]["rules"]
    (container,) = job["template"]["spec"]["containers"]
    assert rule == {
        "action": "FailJob",
        "onExitCodes": {"containerName": container["name"], "operator": "In", "values": [2]},
    }
    assert job["backoffLimit"] == 0 and job["template"]["spec"]["restartPolicy"] == "Never"
    assert job["template"]["spec"]["terminationGracePeriodSeconds"] > 25  # seconds from SIGTERM to exit


def test_the_command_of_a_job_set_is_a_command(job_set, launch, tmp_path):
    (container,) = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    python, m, main, *flags = container["command"]
    assert (python, m, main) == ("python", "-m", "launch.train") and "--multihost" in flags
    # Where nothing has started several processes it says so, after it has understood all its flags.
    done = launch("train", *flags)
    assert done.returncode == 2, done.stderr
    assert "error: no SLURM, Open MPI, Cloud TPU or Kubernetes has started several processes here" in done.stderr


@pytest.mark.parametrize("last", [0, 2, 1])
def test_tpu_hosts_start_again_while_the_run_is_stopped(last, tmp_path):
    """The third command over ssh is the first start of the run; it is told to stop twice."""
    count = f'n=$(grep -c launch.train {tmp_path}/gcloud.calls); grep -q launch.train <<< "$*" || exit 0'
    stub(tmp_path, "gcloud", f"{count}\n[ $n -lt 3 ] && exit 75; exit {last}")
    stub(tmp_path, "tar", "")
    done = run(tmp_path, "launch/tpu_vm.sh", "slice", "zone", "--config=a b.py", "--workdir=w", RESTART_SECONDS="0")
    assert done.returncode == last, done.stderr
    started = [call for call in calls(tmp_path, "gcloud") if "launch.train" in call]
    assert len(started) == 3 and len(set(started)) == 1
    assert "--worker=all" in started[0] and "--zone=zone" in started[0]
    command = started[0].split("--command=")[1]
    assert shlex.split(command)[-3:] == ["--multihost", "--config=a b.py", "--workdir=w"]


def test_tpu_hosts_need_a_name_and_a_zone(tmp_path):
    done = run(tmp_path, "launch/tpu_vm.sh", "slice")
    assert done.returncode == 2 and "usage:" in done.stderr
