"""The state of a run on the devices: step, parameters, optimizer state, parameter average, key.

Knows no objective and no loop. Law: the state and the batches that follow determine everything; two
runs with equal state and batches stay equal bit for bit.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from lm import parallel
from lm.optim import Bounds, state_axes

# Memory of the host from which devices read by themselves, as jax calls it.
HOST_MEMORY = "pinned_host"

Tree = Any  # a nested dict of arrays, of shapes, of axes or of shardings


class TrainState(NamedTuple):
    """What a train step reads and returns; also the tree of its shapes, and of its shardings.

    Attributes:
      step: i32[], number of updates done.
      params: the model's parameters, float32.
      opt_state: the optimizer's state.
      average: exponential moving average of the parameters, or None.
      key: typed PRNG key of the run; folded with the step, never split.
      spikes: running figures by which spikes are told (`lm.optim.spikes.SpikeState`), or None.
    """

    step: Any
    params: Tree
    opt_state: Tree
    average: Tree
    key: Any
    spikes: Any = None


def init_state(
    model: Any, optimizer: optax.GradientTransformation, seed: jax.Array, average: Any, spikes: Bounds | None = None
) -> TrainState:
    """Makes the state before the first update; a pure function, to be jitted with `state_shardings`.

    Args:
      model: a built model.
      optimizer: a built optimizer.
      seed: i32[], the run's seed.
      average: the `lm.optim.Average` to keep, or None.
      spikes: what tells a spike, or None.
    """
    key = jax.random.key(seed)
    params = model.init(jax.random.fold_in(key, 0))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        average=None if average is None else average.init(params),
        key=jax.random.fold_in(key, 1),
        spikes=None if spikes is None else spikes.init(),
    )


def shardings_of(arrays: Tree, axes: Tree, mesh: Mesh | AbstractMesh, table: Mapping[str, tuple[str, ...]]) -> Tree:
    """Returns a NamedSharding for each leaf of `arrays` from its tuple of logical axis names in `axes`."""
    # Walk the arrays first: axes are tuples, and so are the containers of an optimizer's state.
    return jax.tree.map(lambda _, names: NamedSharding(mesh, parallel.spec(names, table)), arrays, axes)


def state_shardings(model: Any, shapes: TrainState, mesh: Mesh | AbstractMesh, rules: parallel.Rules) -> TrainState:
    """Returns the NamedSharding of every leaf of the state, optimizer state and average by rows of their own.

    Args:
      model: gives the logical axes of its parameters.
      shapes: the state's shapes, from `jax.eval_shape` of `init_state`.
      mesh: where the state will live.
      rules: the sharding table.
    """
    axes = model.axes()
    whole = NamedSharding(mesh, PartitionSpec())
    params = shardings_of(shapes.params, axes, mesh, rules.parameters)
    opt_axes = state_axes(shapes.opt_state, shapes.params, axes)
    opt_state = shardings_of(shapes.opt_state, opt_axes, mesh, rules.state)
    if rules.optimizer_on_host:
        # Numbers alone, such as the count, stay: they are no burden.
        opt_state = jax.tree.map(
            lambda leaf, s: s.with_memory_kind(HOST_MEMORY) if leaf.ndim else s, shapes.opt_state, opt_state
        )
    return TrainState(
        step=whole,
        params=params,
        opt_state=opt_state,
        average=None if shapes.average is None else shardings_of(shapes.params, axes, mesh, rules.state),
        key=whole,
        spikes=jax.tree.map(lambda _: whole, shapes.spikes),
    )


def keep_in_place(model: Any, state: TrainState) -> TrainState:
    """Returns the state, told to the compiler to lie where `state_shardings` says; called while tracing a step.

    Without it, parameters that are whole would come out divided as the optimizer's state is.
    """
    mesh, rules = parallel.current()
    if parallel.is_divided():
        here = dataclasses.replace(rules, optimizer_on_host=False)
        state = jax.lax.with_sharding_constraint(state, state_shardings(model, state, mesh, here))
    return state._replace(opt_state=_move(state.opt_state, rules, jax.memory.Space.Host))


def fetch(opt_state: Tree) -> Tree:
    """Returns an optimizer's state in the memory of the devices; called while tracing a step, before the update."""
    return _move(opt_state, parallel.current()[1], jax.memory.Space.Device)


def _move(opt_state: Tree, rules: parallel.Rules, to: Any) -> Tree:
    if not rules.optimizer_on_host:
        return opt_state
    return jax.tree.map(lambda leaf: jax.device_put(leaf, to) if leaf.ndim else leaf, opt_state)


def divide_gradients(model: Any, grads: Tree) -> Tree:
    """Returns gradients of the parameters, told to the compiler to lie as the optimizer's state does."""
    if not parallel.is_divided():
        return grads
    mesh, rules = parallel.current()
    return jax.lax.with_sharding_constraint(grads, shardings_of(grads, model.axes(), mesh, rules.state))


def place(arrays: Tree, like: Tree) -> Tree:
    """Moves arrays of the host to the devices; every process has all of them and keeps its own shards.

    Args:
      arrays: NumPy arrays.
      like: the same tree of ShapeDtypeStructs with shardings.
    """

    def put(array: Any, target: jax.ShapeDtypeStruct) -> jax.Array:
        assert target.sharding is not None
        return jax.make_array_from_callback(target.shape, target.sharding, lambda index: array[index])

    return jax.tree.map(put, arrays, like)
