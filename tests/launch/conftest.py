"""One finished tiny run for the tests of the mains, and a browser for their pages."""

import shutil
from pathlib import Path

import processes
import pytest
from selenium import webdriver


@pytest.fixture(scope="session")
def finished(launch, once) -> Path:
    """A run folder that nobody may change: copy it first."""
    return once("finished", lambda folder: launch.ok("train", *processes.TINY, f"--workdir={folder / 'run'}")) / "run"


@pytest.fixture(scope="session")
def artifact(launch, finished, once) -> Path:
    """The run, exported; nobody may change it."""

    def export(folder):
        return launch.ok("export", f"--workdir={finished}", f"--out={folder / 'artifact'}")

    return once("exported", export) / "artifact"


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
