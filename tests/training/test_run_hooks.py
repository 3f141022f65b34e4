"""What a run keeps as its steps go by: nothing that is not finite."""

import jax.numpy as jnp
import pytest

from mmrf_jax.io import metric_writer
from mmrf_jax.training import configs, train


class Saved(list):
    """Stands for the checkpoints of a run: the steps that were saved."""

    def save(self, step, state, **_):
        self.append(step)


@pytest.fixture
def keep(tmp_path):
    """keep(state, loss) takes a step that ends with these; `keep.saved` has the steps that were kept."""
    saved, config = Saved(), configs.Run(log_every=2, checkpoint_every=1)
    with metric_writer.MetricsWriter(tmp_path, start_step=None, seed=0) as writer:
        hooks = train._RunHooks(config, writer, saved, 0)

        def take(state: float, loss: float) -> None:
            hooks.hold({"w": jnp.array([1.0, state]), "n": jnp.int32(3)})
            hooks.after_step("fit", {"loss/click": jnp.float32(loss)}, last=False)
            hooks.save()

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
