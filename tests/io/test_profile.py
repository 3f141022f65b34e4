"""Traces on demand: which steps, where they lie, and what is no such thing."""

import jax
import jax.numpy as jnp
import pytest

from mmrf_jax.io import profile


def run(traced, steps):
    step = jax.jit(lambda x: x + 1.0)
    x, on = jnp.zeros(()), []
    for number in steps:
        traced.before(number)
        on.append(traced._on)
        x = step(x)
        traced.after(number, x)
    traced.close()
    return on


def traces(folder):
    return list(folder.rglob("*.xplane.pb"))


@pytest.mark.parametrize(
    "steps, first, last, traced", [("2:3", 1, 5, [2, 3]), ("2:9", 1, 4, [2, 3, 4]), ("2:4", 3, 6, [3, 4])]
)
def test_the_steps_that_were_asked_for_are_traced(tmp_path, steps, first, last, traced):
    """Also where the run ends before them, or goes on after a restart among them."""
    on = run(profile.Profile(steps, tmp_path / "profile"), range(first, last + 1))
    assert [number for number, is_on in zip(range(first, last + 1), on, strict=True) if is_on] == traced
    assert len(traces(tmp_path)) == 1


@pytest.mark.parametrize("steps, inside", [("", True), ("7:9", True), ("1:2", False)])
def test_nothing_is_written_unless_asked_for(tmp_path, steps, inside):
    assert not any(run(profile.Profile(steps, tmp_path / "profile" if inside else None), range(1, 4)))
    assert not traces(tmp_path)


@pytest.mark.parametrize("steps", ["5", "a:b", "9:3", "0:4", "1:2:3"])
def test_what_names_no_steps_is_refused(steps):
    with pytest.raises(ValueError, match=r"profile_steps=.*FIRST:LAST"):
        profile.parse(steps)
