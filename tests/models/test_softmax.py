"""Attention that computes its weights again: values and gradients are those of the plain formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.models.softmax import masked_attention

B, T, S, K, G, H = 2, 5, 7, 2, 3, 4


def plain(q, k, v, allowed, scale):
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k) * scale
    weights = jax.nn.softmax(jnp.where(allowed[:, None, None], scores, -1e30), axis=-1)
    return jnp.einsum("BKGTS,BSKH->BKGTH", weights, v)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_and_gradients_are_those_of_the_formula(dtype):
    rng = np.random.default_rng(0)
    shapes = ((B, T, K, G, H), (B, S, K, H), (B, S, K, H + 1))
    arrays = [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]
    allowed = jnp.asarray(rng.random((B, T, S)) < 0.6).at[0, 0].set(False)
    # What a query that reads nothing gets is thrown away by the caller: no gradient comes back to it.
    gradient = jnp.asarray(rng.standard_normal((B, K, G, T, H + 1)), jnp.float32).at[0, :, :, 0].set(0.0)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in arrays]
        wanted, pull = jax.vjp(lambda *a: plain(*a, allowed, 0.3), *wide)
        wanted_gradients = pull(jnp.asarray(np.asarray(gradient, np.float64)))
    out, pull = jax.vjp(lambda *a: masked_attention(*a, allowed, 0.3), *arrays)
    assert out.dtype == jnp.float32
    tolerance = 1e-5 if dtype == "float32" else 0.04
    np.testing.assert_allclose(out, wanted, atol=tolerance)
    for found, expected in zip(pull(gradient), wanted_gradients, strict=True):
        assert found.dtype == dtype
        np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=tolerance, rtol=tolerance)


def test_backward_keeps_nothing_of_the_size_of_the_scores():
    long = 64
    q, k = jnp.ones((1, long, 1, 1, H)), jnp.ones((1, long, 1, H))
    allowed = jnp.tril(jnp.ones((1, long, long), bool))
    _, saved = jax.eval_shape(lambda q, k: jax.vjp(lambda q, k: masked_attention(q, k, k, allowed, 1.0), q, k), q, k)
    floats = [leaf for leaf in jax.tree.leaves(saved) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert max(leaf.size for leaf in floats) < long * long
