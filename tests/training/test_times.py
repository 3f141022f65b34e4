"""Where the seconds of a run go, by a clock of the test's own."""

import pytest

from mmrf_jax.parallel import programs
from mmrf_jax.training import times


def test_seconds_are_those_of_the_phases_without_compilation():
    now, ahead = [100.0], programs.Ahead()
    with times.Times(ahead, clock=lambda: now[0]) as spent:
        now[0] += 2.0
        spent.begin("collect")
        now[0] += 5.0
        spent.begin("fit")
        now[0] += 9.0
        spent._compiling.seconds += 3.0  # compiled by the call
        ahead.waited += 4.0  # waited for a thread that compiles
        spent.begin("train")
        now[0] += 10.0
        spent.begin("collect")
        now[0] += 1.0
        spent.begin("ab_test")
        now[0] += 7.0
        spent.begin("offline")
        now[0] += 1.0
        found = spent.seconds()
    assert found == pytest.approx(
        {"compiling": 7.0, "preparing": 2.0, "collecting": 6.0, "fitting": 2.0, "training": 10.0, "evaluating": 8.0}
    )
    assert times.describe(found).startswith("time: 35 s, of which compiling 7, preparing 2, collecting 6,")
