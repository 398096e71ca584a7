"""Dispatches: they agree where nothing is dropped, and capacity drops what it says it drops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.models.dispatch import AllToAll, Capacity, Dense, Dropless, permute
from lm.models.division import Experts
from lm.models.layers import dropout, row_keys
from lm.models.routing import Router, Routing

EXPERTS, SELECTED = 4, 2


def _compute(weights, rows, axes, product, key):
    """One matrix for each expert and a nonlinearity, so that an expert's zero is not a zero."""
    letters = axes if axes.startswith("E") else f"E{axes}"
    y = jnp.cos(product(f"{letters}D,EDF->{letters}F", rows, weights["up"], jnp.dtype(jnp.float32)))
    return dropout(y, 0.3, key)


def _experts(w_EDF):
    return Experts({"up": w_EDF}, {"up": ("experts", "embed", None)}, _compute)


def _inputs(seed=0, batch=2, length=9):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(batch, length, 6)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(EXPERTS, 6, 6)), jnp.float32)
    valid = jnp.asarray(np.arange(length) < rng.integers(length // 2, length, size=(batch, 1)))
    logits = jnp.asarray(rng.normal(size=(batch, length, EXPERTS)), jnp.float32)
    return x, w, logits, valid


def _run(dispatch, x, w, logits, valid, key=None):
    routing = Router(normalize=True).route(logits, None, SELECTED, valid)
    return dispatch.run(x, routing, _experts(w), key)


def _reference(x, w, logits, valid):
    """Token by token, in float64."""
    x, w, logits = (np.asarray(a, np.float64) for a in (x, w, logits))
    y = np.zeros_like(x)
    for b, t in zip(*np.nonzero(valid), strict=True):
        chosen = np.argsort(-logits[b, t], kind="stable")[:SELECTED]
        weights = np.exp(logits[b, t, chosen])
        for expert, weight in zip(chosen, weights / weights.sum(), strict=True):
            y[b, t] += weight * np.cos(x[b, t] @ w[expert])
    return y


@pytest.mark.parametrize("dispatch", [Dense(), Dropless(), Capacity(factor=2.0)], ids=lambda d: type(d).__name__)
@pytest.mark.parametrize("seed", range(3))
def test_nothing_dropped_equals_the_reference(dispatch, seed):
    inputs = _inputs(seed)
    y, dropped = jax.jit(_run, static_argnums=0)(dispatch, *inputs)
    np.testing.assert_allclose(y, _reference(*inputs), atol=3e-6)
    assert dropped == 0


@pytest.mark.parametrize("dispatch", [Dropless(), Capacity(factor=2.0)], ids=lambda d: type(d).__name__)
def test_gradients_equal_those_of_the_dense_form(dispatch):
    x, w, logits, valid = _inputs()

    def loss(dispatch, x, w, logits):
        return jnp.sum(jnp.sin(3.0 * _run(dispatch, x, w, logits, valid)[0]))

    gradient = jax.jit(jax.grad(loss, (1, 2, 3)), static_argnums=0)
    for found, expected in zip(gradient(dispatch, x, w, logits), gradient(Dense(), x, w, logits), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5)
        assert np.abs(expected).max() > 0.1


@pytest.mark.parametrize("dispatch", [Dropless(), AllToAll(), Capacity(factor=2.0)], ids=lambda d: type(d).__name__)
def test_dropout_is_of_tokens_and_experts_whatever_the_dispatch(dispatch):
    key = row_keys(jax.random.key(1), 2)
    x, w, logits, valid = _inputs()
    found, _ = _run(dispatch, x, w, logits, valid, key)
    expected, _ = _run(Dense(), x, w, logits, valid, key)
    np.testing.assert_allclose(found, expected, atol=3e-6)
    assert np.abs(expected - _run(Dense(), x, w, logits, valid)[0]).max() > 0.1


def _collapsed(length, size_of_experts=EXPERTS):
    """Everything to expert 0 first and expert 1 second."""
    experts = jnp.tile(jnp.asarray([0, 1]), (1, length, 1))
    probabilities = jnp.full((1, length, size_of_experts), 1 / size_of_experts)
    return Routing(probabilities, experts, jnp.full((1, length, 2), 0.5), jnp.ones((1, length), bool))


def test_capacity_keeps_the_first_tokens_and_drops_the_rest():
    x, w, _, _ = _inputs(batch=1, length=8)
    dispatch = Capacity(factor=0.5)
    assert dispatch.slots(8, 2, EXPERTS) == 2
    y, dropped = dispatch.run(x, _collapsed(8), _experts(w), None)
    assert dropped == 12
    np.testing.assert_array_equal(y[0, 2:], np.zeros((6, 6)))
    full, _ = Dense().run(x, _collapsed(8), _experts(w), None)
    np.testing.assert_allclose(y[0, :2], full[0, :2], atol=1e-6)


def test_first_choices_come_before_second_choices():
    """Token 1's first choice takes the only slot of expert 1 from token 0's second choice (GShard, algorithm 1)."""
    x, w, _, _ = _inputs(batch=1, length=2)
    experts = jnp.asarray([[[0, 1], [1, 2]]])
    routing = Routing(jnp.full((1, 2, 4), 0.25), experts, jnp.ones((1, 2, 2)), jnp.ones((1, 2), bool))
    y, dropped = Capacity(factor=1.0).run(x, routing, _experts(w), None)
    assert dropped == 1
    np.testing.assert_allclose(y[0, 0], np.cos(x[0, 0] @ w[0]), atol=1e-6)
    np.testing.assert_allclose(y[0, 1], np.cos(x[0, 1] @ w[1]) + np.cos(x[0, 1] @ w[2]), atol=1e-6)


def test_padding_takes_no_room():
    x, w, _, _ = _inputs(batch=1, length=8)
    routing = _collapsed(8)._replace(valid_BT=jnp.arange(8)[None] >= 6)
    y, dropped = Capacity(factor=0.5).run(x, routing, _experts(w), None)
    assert dropped == 0
    np.testing.assert_array_equal(y[0, :6], np.zeros((6, 6)))
    assert np.abs(y[0, 6:]).min() > 0


def test_one_token_is_never_dropped():
    assert Capacity(factor=0.1).slots(1, 2, 64) == 1


@pytest.mark.parametrize("dispatch", [Dense(), Dropless(), Capacity(factor=2.0)], ids=lambda d: type(d).__name__)
def test_padding_that_is_not_finite_hurts_nobody_in_value(dispatch):
    x, w, logits, valid = _inputs()
    other = jnp.where(valid[..., None], x, 1e3)
    np.testing.assert_array_equal(_run(dispatch, x, w, logits, valid)[0], _run(dispatch, other, w, logits, valid)[0])


def test_gradient_of_a_permutation_is_the_inverse_permutation():
    order = jnp.asarray([2, 0, 3, 1])
    x = jnp.arange(8.0).reshape(4, 2)
    y, transpose = jax.vjp(lambda x: permute(x, order, jnp.argsort(order)), x)
    np.testing.assert_array_equal(y, x[order])
    np.testing.assert_array_equal(transpose(y)[0], x)
