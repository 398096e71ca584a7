"""Code of one device for a whole layer: `by_shards` with places told by the meaning of axes.

Within it nothing is placed by `constrain`, and weights are gathered by hand. Knows no model. Law: what
`by_device` computes is a function of the whole arrays; how they are cut changes nothing but rounding.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from lm.parallel.axes import current, inside, inside_device, spec
from lm.parallel.shards import by_shards


def carriers(entry: Any) -> tuple[str, ...]:
    """Returns the mesh axes of one entry of a PartitionSpec, which may be a name, names or None."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def activation_spec(shape: tuple[int, ...], *axes: str | None) -> PartitionSpec:
    """Returns where an activation lies, but that an axis stays whole where its mesh axes do not divide it.

    Args:
      shape: of the whole array.
      *axes: a logical name, or None, for each axis.
    """
    mesh, rules = current()
    entries = []
    for size, entry in zip(shape, spec(axes, rules.activations), strict=True):
        names = carriers(entry)
        while names and size % math.prod(mesh.shape[name] for name in names):
            names = names[:-1]
        entries.append(names or None)
    return PartitionSpec(*entries)


def by_device(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Returns `function`, written for one device with collectives, as a function of whole arrays.

    It is of one device of every mesh axis that code around it has not taken already (a pipeline's stages).

    Args:
      function: of the parts that `in_specs` says; `constrain` places nothing in it.
      in_specs: PartitionSpecs of the arguments.
      out_specs: PartitionSpecs of the result; along axes that they leave out, devices agree.
    """

    def alone(*arguments: Any) -> Any:
        with inside():
            return function(*arguments)

    return by_shards(alone, in_specs, out_specs, checked=False)


def own_part(x: jax.Array, *axes: str | None) -> jax.Array:
    """Returns this device's part of the last axes of `x`, inside `by_device`; all of `x` elsewhere.

    Args:
      x: the same on all devices.
      *axes: logical names of its last axes, cut as those of parameters are, such as "mlp".
    """
    if not inside_device():
        return x
    mesh, rules = current()
    for number, entry in enumerate(spec(axes, rules.parameters)):
        names, axis = carriers(entry), x.ndim - len(axes) + number
        size = x.shape[axis] // math.prod(mesh.shape[name] for name in names)
        if names:
            x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(names) * size, size, axis)
    return x


def gather_weight(weight: jax.Array, placed: PartitionSpec, keep: tuple[bool, ...]) -> jax.Array:
    """Gathers a parameter's part inside `by_device`, along all axes but those to keep.

    The gradient comes back by a reduce-scatter, each device having its part of it.

    Args:
      weight: this device's part.
      placed: where the parameter lies.
      keep: for each axis, whether it stays divided.
    """
    for axis, (entry, kept) in enumerate(zip(placed, keep, strict=True)):
        if carriers(entry) and not kept:
            weight = jax.lax.all_gather(weight, carriers(entry), axis=axis, tiled=True)
    return weight
