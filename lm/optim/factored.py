"""Adafactor's pieces for parameters of any rank, stacked or not, which optax has for plain matrices only.

optax factors the two longest axes and takes root mean squares over the whole leaf; with scanned
layers and kernels of heads that is another algorithm than on the layers one by one. Here a `Role`
names rows, columns and stacked axes. Laws: on plain matrices equal to optax; stacked equals unstacked.
Source: Shazeer and Stern, 2018, algorithms 4 and 5.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lm.optim.roles import Role


class FactoredState(NamedTuple):
    """Second moments. A leaf is in `row` and `column`, or in `full`; elsewhere it is a MaskedNode.

    The factors keep the parameter's rank, with 1 in the axes averaged away, so that they shard like it.

    Attributes:
      count: i32[], updates made.
      row: mean over the columns.
      column: mean over the rows.
      full: what is too small, or no matrix.
    """

    count: Any
    row: Any
    column: Any
    full: Any


def _is_factored(shape: tuple[int, ...], role: Role, min_size: int) -> bool:
    if role.kind == "vector":
        return False
    return min(math.prod(shape[i] for i in side) for side in (role.rows, role.columns)) >= min_size


def scale_by_factored_rms(roles: Any, decay_rate: float, epsilon: float, min_size: int) -> optax.GradientTransformation:
    """Divides by the root of a second moment that is kept as an outer product of row and column means.

    Args:
      roles: tree of `Role`, like the parameters.
      decay_rate: the moment's decay at update t (from 1) is 1 - t^-decay_rate.
      epsilon: added to the squared gradient.
      min_size: a matrix is factored if both its sides have at least this size.
    """

    def init(params: Any) -> FactoredState:
        def zeros(averaged: str, factored: bool) -> Any:
            def leaf(p: Any, role: Role) -> Any:
                if _is_factored(p.shape, role, min_size) != factored:
                    return optax.MaskedNode()
                away = getattr(role, averaged) if averaged else ()
                return jnp.zeros(tuple(1 if i in away else n for i, n in enumerate(p.shape)), p.dtype)

            return jax.tree.map(leaf, params, roles)

        count = jnp.zeros([], jnp.int32)
        return FactoredState(count, zeros("columns", True), zeros("rows", True), zeros("", False))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, FactoredState]:
        del params
        decay = 1.0 - (state.count + 1).astype(jnp.float32) ** -decay_rate

        def leaf(g: jax.Array, role: Role, row: Any, column: Any, full: Any) -> tuple[Any, Any, Any, Any]:
            square = jnp.square(g) + epsilon
            if not _is_factored(g.shape, role, min_size):
                full = decay * full + (1 - decay) * square
                return g * jax.lax.rsqrt(full), row, column, full
            row = decay * row + (1 - decay) * jnp.mean(square, role.columns, keepdims=True)
            column = decay * column + (1 - decay) * jnp.mean(square, role.rows, keepdims=True)
            # Two roots, not the root of a product: epsilon squared is no float32.
            relative = row / jnp.mean(row, role.rows, keepdims=True)
            return g * jax.lax.rsqrt(relative) * jax.lax.rsqrt(column), row, column, full

        leaves, structure = jax.tree.flatten(updates)
        trees = (roles, state.row, state.column, state.full)
        results = list(map(leaf, leaves, *(structure.flatten_up_to(tree) for tree in trees)))
        scaled, row, column, full = (structure.unflatten(part) for part in zip(*results, strict=True))
        return scaled, FactoredState(optax.safe_increment(state.count), row, column, full)

    return optax.GradientTransformation(init, update)


def _rms(x: jax.Array, role: Role) -> jax.Array:
    """Returns the root mean square of each stacked copy, with the rank of `x`."""
    return jnp.sqrt(jnp.mean(jnp.square(x), role.own, keepdims=True))


def clip_by_block_rms(roles: Any, threshold: float) -> optax.GradientTransformation:
    """Scales each copy of each update down to a root mean square of at most `threshold`."""

    def clip(updates: Any, params: Any) -> Any:
        del params
        return jax.tree.map(lambda u, role: u / jnp.maximum(1.0, _rms(u, role) / threshold), updates, roles)

    return optax.stateless(clip)


def scale_by_block_rms(roles: Any, min_scale: float) -> optax.GradientTransformation:
    """Multiplies each copy of each update by the root mean square of its parameter, at least `min_scale`."""

    def scale(updates: Any, params: Any) -> Any:
        return jax.tree.map(lambda u, role, p: u * jnp.maximum(_rms(p, role), min_scale), updates, roles, params)

    return optax.stateless(scale)
