"""A run that starts on one number of devices and ends on another (contract.md, "Tolerances", another topology: c)."""

import pytest
from processes import results, steps, wait_until

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("first", "then"), [(4, 1), (1, 4)])
def test_a_run_moves_to_another_number_of_devices(first, then, launch, reference, args, tmp_path):
    workdir, log = tmp_path / "run", tmp_path / "log.txt"
    process = launch.start("train", *args, f"--workdir={workdir}", devices=first, log=log)
    assert wait_until(process, lambda: len(steps(workdir)) >= 1), log.read_text()[-4000:]
    process.kill()
    process.wait()
    assert not (workdir / "learned.json").exists()
    done = launch.ok("train", *args, f"--workdir={workdir}", devices=then)
    assert "resumed at update" in done.stderr

    found, wanted = results(workdir), results(reference)
    for count in ("updates", "sessions", "requests"):
        assert found["train"][count] == wanted["train"][count], count
    for arm, metrics in wanted["ab_test"].items():
        for name, entry in metrics.items():
            here = found["ab_test"][arm][name]
            if arm == "production":  # a fixed policy
                assert here["mean"] == pytest.approx(entry["mean"], rel=1e-5), name
            elif entry["diff_pct"] is not None:
                half = (entry["ci95"][1] - entry["ci95"][0]) / 2
                assert abs(here["diff_pct"] - entry["diff_pct"]) <= half + 1e-9, (arm, name)
