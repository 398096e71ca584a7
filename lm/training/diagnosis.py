"""Where numbers first go bad: a step's forward and backward pass again, module by module, in debug mode.

Owns the search, not the decision to search. Knows modules by their paths only. Law: it reads the state and changes
nothing; it runs the same functions as the step, out of the compiled program.
"""

import collections
import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp

from lm.batch import Batch
from lm.models.model import path_name
from lm.models.taps import tapped
from lm.training.assembly import Assembly
from lm.training.state import Tree
from lm.training.step import compute_sums, gradients


def _is_finite(array: Any) -> bool:
    return not jnp.issubdtype(array.dtype, jnp.floating) or bool(jnp.isfinite(array).all())


def first_bad_leaf(tree: Tree) -> str | None:
    """Returns the path of the first array with a number that is not finite; None if there is none."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not _is_finite(leaf):
            return path_name(path)
    return None


class _FirstBad:
    """Remembers the first module that returned a number that is not finite, and counts layers."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._done: collections.Counter[str] = collections.Counter()

    def __call__(self, path: str, is_done: bool, arrays: list[jax.Array]) -> None:
        if self.name is not None:
            return
        inside = re.match(r"(?P<stack>.*stack)/(?P<run>\w+)/block_\d+(?P<rest>.*)", path)
        if not all(_is_finite(array) for array in arrays):
            self.name = path if inside is None else f"{path} (layer {self._done[inside['stack']]})"
        elif is_done and inside is not None and not inside["rest"]:
            self._done[inside["stack"]] += 1
        elif is_done and path in self._done:
            # Another model of the pair, or of the towers, may have a stack of the same name.
            self._done[path] = 0


def find_first_bad(assembly: Assembly, params: Tree, batch: Batch, key: jax.Array) -> str:
    """Returns in words where the first number that is not finite arises in a step, or that there is none.

    Args:
      assembly: the parts of the run.
      params: before the step.
      batch: of the step, on the devices.
      key: of the step, for dropout.
    """
    bad = first_bad_leaf(params)
    if bad is not None:
        return f"the parameter {bad} was not finite before the step"
    config = assembly.experiment
    # Rematerialised layers are traced, and a tracer has no values to look at.
    kind = dataclasses.replace(config.model, remat="none")
    model, first = kind.build(), _FirstBad()
    with assembly.placed():
        with jax.disable_jit(), tapped(first):
            (tokens, losses, _), _ = compute_sums(model, params, batch, key, config.loss)
        if first.name is not None:
            return f"the first module with an activation that is not finite is {first.name}"
        bad = first_bad_leaf({"tokens": tokens.loss, **{name: pair.sum for name, pair in losses.items()}})
        if bad is not None:
            return f"every activation is finite, and the loss of {bad} is not"
        grads, _ = jax.jit(lambda p, b: gradients(model, p, b, key, config))(params, batch)
    bad = first_bad_leaf(grads)
    if bad is not None:
        return f"every activation and loss is finite, and the gradient of {bad} is not"
    return "every activation, loss and gradient is finite"
