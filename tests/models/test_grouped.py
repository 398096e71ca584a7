"""Products of sorted rows by group: both forms against float64, and what lies outside the groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import parallel
from lm.models import grouped

SIZES = [[5, 0, 9, 2], [0, 0, 0, 0], [16, 0, 0, 0], [0, 0, 0, 20], [1, 1, 1, 1]]


def _operands(sizes, rows=20, width=6, hidden=7):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, width)).astype(np.float32)
    w = rng.normal(size=(len(sizes), width, hidden)).astype(np.float32)
    y = rng.normal(size=(rows, hidden)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(w), jnp.asarray(y), jnp.asarray(sizes, jnp.int32)


def _reference(x, w, sizes):
    """Each row times the matrix of its group, in float64."""
    x, w, sizes = np.asarray(x), np.asarray(w), np.asarray(sizes)
    groups = np.repeat(np.arange(len(sizes)), sizes)
    result = np.zeros((len(x), w.shape[2]))
    for row, group in enumerate(groups):
        result[row] = x[row].astype(np.float64) @ w[group].astype(np.float64)
    return result


def _reference_gradient(x, y, sizes):
    x, y, sizes = np.asarray(x), np.asarray(y), np.asarray(sizes)
    groups = np.repeat(np.arange(len(sizes)), sizes)
    result = np.zeros((len(sizes), x.shape[1], y.shape[1]))
    for row, group in enumerate(groups):
        result[group] += np.outer(x[row], y[row]).astype(np.float64)
    return result


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_product_and_gradients_are_those_of_each_row_alone(sizes):
    x, w, y, sizes = _operands(sizes)

    def product(x, w):
        return grouped.grouped_product(sizes, "", x, w, jnp.dtype(jnp.float32))

    value, transpose = jax.vjp(product, x, w)
    np.testing.assert_allclose(value, _reference(x, w, sizes), atol=2e-6)
    dx, dw = transpose(y)
    np.testing.assert_allclose(dx, _reference(y, np.swapaxes(w, 1, 2), sizes), atol=4e-6)
    np.testing.assert_allclose(dw, _reference_gradient(x, y, sizes), atol=4e-6)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_form_for_accelerators_equals_form_for_cpus(sizes, transposed):
    x, w, y, sizes = _operands(sizes)
    dtype, total = jnp.dtype(jnp.float32), int(np.sum(sizes))
    rows = y if transposed else x
    blocks = grouped._multiply_blocks(dtype, transposed, rows, w, sizes)
    ragged = grouped._multiply_ragged(dtype, transposed, rows, w, sizes)
    np.testing.assert_allclose(ragged[:total], blocks[:total], atol=4e-6)
    np.testing.assert_allclose(
        grouped._correlate_ragged(dtype, x, y, sizes),
        grouped._correlate_blocks(dtype, x, y, sizes),
        atol=4e-6,
    )


def test_many_blocks_of_one_group_are_exact(monkeypatch):
    monkeypatch.setattr(grouped, "MAX_BLOCK", 8)
    x, w, _, sizes = _operands([150, 3, 0, 47], rows=200)
    result = grouped._multiply_blocks(jnp.dtype(jnp.float32), False, x, w, sizes)
    np.testing.assert_allclose(result, _reference(x, w, sizes), atol=4e-6)


def test_bfloat16_accumulates_in_float32():
    x, w, _, sizes = _operands([5, 0, 9, 2])
    value = grouped.grouped_product(sizes, "", x, w, jnp.dtype(jnp.bfloat16))
    assert value.dtype == jnp.float32
    rounded = [np.asarray(jnp.asarray(z, jnp.bfloat16), np.float32) for z in (x, w)]
    np.testing.assert_allclose(value, _reference(*rounded, sizes), atol=2e-6)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_accelerators_get_a_ragged_product(platform):
    x, w, _, sizes = _operands([5, 0, 9, 2])

    def loss(x, w, sizes):
        return jnp.sum(grouped.grouped_product(sizes, "", x, w, jnp.dtype(jnp.bfloat16)))

    with parallel.shapes_only():  # the mesh of this room has devices, and says what they are
        exported = jax.export.export(jax.jit(jax.grad(loss, (0, 1))), platforms=[platform])(x, w, sizes)
    text = exported.mlir_module()
    assert "while" not in text
    assert "ragged_dot" in text or platform == "cuda"
