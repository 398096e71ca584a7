"""Advances the state by one compiled step, now and then twice to see whether the hardware does the same again.

Owns the compiled train step. Knows no data and no log. Law: without `health.recompute_every` it is one program, called
once a step; with it, the steps that are computed twice are the same ones however often the run is started.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lm.batch import Batch
from lm.training.assembly import Assembly
from lm.training.state import TrainState
from lm.training.step import TrainMetrics, make_train_step

Result = tuple[TrainState, TrainMetrics]


class UnequalError(Exception):
    """Two computations of one step gave different bits; the message says where."""


def _bits(array: jax.Array) -> jax.Array:
    """Returns unsigned integers that are equal where the bits are, for a NaN too."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return array
    return jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}"))


def count_differences(one: Any, other: Any) -> Any:
    """Returns the tree of i32[], how many elements of each array differ in any bit."""
    return jax.tree.map(lambda a, b: jnp.sum(_bits(a) != _bits(b), dtype=jnp.int32), one, other)


class Advance:
    """The train step of a run, compiled when it is first called."""

    def __init__(self, assembly: Assembly) -> None:
        config = assembly.experiment
        step = make_train_step(config, assembly.model, assembly.optimizer, assembly.tokenizer.token_bytes)
        self._every = config.health.recompute_every
        self._step: Callable[[TrainState, Batch], Result] = jax.jit(step, donate_argnums=0)
        # Keeps its arguments, so that it can be called on them again.
        self._repeatable: Callable[[TrainState, Batch], Result] = jax.jit(step)
        self._count = jax.jit(count_differences)
        # Whether a step of each kind has been done: once, and twice to compare.
        self._done: set[bool] = set()

    def _is_repeated(self, number: int) -> bool:
        return self._every is not None and number % self._every == 0

    def compiles(self, number: int) -> bool:
        """Returns whether step `number` will be the first of its kind in this process, which has to be compiled."""
        return self._is_repeated(number) not in self._done

    def __call__(self, state: TrainState, batch: Batch, number: int) -> Result:
        """Returns the next state and the metrics of step `number`, from 1; the old state must not be used again.

        Raises:
          UnequalError: the step was computed twice and the results differ.
        """
        is_repeated = self._is_repeated(number)
        self._done.add(is_repeated)
        if not is_repeated:
            return self._step(state, batch)
        result, again = self._repeatable(state, batch), self._repeatable(state, batch)
        counts = jax.tree_util.tree_leaves_with_path(jax.device_get(self._count(result, again)))
        different = [(_name(path), int(count)) for path, count in counts if count]
        if different:
            name, count = different[0]
            raise UnequalError(
                f"step {number} was computed twice and differs in {len(different)} arrays, first in {name}, in "
                f"{count} elements"
            )
        return result


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/").partition("/")[2]
