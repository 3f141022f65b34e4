"""One artefact for the tests of serving."""

import exporting
import pytest


@pytest.fixture(scope="session")
def mmrf(tmp_path_factory):
    """(plan, state, folder) that nobody may change: copy it first."""
    return exporting.exported(tmp_path_factory.mktemp("export") / "mmrf")
