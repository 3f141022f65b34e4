"""What a run keeps as its steps go by: nothing that is not finite. And where its seconds go, by a test's clock."""

import types

import jax.numpy as jnp
import pytest

from mmrf_jax.io import metric_writer, profile
from mmrf_jax.parallel import programs
from mmrf_jax.training import configs, hooks


class Saved(list):
    """Stands for the checkpoints of a run: the steps that were saved."""

    def save(self, step, state, **_):
        self.append(step)


@pytest.fixture
def keep(tmp_path):
    """keep(state, loss) takes a step that ends with these; `keep.saved` has the steps that were kept."""
    saved, config = Saved(), configs.Run(log_every=2, checkpoint_every=1)
    with metric_writer.MetricsWriter(tmp_path, start_step=None, seed=0) as writer:
        run_hooks = hooks.Hooks(config, writer, saved, profile.Profile("", None), 0)
        iterator = types.SimpleNamespace(position=0, total=9)
        run_hooks.begin("fit", iterator)

        def take(state: float, loss: float) -> None:
            iterator.position += 1
            run_hooks.before_step()
            made = {"w": jnp.array([1.0, state]), "n": jnp.int32(3)}
            run_hooks.after_step(lambda: made, lambda: {"loss/click": jnp.float32(loss)})

        take.saved = saved
        yield take


def test_a_state_that_is_not_finite_is_not_saved(keep):
    with pytest.raises(FloatingPointError, match="steps 1 to 1: the state after step 1 is not finite and is not saved"):
        keep(float("inf"), 0.5)
    assert not keep.saved


def test_a_state_whose_metrics_are_finite_is_named_by_its_step(keep):
    keep(1.0, 0.5)
    with pytest.raises(FloatingPointError, match="steps 2 to 2: the state after step 2 is not finite"):
        keep(float("nan"), 0.5)
    assert keep.saved == [1]


def test_a_metric_that_is_not_finite_stops_before_the_state_is_saved(keep):
    keep(1.0, 0.5)
    with pytest.raises(FloatingPointError, match=r"steps 1 to 2: .*not finite at step 2 .*loss/click = nan"):
        keep(1.0, float("nan"))
    assert keep.saved == [1]


def test_seconds_are_those_of_the_phases_without_compilation():
    now, ahead = [100.0], programs.Ahead()
    with hooks.PhaseTimes(ahead, clock=lambda: now[0]) as spent:
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
    assert hooks.describe_times(found).startswith("time: 35 s, of which compiling 7, preparing 2, collecting 6,")
