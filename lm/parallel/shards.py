"""Code that is written for one device's shards: where it begins and ends, and what it sends along `context`.

Owns the use of `jax.shard_map` inside a model, and the collectives of the sequence: a ring, the deal that gives
each device as much causal work as any other, and the exchange of heads for positions. Knows no attention.
Laws: `undeal(deal(x)) == x`, `to_length(to_heads(x)) == x`, `n` times `shift` is the identity; gradients of
what all devices share are summed over them.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from lm.parallel.axes import current

CONTEXT = "context"

Tree = TypeVar("Tree")


def _varying(x: jax.Array) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying


def vary_like(x: jax.Array, other: jax.Array) -> jax.Array:
    """Marks `x` as differing between the devices between which `other` differs; the identity outside `by_shards`."""
    missing = tuple(sorted(_varying(other) - _varying(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def by_shards(function: Callable[..., Any], in_specs: Any, out_specs: Any, checked: bool = True) -> Callable[..., Any]:
    """Returns a function of whole arrays that runs `function` on each device's shards.

    Every mesh axis is in the hands of `function` (but those that an enclosing one already has), so that it may
    branch on its data: no collective is hidden in a branch. Devices along axes that `out_specs` does not name
    compute the same.

    Args:
      function: of shards to a shard, or a tree of them.
      in_specs: for each argument, a tree of PartitionSpecs like it.
      out_specs: of the result, a tree of PartitionSpecs like it; where `checked`, one.
      checked: whether jax follows which values differ between devices; not through a kernel that it does not see into,
        and never inside another such region, where a gradient does not survive it (jax 0.10.2).
    """
    mesh, _ = current()
    taken = frozenset(jax.sharding.get_abstract_mesh().manual_axes)
    checked = checked and not taken
    entries = out_specs if checked else ()
    named = {axis for entry in entries for axis in ((entry,) if isinstance(entry, str) else entry or ())}

    def vary(x: jax.Array) -> jax.Array:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return x
        missing = tuple(sorted((named - taken) - _varying(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.shard_map(
        lambda *shards: function(*jax.tree.map(vary, shards)) if checked else function(*shards),
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=frozenset(mesh.axis_names) - taken,
        check_vma=checked,
    )


def _send(tree: Tree, destination: Callable[[int], int]) -> Tree:
    size = jax.lax.axis_size(CONTEXT)
    return jax.lax.ppermute(tree, CONTEXT, [(device, destination(device)) for device in range(size)])


def shift(tree: Tree) -> Tree:
    """Passes each device's arrays to the next one around the ring; for use in `by_shards`."""
    size = jax.lax.axis_size(CONTEXT)
    return _send(tree, lambda device: (device + 1) % size)


def _owner(chunk: int, size: int) -> int:
    return chunk if chunk < size else 2 * size - 1 - chunk


def deal(x: jax.Array, axis: int) -> jax.Array:
    """Gives device i of n the chunks i and 2n - 1 - i of an axis of 2n chunks, where it held 2i and 2i + 1.

    Early positions read few keys under a causal mask and late ones many; such a pair reads as many as any other
    (zig-zag order). Of its two halves, each device sends one to another device and gets one: two permutations. The
    half with the even number comes first, whichever it is: who is where must be told by positions that are dealt too.

    Args:
      x: shard of an array; the axis has an even size.
      axis: that is sharded over `context`.
    """
    size = jax.lax.axis_size(CONTEXT)
    even, odd = jnp.split(x, 2, axis=axis)
    even = _send(even, lambda device: _owner(2 * device, size))
    odd = _send(odd, lambda device: _owner(2 * device + 1, size))
    return jnp.concatenate([even, odd], axis=axis)


def undeal(x: jax.Array, axis: int) -> jax.Array:
    """Undoes `deal`."""
    size = jax.lax.axis_size(CONTEXT)
    even, odd = jnp.split(x, 2, axis=axis)
    # Of the chunks i and 2n - 1 - i, exactly one is even.
    even = _send(even, lambda device: (device if device % 2 == 0 else 2 * size - 1 - device) // 2)
    odd = _send(odd, lambda device: (device if device % 2 == 1 else 2 * size - 1 - device) // 2)
    return jnp.concatenate([even, odd], axis=axis)


def to_heads(x: jax.Array) -> jax.Array:
    """Exchanges [B, T/n, N, H] for [B, T, N/n, H]: all positions of some heads (Ulysses, Jacobs et al. 2023)."""
    return jax.lax.all_to_all(x, CONTEXT, split_axis=2, concat_axis=1, tiled=True)


def to_length(x: jax.Array) -> jax.Array:
    """Undoes `to_heads`."""
    return jax.lax.all_to_all(x, CONTEXT, split_axis=1, concat_axis=2, tiled=True)


def gather_length(x: jax.Array, axis: int) -> jax.Array:
    """Returns all positions of an axis that is sharded over `context`."""
    return jax.lax.all_gather(x, CONTEXT, axis=axis, tiled=True)
