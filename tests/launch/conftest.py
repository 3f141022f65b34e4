"""One finished tiny run for the tests of the mains, and a browser for their pages."""

import shutil
from pathlib import Path

import processes
import pytest
from selenium import webdriver


@pytest.fixture(scope="session")
def finished(launch, tmp_path_factory) -> Path:
    """A run folder that nobody may change: copy it first."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    launch.ok("train", *processes.TINY, f"--workdir={workdir}")
    return workdir


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
