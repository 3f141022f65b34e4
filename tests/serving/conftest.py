"""One artefact for the tests of serving, and one compiled ranker of each artefact."""

import exporting
import pytest

from mmrf_jax.serving import artifact, ranker, service


@pytest.fixture(scope="session")
def mmrf(once):
    """(plan, state, folder) that nobody may change: copy it first."""
    return *exporting.planned(), once("mmrf", lambda folder: exporting.exported(folder / "mmrf")) / "mmrf"


@pytest.fixture(scope="session")
def compiled():
    """Makes a ranker once for each artefact and number of candidates: it is compiled for two dozen sizes."""
    made: dict[tuple[str, int], ranker.Ranker] = {}

    def make(loaded: artifact.Artifact, max_candidates: int) -> ranker.Ranker:
        at = loaded.id, max_candidates
        if at not in made:
            made[at] = ranker.Ranker(loaded, max_candidates)
        return made[at]

    return make


@pytest.fixture(autouse=True)
def shared(compiled, monkeypatch):
    """Services of one artefact share its ranker, which remembers nothing of a request."""
    monkeypatch.setattr(service, "Ranker", compiled)
