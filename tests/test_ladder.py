"""The rows of the ladder: which parts are whose, and the slate that is searched, against all slates."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.results import ladder

B, C, K, DISCOUNT = 40, 7, 2, 0.9


def parts(seed):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "actor": normal(B, C),
        "reward": jnp.exp(normal(B, C)),
        "logit": normal(B),
        "effect": normal(B, C),
        "value": 5.0 + normal(B),
    }


@jax.jit
def scores(use, learned, truth):
    return ladder.scores_of(use, learned, truth, K, DISCOUNT)


def of_row(row, learned, truth):
    return np.asarray(scores(np.array([part in ladder.ROWS[row] for part in ladder.PARTS]), learned, truth))


def worth(x, slate):
    """The worth of slates [B, K]: rewards, and the value of staying after them."""
    reward, effect = (
        np.take_along_axis(np.asarray(x[name]), slate, axis=1).sum(axis=1) for name in ("reward", "effect")
    )
    return reward + DISCOUNT * np.asarray(x["value"]) / (1.0 + np.exp(-np.asarray(x["logit"]) - effect))


@pytest.mark.parametrize(
    ("row", "true"),
    [
        ("values", ()),
        ("true feedback", ("reward",)),
        ("true staying", ("logit", "effect")),
        ("true values", ("value",)),
    ],
)
def test_a_row_replaces_its_parts_alone(row, true):
    learned, truth = parts(0), parts(1)
    x = {name: np.asarray((truth if name in true else learned)[name]) for name in learned}
    shown = np.argsort(-np.asarray(learned["actor"]), axis=1)[:, :K]
    stay = 1.0 / (1.0 + np.exp(-x["logit"] - np.take_along_axis(x["effect"], shown, axis=1).sum(axis=1)))
    expected = x["reward"] + (DISCOUNT * stay * (1.0 - stay) * x["value"])[:, None] * x["effect"]
    np.testing.assert_allclose(of_row(row, learned, truth), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(of_row("run", learned, truth), learned["actor"])


def test_the_searched_slate_is_close_to_the_best_of_all():
    learned, truth = parts(0), parts(1)
    every = np.array(list(itertools.combinations(range(C), K)))
    for row, x in (("exact slate", learned), ("all true", truth)):
        found = worth(x, np.argsort(-of_row(row, learned, truth), axis=1)[:, :K])
        best = np.max([worth(x, np.broadcast_to(slate, (B, K))) for slate in every], axis=0)
        assert (found <= best + 1e-4).all() and found.mean() > 0.99 * best.mean()
        assert (found > best - 1e-4).mean() > 0.8
