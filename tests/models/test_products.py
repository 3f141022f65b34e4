"""Products with rounded operands, and what stays float32 around them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from flax import linen as nn

from mmrf_jax.agents.mmrf import training_step
from mmrf_jax.models import products
from mmrf_jax.models.feedback_model import fitting
from mmrf_jax.training import configs

LOW = dataclasses.replace(tiny.CONFIG, compute_dtype="bfloat16")
LOW_FEEDBACK = dataclasses.replace(tiny.FEEDBACK, compute_dtype="bfloat16")


def rounded(x) -> np.ndarray:
    return np.asarray(x, np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


@pytest.mark.parametrize(
    ("subscripts", "written", "left", "right"),
    [
        ("...nd,...md->...nm", "xynd,xymd->xynm", (2, 3, 4, 5), (2, 3, 6, 5)),
        ("nf,...fd->...nd", "nf,xyfd->xynd", (4, 5), (2, 3, 5, 6)),
        ("...nd,ndo->...no", "xnd,ndo->xno", (2, 4, 5), (4, 5, 3)),
        ("...hij,...jhd->...ihd", "xhij,xjhd->xihd", (2, 3, 4, 4), (2, 4, 3, 5)),
    ],
)
def test_operands_are_rounded_in_both_passes_and_sums_are_not(subscripts, written, left, right):
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=shape).astype(np.float32) for shape in (left, right))
    out, pull = jax.vjp(lambda a, b: products.einsum(subscripts, a, b, "bfloat16"), a, b)
    np.testing.assert_allclose(out, np.einsum(written, rounded(a), rounded(b)), rtol=1e-6, atol=1e-6)
    g = rng.normal(size=out.shape).astype(np.float32)
    of_a, of_b, of_out = written.replace("->", ",").split(",")
    wanted = [
        np.einsum(f"{of_out},{of_b}->{of_a}", rounded(g), rounded(b)),
        np.einsum(f"{of_out},{of_a}->{of_b}", rounded(g), rounded(a)),
    ]
    for found, expected in zip(pull(g), wanted, strict=True):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    assert out.dtype == np.float32 and not np.array_equal(out, np.einsum(subscripts, a, b))


def test_a_dense_layer_has_the_same_parameters_and_a_rounded_product():
    x = np.random.default_rng(1).normal(size=(2, 3, 7)).astype(np.float32)
    plain, low = products.dense(5, "float32"), products.dense(5, "bfloat16")
    params = plain.init(jax.random.key(0), x)
    assert plain == nn.Dense(5) and jax.tree.structure(low.init(jax.random.key(0), x)) == jax.tree.structure(params)
    kernel = params["params"]["kernel"]
    np.testing.assert_allclose(low.apply(params, x), rounded(x) @ rounded(kernel), rtol=1e-6, atol=1e-6)


def lowered(step, state, config) -> str:
    traced = jax.jit(step, static_argnames="config").trace(state, tiny.make_batch(), tiny.make_items(), config)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def fit_of(config) -> str:
    return lowered(fitting.update, tiny.make_feedback_model(config), config)


def update_of(config) -> str:
    return lowered(training_step.update, tiny.make_shapes(config), config)


@pytest.mark.parametrize(
    ("program", "plain", "low"),
    [
        (fit_of, tiny.FEEDBACK, LOW_FEEDBACK),
        pytest.param(update_of, tiny.CONFIG, LOW, marks=pytest.mark.slow),
    ],
)
def test_the_default_has_no_rounded_operand_and_bfloat16_has_many(program, plain, low):
    assert "bf16" not in program(plain)
    every = [line for line in program(low).splitlines() if "stablehlo.dot_general" in line]
    rounded = [line for line in every if "bf16" in line]
    assert len(rounded) > len(every) / 2 and all(line.endswith("f32>") for line in rounded)


def test_state_losses_and_tables_stay_float32():
    batch, items = tiny.make_batch(), tiny.make_items()
    for step, state, config in (
        (training_step.update, tiny.make_shapes(LOW), LOW),
        (fitting.update, tiny.make_feedback_model(LOW_FEEDBACK), LOW_FEEDBACK),
    ):
        after, metrics = jax.eval_shape(functools.partial(step, config=config), state, batch, items)
        kinds = {x.dtype for x in jax.tree.leaves((after, metrics)) if jnp.issubdtype(x.dtype, jnp.floating)}
        assert kinds == {jnp.dtype("float32")}
        before = jax.tree.map(lambda x: (x.shape, x.dtype), state)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == before


def test_the_field_is_of_both_sections_and_refuses_other_types():
    run = configs.override(configs.Run(), agents={"compute_dtype": "bfloat16"})
    assert run.feedback.compute_dtype == "float32" and run.agents.compute_dtype == "bfloat16"
    with pytest.raises(ValueError, match=r"unknown feedback.compute_dtype='float16'; choose among float32, bfloat16"):
        configs.override(configs.Run(), feedback={"compute_dtype": "float16"})


@pytest.mark.slow
def test_a_fit_with_rounded_operands_learns_as_much():
    """On one batch: the loss falls by nine tenths of what it falls in float32, and not to the same number."""
    batch, items = tiny.make_batch(users=32), tiny.make_items()
    fell = []
    for config in (tiny.FEEDBACK, LOW_FEEDBACK):
        state = tiny.make_feedback_model(config)
        fit = jax.jit(fitting.update, static_argnames="config", compiler_options=tiny.HOT)
        losses = []
        for _ in range(150):
            state, metrics = fit(state, batch, items, config)
            losses.append(sum(float(x) for name, x in metrics.items() if name.startswith("loss/")))
        fell.append(np.mean(losses[:5]) - np.mean(losses[-20:]))
    assert fell[0] > 0.0 and fell[1] > 0.9 * fell[0] and fell[0] != fell[1]
