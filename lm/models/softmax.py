"""Masked softmax attention that keeps no weights: the backward pass computes them again.

Knows no layout, position or parameter. Law: the gradient is that of the plain formula, whose steps,
derived one by one, would keep several arrays of T times S for each head.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lm.models.products import contract, inner

# Finite, so that a row without any allowed key stays finite.
MASKED = -1e30


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def masked_attention(
    q_BTKGH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, allowed_BTS: jax.Array, scale: float
) -> jax.Array:
    """Returns f32[B, K, G, T, H], softmax(scale q k + mask) v; the softmax is float32.

    The gradient of the scores is weights * (gradient of the weights - sum over H of gradient times result), as in
    FlashAttention (Dao et al. 2022, section 3 and appendix B.2).

    Args:
      q_BTKGH: queries, by the key head that they read.
      k_BSKH: keys, in the same dtype.
      v_BSKH: values; their H may be another one.
      allowed_BTS: bool; a query that may read nothing gets the mean of all values.
      scale: factor on the products.
    """
    return _forward(q_BTKGH, k_BSKH, v_BSKH, allowed_BTS, scale)[0]


def _scores(q_BTKGH: jax.Array, k_BSKH: jax.Array, allowed_BTS: jax.Array, scale: float) -> jax.Array:
    scores_BKGTS = contract("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, q_BTKGH.dtype)
    return jnp.where(allowed_BTS[:, None, None, :, :], scores_BKGTS * scale, MASKED)


def _forward(
    q_BTKGH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, allowed_BTS: jax.Array, scale: float
) -> tuple[jax.Array, Any]:
    scores_BKGTS = _scores(q_BTKGH, k_BSKH, allowed_BTS, scale)
    largest_BKGT1 = jnp.max(scores_BKGTS, axis=-1, keepdims=True)
    weights_BKGTS = jnp.exp(scores_BKGTS - largest_BKGT1)
    total_BKGT1 = jnp.sum(weights_BKGTS, axis=-1, keepdims=True)
    # Divided after the product: of T times H numbers, not of T times S.
    out_BKGTH = contract("BKGTS,BSKH->BKGTH", weights_BKGTS, v_BSKH, q_BTKGH.dtype) / total_BKGT1
    normalizer_BKGT1 = largest_BKGT1 + jnp.log(total_BKGT1)
    return out_BKGTH, (q_BTKGH, k_BSKH, v_BSKH, allowed_BTS, out_BKGTH, normalizer_BKGT1)


def _backward(scale: float, saved: Any, gradient_BKGTH: jax.Array) -> tuple[Any, ...]:
    q_BTKGH, k_BSKH, v_BSKH, allowed_BTS, out_BKGTH, normalizer_BKGT1 = saved
    dtype = q_BTKGH.dtype
    weights_BKGTS = jnp.exp(_scores(q_BTKGH, k_BSKH, allowed_BTS, scale) - normalizer_BKGT1)
    dv_BSKH = contract("BKGTS,BKGTH->BSKH", weights_BKGTS, gradient_BKGTH, dtype)
    to_weights_BKGTS = contract("BKGTH,BSKH->BKGTS", gradient_BKGTH, v_BSKH, dtype)
    mean_BKGT1 = inner(gradient_BKGTH, out_BKGTH)
    to_scores_BKGTS = scale * weights_BKGTS * (to_weights_BKGTS - mean_BKGT1)
    dq_BTKGH = contract("BKGTS,BSKH->BTKGH", to_scores_BKGTS, k_BSKH, dtype)
    dk_BSKH = contract("BKGTS,BTKGH->BSKH", to_scores_BKGTS, q_BTKGH, dtype)
    return dq_BTKGH.astype(dtype), dk_BSKH.astype(k_BSKH.dtype), dv_BSKH.astype(v_BSKH.dtype), None


masked_attention.defvjp(_forward, _backward)
