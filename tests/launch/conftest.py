"""One finished tiny run for the tests of the mains, and a browser for their pages."""

import os
import shutil
from pathlib import Path

import processes
import pytest
from selenium import webdriver


@pytest.fixture(scope="session")
def finished(launch, once) -> Path:
    """A run folder that no one may change: copy it first."""
    return once("finished", lambda folder: launch.ok("train", *processes.TINY, f"--workdir={folder / 'run'}")) / "run"


@pytest.fixture(scope="session")
def artifact(launch, finished, once) -> Path:
    """The run, exported; no one may change it."""

    def export(folder):
        return launch.ok("export", f"--workdir={finished}", f"--out={folder / 'artifact'}")

    return once("exported", export) / "artifact"


@pytest.fixture(scope="session")
def real_logs(once) -> Path:
    """KuaiRand's files of fewer users: two thirds of those of the random log, and every 10th other."""
    source = os.environ.get("KUAIRAND_DIR", "")
    if not os.path.isdir(os.path.join(source, "data")):
        pytest.skip("KUAIRAND_DIR is unset or names no folder: set it to a folder of KuaiRand's official files")

    def write(folder: Path) -> None:
        import polars  # half a second, for two slow tests

        (folder / "data").mkdir()
        logs = {path.name: polars.read_csv(path) for path in Path(source, "data").glob("*.csv")}
        shown = next(frame for name, frame in logs.items() if name.startswith("log_random"))["user_id"].unique()
        shown = shown.filter(shown % 3 != 0)
        for name, frame in logs.items():
            if "user_id" in frame.columns:
                frame = frame.filter(polars.col("user_id").is_in(shown.implode()) | (polars.col("user_id") % 10 == 0))
            frame.write_csv(folder / "data" / name)

    return once("kuairand", write)


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium of the system's packages; a test without one fails, for it would show nothing."""
    found = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if not all(found.values()):
        pytest.fail("there is no chromium with chromedriver; apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = found["chromium"]
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(found["chromedriver"]))
    yield driver
    driver.quit()
