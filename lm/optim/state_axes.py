"""Where optimizer state lives: each leaf of it gets the logical axes of the parameter that it belongs to.

Knows no rule by name: a leaf of state belongs to the parameter whose path ends its own path. Law: a leaf with a
parameter's shape has that parameter's axes; nothing the size of a parameter is replicated. An axis is whole only where
it has size one, or counts the blocks of a field that says so (`lm.optim.quantized.BLOCK_FIELDS`).
"""

from typing import Any

import jax

from lm.optim.quantized import BLOCK_FIELDS


def state_axes(state: Any, params: Any, axes: Any) -> Any:
    """Returns the tree of `state` with a tuple of logical names, or None, at each leaf.

    State holds tuples of its own, so walk the two together with the state first:
    `jax.tree.map(lambda leaf, names: ..., state, state_axes(...))`.

    Args:
      state: optimizer state, as arrays or shapes (`jax.eval_shape(optimizer.init, params)`).
      params: the parameters, as arrays or shapes.
      axes: a tuple of logical names for each parameter.

    Raises:
      ValueError: a leaf belongs to a parameter, but the size of one of its axes is neither one nor the parameter's,
        nor, on the last axis of a field of blocks, a divisor of it.
    """
    names = {}
    for (path, leaf), axis_names in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.structure(params).flatten_up_to(axes), strict=True
    ):
        names[path] = (leaf.shape, axis_names)

    def axes_of(path: tuple, leaf: Any) -> tuple[str | None, ...]:
        # The longest matching end is the right one: params may hold both a/b and b.
        start = next((i for i in range(len(path)) if path[i:] in names), None)
        if start is None or not leaf.shape:
            return (None,) * len(leaf.shape)
        shape, axis_names = names[path[start:]]
        in_blocks = any(isinstance(key, jax.tree_util.GetAttrKey) and key.name in BLOCK_FIELDS for key in path[:start])
        if not _fits(leaf.shape, shape, in_blocks):
            where = jax.tree_util.keystr(path)
            raise ValueError(f"optimizer state {where} has shape {leaf.shape}, its parameter has {shape}")
        return tuple(a if n == m else None for a, n, m in zip(axis_names, leaf.shape, shape, strict=True))

    return jax.tree_util.tree_map_with_path(axes_of, state)


def _fits(sizes: tuple[int, ...], shape: tuple[int, ...], in_blocks: bool) -> bool:
    """Returns whether state of these sizes can belong to a parameter of a shape; `in_blocks`, one for each block."""
    if len(sizes) != len(shape):
        return False
    known = [n in (1, m) for n, m in zip(sizes, shape, strict=True)]
    if in_blocks:
        known[-1] = sizes[-1] > 0 and shape[-1] % sizes[-1] == 0
    return all(known)
