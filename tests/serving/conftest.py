"""One artefact for the tests of serving, and one compiled ranker of each artefact."""

import copy

import exporting
import pytest

from mmrf_jax.serving import artifact, ranker, traffic


@pytest.fixture(scope="session")
def mmrf(once):
    """(plan, state, folder) that no one may change: copy it first."""
    return *exporting.planned(), once("mmrf", lambda folder: exporting.exported(folder / "mmrf")) / "mmrf"


@pytest.fixture(scope="session")
def other(once):
    """Another artefact of the same spec, and as little to be changed."""

    def export(folder):
        exporting.exported(folder / "other", "mmrf", communication="shared_latent")

    return once("other", export) / "other"


@pytest.fixture(scope="session")
def named(once):
    """An artefact of string ids and named features that no one may change."""
    return once("named", lambda folder: exporting.exported_with_names(folder / "named")) / "named"


@pytest.fixture(scope="session")
def compiled():
    """Makes a ranker once for each artefact and number of candidates: it is compiled for two dozen sizes."""
    made: dict[tuple, ranker.Ranker] = {}

    def make(loaded: artifact.Artifact, max_candidates: int, spare: int) -> ranker.Ranker:
        at = loaded.id, max_candidates, spare, ranker.BATCHES
        if at not in made:
            made[at] = ranker.Ranker(loaded, max_candidates, spare)
        return copy.copy(made[at])  # new items of one service are not those of another

    return make


@pytest.fixture(scope="module")
def few_sizes():
    """Services compile for two numbers of requests instead of four."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranker, "BATCHES", (1, 16))
        yield


@pytest.fixture(autouse=True)
def shared(compiled, monkeypatch):
    """Services of one artefact share its compiled ranker, which remembers nothing of a request."""
    monkeypatch.setattr(traffic, "Ranker", compiled)
