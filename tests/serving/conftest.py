"""One artefact for the tests of serving."""

import exporting
import pytest


@pytest.fixture(scope="session")
def mmrf(once):
    """(plan, state, folder) that nobody may change: copy it first."""
    return *exporting.planned(), once("mmrf", lambda folder: exporting.exported(folder / "mmrf")) / "mmrf"
