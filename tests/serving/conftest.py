"""One artefact for the tests of serving, and one compiled ranker of each artefact."""

import copy

import exporting
import pytest

from mmrf_jax.serving import artifact, ranker, traffic


@pytest.fixture(scope="session")
def mmrf(once):
    """(plan, state, folder) that nobody may change: copy it first."""
    return *exporting.planned(), once("mmrf", lambda folder: exporting.exported(folder / "mmrf")) / "mmrf"


@pytest.fixture(scope="session")
def compiled():
    """Makes a ranker once for each artefact and number of candidates: it is compiled for two dozen sizes."""
    made: dict[tuple[str, int, int], ranker.Ranker] = {}

    def make(loaded: artifact.Artifact, max_candidates: int, spare: int) -> ranker.Ranker:
        at = loaded.id, max_candidates, spare
        if at not in made:
            made[at] = ranker.Ranker(loaded, max_candidates, spare)
        return copy.copy(made[at])  # new items of one service are not those of another

    return make


@pytest.fixture(autouse=True)
def shared(compiled, monkeypatch):
    """Services of one artefact share its compiled ranker, which remembers nothing of a request."""
    monkeypatch.setattr(traffic, "Ranker", compiled)
