"""The files that start a run on a cluster: what they call, when they start again, and what they tell each process."""

import os
import re
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import kubernetes_validate
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


SLURM = {"SLURM_JOB_ID": "4711", "PYTHON": "python"}


@pytest.mark.parametrize(
    ("code", "restarts", "again"),
    [(0, 0, 0), (2, 0, 0), (75, 0, 1), (75, 99, 1), (75, 200, 0), (1, 0, 1), (1, 10, 0), (137, 3, 1)],
)
def test_slurm_queues_a_stopped_job_again(code, restarts, again, tmp_path):
    stub(tmp_path, "srun", f"exit {code}")
    stub(tmp_path, "scontrol", "")
    slurm = SLURM | {"SLURM_RESTART_COUNT": str(restarts)}
    done = run(tmp_path, "bash", "launch/slurm/train.sbatch", "--config=a b.py", "--workdir=w", **slurm)
    assert done.returncode == code
    assert calls(tmp_path, "srun") == [
        "--kill-on-bad-exit=1 python -m launch.train --multihost --config=a b.py --workdir=w"
    ]
    assert calls(tmp_path, "scontrol") == ["requeue 4711"] * again
    assert (f"after {restarts} restarts: not queued again" in done.stderr) == (code not in (0, 2) and not again)


def test_the_limits_of_restarts_can_be_set(tmp_path):
    stub(tmp_path, "srun", "exit 75")
    stub(tmp_path, "scontrol", "")
    for most, again in (("2", 0), ("3", 1)):
        run(tmp_path, "bash", "launch/slurm/train.sbatch", **SLURM, SLURM_RESTART_COUNT="2", MAX_RESTARTS=most)
        assert len(calls(tmp_path, "scontrol")) == again


def test_a_batch_script_outlives_the_signal_that_stops_its_command(tmp_path):
    """The scheduler sends SIGTERM to the script too; without it nothing would queue the job again."""
    stub(tmp_path, "srun", "kill -TERM $PPID; exit 75")
    stub(tmp_path, "scontrol", "")
    done = run(tmp_path, "bash", "launch/slurm/train.sbatch", **SLURM)
    assert done.returncode == 75 and calls(tmp_path, "scontrol") == ["requeue 4711"]


def test_an_array_starts_the_same_sweep_in_each_element(tmp_path):
    stub(tmp_path, "srun", "exit 75")
    stub(tmp_path, "scontrol", "")
    for job in ("4711", "4712"):
        run(tmp_path, "bash", "launch/slurm/sweep.sbatch", "--out=a b", **SLURM | {"SLURM_JOB_ID": job})
    assert calls(tmp_path, "srun") == ["python -m launch.sweep --out=a b"] * 2
    assert calls(tmp_path, "scontrol") == ["requeue 4711", "requeue 4712"]


@pytest.mark.parametrize("name", ["train", "sweep"])
def test_slurm_asks_for_time_to_save(name):
    text = (ROOT / f"launch/slurm/{name}.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.MULTILINE))
    assert options["signal"] == "TERM@120" and "requeue" in options
    if name == "sweep":
        assert options["ntasks"] == options["gpus-per-task"] == "1" and "array" in options
    else:
        assert options["ntasks-per-node"] == options["gpus-per-node"]  # JAX gives each SLURM task one GPU


JOIN = """
import sys
from mmrf_jax.parallel import multihost
multihost.join()
import jax
print(jax.process_index(), [x.decode() for x in multihost.gather(f"of {jax.process_index()}".encode())])
"""


@pytest.mark.slow
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


def test_the_job_of_a_job_set_is_a_job_of_kubernetes(job_set):
    """Kubernetes has no schema of a JobSet, but one of the Job in it; `make lint` checks the other manifests."""
    (workers,) = job_set["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "mmrf"}, "spec": workers["template"]["spec"]}
    newest = kubernetes_validate.latest_version()
    kubernetes_validate.validate(job, newest, strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job | {"spec": job["spec"] | {"parallel": 4}}, newest, strict=True)


def test_pods_of_a_sweep_are_replaced_but_for_wrong_commands():
    job = yaml.safe_load((ROOT / "launch/gke/sweep.yaml").read_text())["spec"]
    (container,) = job["template"]["spec"]["containers"]
    rules = {rule["action"]: rule["onExitCodes"] for rule in job["podFailurePolicy"]["rules"] if "onExitCodes" in rule}
    assert {action: codes["values"] for action, codes in rules.items()} == {"FailJob": [2], "Ignore": [75]}
    assert {codes["containerName"] for codes in rules.values()} == {container["name"]}
    assert job["completionMode"] == "Indexed" and job["backoffLimitPerIndex"] == 10
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    assert job["template"]["spec"]["terminationGracePeriodSeconds"] > 25
    assert container["command"][:3] == ["python", "-m", "launch.sweep"]
    named = {part.partition("=")[0] for part in container["command"][3:]}
    assert named == {"--config", "--out", "--runs"}


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
    done = launch("train", *(flag.replace("gs://BUCKET", str(tmp_path)) for flag in flags))
    assert done.returncode == 2, done.stderr
    assert "error: no SLURM, Open MPI, Cloud TPU or Kubernetes has started several processes here" in done.stderr


#: A slice that gcloud describes as ready, and commands over ssh that succeed unless they start the run.
READY = """case "$*" in
  *describe*) echo READY; exit;;
  *launch.train*) ;;
  *) exit 0;;
esac
n=$(grep -c launch.train {calls})
"""


def on_tpu_hosts(folder: Path, *args: str, **env: str) -> subprocess.CompletedProcess:
    stub(folder, "tar", "")
    return run(folder, "launch/tpu_vm.sh", "slice", "zone", *args, **{"RESTART_SECONDS": "0"} | env)


@pytest.mark.parametrize(("first", "last", "starts"), [(75, 0, 3), (75, 2, 3), (1, 0, 3), (137, 2, 3)])
def test_tpu_hosts_start_again(first, last, starts, tmp_path):
    """Two starts end with `first`, which the third resumes."""
    stub(
        tmp_path, "gcloud", f"{READY.format(calls=tmp_path / 'gcloud.calls')}[ $n -lt 3 ] && exit {first}; exit {last}"
    )
    done = on_tpu_hosts(tmp_path, "--config=a b.py", "--workdir=w")
    assert done.returncode == last, done.stderr
    started = [call for call in calls(tmp_path, "gcloud") if "launch.train" in call]
    assert len(started) == starts and len(set(started)) == 1
    assert "--worker=all" in started[0] and "--zone=zone" in started[0]
    command = started[0].split("--command=")[1]
    assert shlex.split(command)[-3:] == ["--multihost", "--config=a b.py", "--workdir=w"]


@pytest.mark.parametrize(("code", "limit"), [(75, "MAX_RESTARTS"), (1, "MAX_FAILURES")])
def test_tpu_hosts_do_not_start_again_for_ever(code, limit, tmp_path):
    stub(tmp_path, "gcloud", f"{READY.format(calls=tmp_path / 'gcloud.calls')}exit {code}")
    done = on_tpu_hosts(tmp_path, "--workdir=w", **{limit: "2"})
    assert done.returncode == code
    assert sum("launch.train" in call for call in calls(tmp_path, "gcloud")) == 3


def test_a_reclaimed_slice_is_made_again(tmp_path):
    """The first start loses its hosts: the slice is deleted, created and prepared once more, and the run resumes."""
    stub(
        tmp_path,
        "gcloud",
        f"""case "$*" in
  *describe*) cat {tmp_path}/state; exit;;
  *delete*) echo > {tmp_path}/state;;
  *create*) echo READY > {tmp_path}/state;;
  *launch.train*) [ $(grep -c launch.train {tmp_path}/gcloud.calls) -gt 1 ] || {{ echo PREEMPTED > {tmp_path}/state
    exit 255; }};;
esac
exit 0""",
    )
    (tmp_path / "state").write_text("READY\n")
    done = on_tpu_hosts(tmp_path, "--workdir=w", TPU="v5litepod-16")
    assert done.returncode == 0, done.stderr
    verbs = [re.search(r"describe|delete|create|scp|launch\.train|make", call) for call in calls(tmp_path, "gcloud")]
    assert [verb[0] for verb in verbs if verb] == (
        ["describe", "scp", "make", "launch.train", "describe"]
        + ["describe", "delete", "create", "scp", "make", "launch.train"]
    )
    (created,) = (call for call in calls(tmp_path, "gcloud") if " create " in call)
    assert "--accelerator-type=v5litepod-16" in created and "--spot" in created


def test_a_slice_that_is_not_there_needs_a_type(tmp_path):
    stub(tmp_path, "gcloud", 'grep -q describe <<< "$*" && exit 1; exit 0')
    done = on_tpu_hosts(tmp_path, "--workdir=w")
    assert done.returncode == 2 and "the slice slice in zone is ABSENT" in done.stderr
    assert len(calls(tmp_path, "gcloud")) == 1


def test_tpu_hosts_need_a_name_and_a_zone(tmp_path):
    done = run(tmp_path, "launch/tpu_vm.sh", "slice")
    assert done.returncode == 2 and "usage:" in done.stderr
