"""Parameters laid out for decoding: every layer apart, in the dtype and order of axes that products read.

Knows no token and no text. Law: the arranged model makes the same logits from the arranged parameters;
what changes is how many bytes a token moves.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lm.models import path_name
from lm.models.layers import SUMMED_LAST, Parameter
from lm.models.transformer import Transformer


def arrange(model: Any, params: Any) -> tuple[Any, Any]:
    """Returns a model with the same logits, and its parameters, in the form that decodes fastest on this platform.

    On a CPU, layers that are stacked in one array are taken apart. A loop over a stack copies each layer's weights
    and its whole cache for every token, since what it reads and writes are slices. Kernels get the axes that are
    summed over last: few rows are multiplied up to twice as fast so. Weights take their room twice
    while the caller keeps the first form. Elsewhere both are returned as they are: a stack compiles sooner, and
    weights must not be there twice.

    Args:
      model: an `lm.models.Model`.
      params: its parameters.
    """
    if jax.default_backend() != "cpu" or model.config.share_layers:
        return model, params
    return take_apart(model, params)


def take_apart(model: Any, params: Any) -> tuple[Any, Any]:
    """Returns the model whose pattern is all its layers, repeated once, and the parameters in its layout.

    Weights of products are rounded to the compute dtype, as each product would.
    """
    old: Transformer = model.config
    depth = max(old.encoder_depth, old.decoder_depth)
    layers = [layer for _, group, repeats in old.runs(depth) for _ in range(repeats) for layer in group]
    new = dataclasses.replace(old, first_layers=(), layers=tuple(layers))
    described = {
        path_name(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            model.parameters(), is_leaf=lambda leaf: isinstance(leaf, Parameter)
        )
    }

    def lay_out(path: str, folder: Any) -> Any:
        found = {}
        for name, leaf in folder.items():
            if isinstance(leaf, dict):
                found[name] = lay_out(f"{path}{name}/", leaf)
            else:
                new_name, leaf = _lay_out(path + name, described[path + name], leaf, old.compute_dtype)
                found[new_name] = leaf
        return found

    @jax.jit
    def convert(params: Any) -> Any:
        params = lay_out("", params)
        towers = {"encoder": old.encoder_depth, "decoder": old.decoder_depth}
        return params | {name: _tower(params[name], old, new, depth) for name, depth in towers.items() if depth}

    return new.build(), convert(params)


def _lay_out(path: str, parameter: Parameter, leaf: jax.Array, dtype: jnp.dtype) -> tuple[str, jax.Array]:
    """Returns a parameter's new name and value."""
    name = path.rpartition("/")[2]
    if path == "tokens/embedding":
        return name, leaf.astype(dtype)
    # Routing is computed in float32 from unrounded weights; experts' products have forms of their own.
    apart = "/router/" in path or "/shared_gate/" in path or "experts" in parameter.axes
    first = int(parameter.axes[:1] == ("layers",))
    last = first + len(parameter.input_axes)
    if apart or name != "kernel" or parameter.axes[first:last] != parameter.input_axes:
        return name, leaf
    order = (*range(first), *range(last, leaf.ndim), *range(first, last))
    return SUMMED_LAST, jnp.transpose(leaf.astype(dtype), order)


def _tower(tower: Any, old: Transformer, new: Transformer, depth: int) -> Any:
    stack: dict[str, Any] = {name: part for name, part in tower["stack"].items() if name == "relative_bias"}
    for (run, block, repeat), (to, place, _) in zip(old.layer_places(depth), new.layer_places(depth), strict=True):
        one = jax.tree.map(lambda x, repeat=repeat: x[repeat : repeat + 1], tower["stack"][run][block])
        stack.setdefault(to, {})[place] = one
    return tower | {"stack": stack}
