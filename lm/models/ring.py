"""Ring attention of one device: keys and values travel around the devices, forward and once more backward.

Owns the turns and their gradient, written by hand so that only a device's own queries, keys, values and result and a
number for each query are kept: derived, it would keep every stretch that came by, and the softmax before each. Knows
no mesh but that there is a ring, and no formula of a score. Law: the gradient is that of attention on one device.
"""

import functools
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from lm.models.attention import Chunked, Layout, Partial, Plain, Scoring, Side, group
from lm.parallel import shift, vary_like

Tree = TypeVar("Tree")


class Ways(NamedTuple):
    """What is the same for all arrays.

    Attributes:
      kernel: how the keys of one device are read.
      pieces: into how many equal parts queries and keys are cut, whose pairs are hidden or read.
      width: channels of keys; the values come after them.
      causal: of the layout.
      window: of the layout.
    """

    kernel: Plain | Chunked
    pieces: int
    width: int
    causal: bool
    window: int | None

    def layout(self, queries: jax.Array, keys: jax.Array) -> Layout:
        """Returns who may read whom of two packed sides."""
        return Layout(unpack(queries), unpack(keys), self.causal, self.window)

    def cut(self, x: jax.Array, axis: int) -> list[jax.Array]:
        """Returns the parts."""
        return jnp.split(x, self.pieces, axis=axis)

    def extend(
        self, partial: Partial, q_BTKGH: jax.Array, kv_BSKH: jax.Array, layout: Layout, scoring: Scoring
    ) -> Partial:
        """Adds keys to a softmax."""
        k_BSKH, v_BSKH = kv_BSKH[..., : self.width], kv_BSKH[..., self.width :]
        return self.kernel.extend(partial, q_BTKGH, k_BSKH, v_BSKH, layout, scoring)


def pack(side: Side) -> jax.Array:
    """Returns i32[4, B, T], a side as one array, which costs one message."""
    slots_BT = jnp.broadcast_to(side.slots[None, :], side.positions.shape)
    return jnp.stack([side.segment_ids, side.positions, side.bidirectional.astype(jnp.int32), slots_BT])


def unpack(packed: jax.Array) -> Side:
    """Undoes `pack`."""
    return Side(packed[0], packed[1], packed[2] != 0, packed[3, 0])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def travel(
    ways: Ways, q_BTKGH: jax.Array, kv_BSKH: jax.Array, queries: jax.Array, keys: jax.Array, scoring: Scoring
) -> jax.Array:
    """Returns [B, T, N, H of values] in the dtype of the queries; for use in `by_shards`.

    Args:
      ways: what is the same for all arrays.
      q_BTKGH: this device's queries, by the key head that they read.
      kv_BSKH: its keys with values.
      queries: i32[4, B, T], where the queries stand (`pack`).
      keys: i32[4, B, S], where the keys stand.
      scoring: how scores are made; drops nothing.
    """
    return _forward(ways, q_BTKGH, kv_BSKH, queries, keys, scoring)[0]


def _forward(
    ways: Ways, q_BTKGH: jax.Array, kv_BSKH: jax.Array, queries: jax.Array, keys: jax.Array, scoring: Scoring
) -> tuple[jax.Array, Any]:
    asked = list(zip(ways.cut(q_BTKGH, 1), ways.cut(queries, 2), strict=True))

    def read(partials: list[Partial], kv_BSKH: jax.Array, keys: jax.Array) -> list[Partial]:
        results = []
        for partial, (q_BTKGH, queries) in zip(partials, asked, strict=True):
            for block_BSKH, part in zip(ways.cut(kv_BSKH, 1), ways.cut(keys, 2), strict=True):
                layout = ways.layout(queries, part)
                partial = jax.lax.cond(
                    jnp.any(layout.allowed()),
                    ways.extend,
                    lambda partial, *_: partial,
                    partial,
                    q_BTKGH,
                    block_BSKH,
                    layout,
                    scoring,
                )
            results.append(partial)
        return results

    def turn(carry: Any, _: None) -> tuple[Any, None]:
        partials, kv_BSKH, keys = carry
        kv_BSKH, keys = shift((kv_BSKH, keys))
        return (read(partials, kv_BSKH, keys), kv_BSKH, keys), None

    partials = [Partial.start(q_BTKGH, kv_BSKH.shape[-1] - ways.width, scoring) for q_BTKGH, _ in asked]
    carry = (read(partials, kv_BSKH, keys), kv_BSKH, keys)
    (partials, _, _), _ = jax.lax.scan(turn, carry, length=jax.lax.axis_size("context") - 1)
    out_BTNH = jnp.concatenate([partial.finish(q_BTKGH.dtype) for partial in partials], axis=1)
    normalizer_BKGT = jnp.concatenate([partial.normalizer() for partial in partials], axis=-1)
    return out_BTNH, (q_BTKGH, kv_BSKH, queries, keys, scoring, out_BTNH, normalizer_BKGT)


def _backward(ways: Ways, saved: Any, gradient_BTNH: jax.Array) -> tuple[Any, ...]:
    """Goes around once more; gradients of keys and values travel with them and end where they began.

    With the softmax's normalizer given, what a block adds is a function of the block alone: its part of the result and
    of the sum of the weights. The latter is always 1, so that its gradient is what remains of the normalizer's own:
    minus the product of the result with its gradient (Dao et al. 2022, appendix B.2).
    """
    q_BTKGH, kv_BSKH, queries, keys, scoring, out_BTNH, normalizer_BKGT = saved
    product_BTN = jnp.sum(gradient_BTNH.astype(jnp.float32) * out_BTNH.astype(jnp.float32), axis=-1)
    to_total_BKGT = -_by_key_head(product_BTN[..., None], kv_BSKH.shape[2])[..., 0]
    to_out_BKGTH = _by_key_head(gradient_BTNH.astype(jnp.float32), kv_BSKH.shape[2])
    asked = list(
        zip(
            ways.cut(q_BTKGH, 1),
            ways.cut(queries, 2),
            ways.cut(normalizer_BKGT, 3),
            ways.cut(to_total_BKGT, 3),
            ways.cut(to_out_BKGTH, 3),
            strict=True,
        )
    )

    def read(carry: Any, kv_BSKH: jax.Array, keys: jax.Array) -> Any:
        """Adds the gradients of the pairs of this device's queries and these keys."""
        # Gradients that travel are one array, which is one message.
        dq, dkv, dscoring = ways.cut(carry[0], 1), ways.cut(carry[1], 1), carry[2]
        for i, (q_BTKGH, queries, *rest) in enumerate(asked):
            for j, (kv_part_BSKH, part) in enumerate(zip(ways.cut(kv_BSKH, 1), ways.cut(keys, 2), strict=True)):
                found = _pair(ways, (q_BTKGH, kv_part_BSKH, scoring), ways.layout(queries, part), *rest)
                dq[i], dkv[j], dscoring = _add((dq[i], dkv[j], dscoring), found)
        return jnp.concatenate(dq, axis=1), jnp.concatenate(dkv, axis=1), dscoring

    def turn(carry: Any, _: None) -> tuple[Any, None]:
        (dq, dkv, dscoring), kv_BSKH, keys = carry
        dkv, kv_BSKH, keys = shift((dkv, kv_BSKH, keys))
        return (read((dq, dkv, dscoring), kv_BSKH, keys), kv_BSKH, keys), None

    dscoring = _add(_zeros(scoring), _sinks_gradient(q_BTKGH, normalizer_BKGT, to_total_BKGT, scoring))
    sums = read((*_zeros((q_BTKGH, kv_BSKH), jnp.float32), dscoring), kv_BSKH, keys)
    (sums, _, _), _ = jax.lax.scan(turn, (sums, kv_BSKH, keys), length=jax.lax.axis_size("context") - 1)
    dq_BTKGH, dkv_BSKH, dscoring = sums
    return dq_BTKGH.astype(q_BTKGH.dtype), shift(dkv_BSKH).astype(kv_BSKH.dtype), None, None, dscoring


def _pair(
    ways: Ways,
    inputs: tuple[jax.Array, jax.Array, Scoring],
    layout: Layout,
    normalizer_BKGT: jax.Array,
    to_total_BKGT: jax.Array,
    to_out_BKGTH: jax.Array,
) -> tuple[jax.Array, jax.Array, Scoring]:
    """Returns the gradients of queries, keys with values, and scoring of one pair of blocks; zeros if it is hidden."""

    def block(q_BTKGH: jax.Array, kv_BSKH: jax.Array, scoring: Scoring) -> tuple[jax.Array, jax.Array]:
        empty = Partial(normalizer_BKGT, *_zeros((to_total_BKGT, to_out_BKGTH)))
        partial = ways.extend(empty, q_BTKGH, kv_BSKH, layout, scoring)
        return partial.total_BKGT, partial.out_BKGTH

    def differentiate() -> Any:
        return jax.vjp(block, *inputs)[1]((to_total_BKGT, to_out_BKGTH))

    return jax.lax.cond(jnp.any(layout.allowed()), differentiate, lambda: _zeros(inputs))


def _sinks_gradient(
    q_BTKGH: jax.Array, normalizer_BKGT: jax.Array, to_total_BKGT: jax.Array, scoring: Scoring
) -> Scoring:
    """Returns the gradient of the scores that read nothing, which take part in each softmax once."""

    def sunk(scoring: Scoring) -> jax.Array:
        return jnp.exp(scoring.sinks_as(q_BTKGH) - normalizer_BKGT)

    return jax.vjp(sunk, scoring)[1](to_total_BKGT)[0]


def _by_key_head(x_BTNH: jax.Array, num_kv_heads: int) -> jax.Array:
    """Returns [B, K, G, T, H]."""
    return jnp.transpose(group(x_BTNH, num_kv_heads), (0, 2, 3, 1, 4))


def _zeros(tree: Tree, dtype: Any = None) -> Tree:
    """Returns zeros that differ between the devices between which the arrays do, as jax sees it."""
    return jax.tree.map(lambda x: vary_like(jnp.zeros(x.shape, dtype or x.dtype), x), tree)


def _add(sums: Tree, terms: Tree) -> Tree:
    return jax.tree.map(lambda total, x: total + x.astype(total.dtype), sums, terms)


travel.defvjp(_forward, _backward)
