"""Where optimizer state lives: each leaf of it gets the logical axes of the parameter that it belongs to.

Knows no rule by name: a leaf of state belongs to the parameter whose path ends its own path. Law: a
leaf with a parameter's shape has that parameter's axes; nothing the size of a parameter is replicated.
"""

from typing import Any

import jax


def state_axes(state: Any, params: Any, axes: Any) -> Any:
    """Returns the tree of `state` with a tuple of logical names, or None, at each leaf.

    State holds tuples of its own, so walk the two together with the state first:
    `jax.tree.map(lambda leaf, names: ..., state, state_axes(...))`.

    Args:
      state: optimizer state, as arrays or shapes (`jax.eval_shape(optimizer.init, params)`).
      params: the parameters, as arrays or shapes.
      axes: a tuple of logical names for each parameter.

    Raises:
      ValueError: a leaf belongs to a parameter, but the size of one of its axes does not divide the parameter's.
    """
    names = {}
    for (path, leaf), axis_names in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.structure(params).flatten_up_to(axes), strict=True
    ):
        names[path] = (leaf.shape, axis_names)

    def axes_of(path: tuple, leaf: Any) -> tuple[str | None, ...]:
        # The longest matching end is the right one: params may hold both a/b and b.
        owner = next((names[path[i:]] for i in range(len(path)) if path[i:] in names), None)
        if owner is None or not leaf.shape:
            return (None,) * len(leaf.shape)
        shape, axis_names = owner
        fits = len(shape) == len(leaf.shape) and all(n and m % n == 0 for n, m in zip(leaf.shape, shape, strict=True))
        if not fits:
            where = jax.tree_util.keystr(path)
            raise ValueError(f"optimizer state {where} has shape {leaf.shape}, its parameter has {shape}")
        return tuple(a if n == m else None for a, n, m in zip(axis_names, leaf.shape, shape, strict=True))

    return jax.tree_util.tree_map_with_path(axes_of, state)
