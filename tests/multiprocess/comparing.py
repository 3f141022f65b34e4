"""What it means that two runs of one config are the same, on one topology or on two."""

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from processes import results, rows, steps

from mmrf_jax.checkpointing import integrity
from mmrf_jax.checkpointing.manager import Checkpoints


def final_state(workdir) -> dict[str, np.ndarray]:
    """The arrays of the newest checkpoint by name; keys as the numbers they are made of."""
    step = steps(workdir)[-1]
    spec = integrity.load(workdir / "checkpoints" / str(step)).leaves
    device = SingleDeviceSharding(jax.devices()[0])
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        key = jax.random.key(0).dtype
        dtypes = {name: key if dtype.startswith("key<") else np.dtype(dtype) for name, (dtype, _) in spec.items()}
        target = {n: jax.ShapeDtypeStruct(tuple(s), dtypes[n], sharding=device) for n, (_, s) in spec.items()}
        state, _ = checkpoints.restore(target, step)
    return {
        n: np.asarray(jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
        for n, x in state.items()
    }


def assert_same(workdir, reference):
    """Results, metrics and parameters to the bit."""
    assert (workdir / "results.json").read_bytes() == (reference / "results.json").read_bytes()
    assert rows(workdir) == rows(reference)
    assert steps(workdir)[-1] == steps(reference)[-1]
    found, wanted = final_state(workdir), final_state(reference)
    assert found.keys() == wanted.keys() and any(name.startswith("agents/params/") for name in found)
    for name, value in wanted.items():
        assert found[name].tobytes() == value.tobytes(), name


def assert_close(workdir, reference):
    """The same users, order and counts; means of the A/B test within half their intervals."""
    found, wanted = results(workdir), results(reference)
    for count in ("rounds", "sessions_of_last_round"):
        assert found["train"][count] == wanted["train"][count], count

    def first(folder):
        return next(row for row in rows(folder) if row["phase"] == "fit")

    for name, value in first(reference).items():  # of one batch of one log
        if isinstance(value, float):
            assert first(workdir)[name] == pytest.approx(value, rel=1e-4), name
    for arm, metrics in wanted["ab_test"].items():
        for name, entry in metrics.items():
            here = found["ab_test"][arm][name]
            if arm == "production":  # a fixed policy
                assert here["mean"] == pytest.approx(entry["mean"], rel=1e-5), name
            elif entry["diff_pct"] is not None:
                half = (entry["ci95"][1] - entry["ci95"][0]) / 2
                assert abs(here["diff_pct"] - entry["diff_pct"]) <= half + 1e-9, (arm, name)
