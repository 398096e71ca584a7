"""Puts a run's parts together: mesh, tokenizer, model, optimizer, and where each array lives.

The train loop, evaluation and generation all start here, so that a trained run is rebuilt in one way.
Knows no loop. Law: two assemblies of one config describe the same arrays.
"""

import contextlib
import dataclasses
import math
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import logging
from jax.sharding import Mesh, NamedSharding

from lm import parallel
from lm.batch import Batch
from lm.config import ConfigError
from lm.data import Bytes, load_tokenizer
from lm.experiment import Experiment, too_few_ids
from lm.optim import build_optimizer
from lm.training.checkpoints import restore_params
from lm.training.state import TrainState, Tree, init_state, state_shardings
from lm.training.workdir import read_config

# For a program that runs once: LLVM makes the same numbers in a quarter of the time.
QUICK = {"xla_backend_optimization_level": 1}


@dataclasses.dataclass(frozen=True)
class Assembly:
    """The parts of a run.

    Attributes:
      experiment: the resolved config.
      mesh: over all devices.
      rules: the sharding table.
      tokenizer: turns text to ids and back.
      model: pure functions init, apply, logits.
      optimizer: pure functions init, update.
      state: ShapeDtypeStructs of the train state, each with its sharding.
    """

    experiment: Experiment
    mesh: Mesh
    rules: parallel.Rules
    tokenizer: Any
    model: Any
    optimizer: optax.GradientTransformation
    state: TrainState

    @contextlib.contextmanager
    def placed(self) -> Iterator[None]:
        """Puts the mesh and the rules in force; everything that traces the model runs inside."""
        with parallel.use(self.mesh, self.rules):
            yield

    def place(self, batch: Batch) -> Batch:
        """Moves this process's rows to its devices; the result is the global batch."""

        def to_devices(x: Any) -> jax.Array:
            axes = ("batch", "length")[: x.ndim]
            sharding = NamedSharding(self.mesh, parallel.spec(axes, self.rules.activations))
            return jax.make_array_from_process_local_data(sharding, x)

        return jax.tree.map(to_devices, batch)

    def init(self) -> TrainState:
        """Makes the first state of the run, each array on its devices from the start."""
        with self.placed():
            make = jax.jit(
                lambda seed: init_state(self.model, self.optimizer, seed, self.experiment.optimizer.average),
                out_shardings=jax.tree.map(lambda s: s.sharding, self.state),
                compiler_options=QUICK if self.mesh.devices.flat[0].platform == "cpu" else None,
            )
            return make(jnp.asarray(self.experiment.seed, jnp.int32))


def use_compilation_cache(directory: str | None) -> None:
    """Turns on jax's persistent compilation cache; where it cannot be written, says so and compiles every time."""
    if directory is None:
        return
    path = os.path.expanduser(directory)
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        logging.warning("compilation_cache: cannot write to %s (%s); every start compiles anew", path, error.strerror)
        return
    jax.config.update("jax_compilation_cache_dir", path)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def check_vocabulary(experiment: Experiment, tokenizer: Any) -> None:
    """Compares what the tokenizer has with what the model and the objective need.

    Raises:
      ConfigError: more ids than the model has, or special tokens that the objective lacks.
    """
    found = experiment.objective_problems(tokenizer.specials)
    if tokenizer.size > experiment.model.vocab_size:
        found.append(too_few_ids(experiment.model.vocab_size, tokenizer.size))
    if found:
        raise ConfigError("\n".join(f"config.{line}" for line in found))


def check_tokenizer(workdir: pathlib.Path, tokenizer: Any) -> None:
    """Checks that the ids of a run whose weights are taken over mean what they will mean now.

    Raises:
      ConfigError: its tokenizer is another one.
    """
    folder = workdir / "tokenizer"
    if folder.is_dir() and load_tokenizer(Bytes(), None, folder).fingerprint != tokenizer.fingerprint:
        raise ConfigError(
            f"config.init_from: the weights of {workdir} were trained with another tokenizer; use "
            f"--config.data.tokenizer=Saved --config.data.tokenizer.directory={folder}"
        )


def assemble(experiment: Experiment, tokenizer: Any) -> Assembly:
    """Builds the parts of a run; allocates nothing on the devices.

    Raises:
      ConfigError: the mesh does not fit the devices or the model, or the tokenizer does not fit the model.
    """
    check_vocabulary(experiment, tokenizer)
    try:
        mesh = parallel.build_mesh(experiment.mesh)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    rules = parallel.DEFAULT_RULES
    model = experiment.model.build()
    with parallel.shapes_only():
        params = jax.eval_shape(model.init, jax.random.key(0))
        optimizer = build_optimizer(experiment.optimizer, experiment.num_steps, params, model.axes())
        shapes = jax.eval_shape(
            lambda seed: init_state(model, optimizer, seed, experiment.optimizer.average), jnp.zeros((), jnp.int32)
        )
    check_shards(shapes.params, model.axes(), mesh, rules)
    shardings = state_shardings(model, shapes, mesh, rules)
    state = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings)
    return Assembly(experiment, mesh, rules, tokenizer, model, optimizer, state)


def check_shards(params: Tree, axes: Tree, mesh: Mesh, rules: parallel.Rules) -> None:
    """Checks that the mesh divides each axis of the parameters that it shards.

    Raises:
      ConfigError: with one line for each pair of mesh axes and size that does not fit.
    """
    found = {}

    def check(path: tuple[Any, ...], array: Any, names: tuple[str | None, ...]) -> None:
        for size, name, entry in zip(array.shape, names, parallel.spec(names, rules.parameters), strict=True):
            # A PartitionSpec unpacks tuples of one.
            carriers = (entry,) if isinstance(entry, str) else entry or ()
            shards = math.prod(mesh.shape[axis] for axis in carriers)
            if size % shards:
                where = "/".join(str(entry.key) for entry in path)
                fields = ", ".join(f"mesh.{axis} {mesh.shape[axis]}" for axis in carriers)
                found.setdefault(
                    (name, size),
                    f"config.{fields} does not divide the {size} {name} of {where}: choose a divisor of {size}",
                )

    jax.tree_util.tree_map_with_path(check, params, axes)
    if found:
        raise ConfigError("\n".join(found.values()))


def row_shards(mesh: Mesh) -> int:
    """Returns over how many devices the rows of a batch are divided."""
    return mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["expert"]


def check_batch_size(experiment: Experiment, mesh: Mesh) -> None:
    """Checks that each microbatch divides over the devices that read different rows.

    Raises:
      ConfigError: it does not.
    """
    shards = row_shards(mesh)
    pieces = experiment.num_microbatches
    if experiment.batch_size // pieces % shards:
        raise ConfigError(
            f"config.batch_size {experiment.batch_size} in {pieces} microbatches does not divide over "
            f"data x fsdp x expert = {shards} devices; make it a multiple of {shards * pieces}"
        )


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained run, ready to be used.

    Attributes:
      assembly: its parts.
      params: its parameters; the averaged ones if it keeps an average.
      step: number of updates done.
      workdir: where it lies.
    """

    assembly: Assembly
    params: Tree
    step: int
    workdir: pathlib.Path

    @property
    def experiment(self) -> Experiment:
        """The resolved config."""
        return self.assembly.experiment

    @property
    def tokenizer(self) -> Any:
        """The tokenizer stored with the run."""
        return self.assembly.tokenizer

    @property
    def model(self) -> Any:
        """The model's pure functions."""
        return self.assembly.model


def load_run(workdir: str, step: int | None = None, experiment: Experiment | None = None) -> Run:
    """Loads a run from its folder: config, tokenizer and parameters.

    Args:
      workdir: of the run.
      step: which checkpoint; None is the newest that can be read.
      experiment: a config to use instead of the saved one (same model), for instance another mesh; None spreads
        the parameters over whatever devices are here, which need not be those of the training.

    Raises:
      ConfigError: not the folder of a run. CheckpointError: no checkpoint that fits.
    """
    path = pathlib.Path(workdir).expanduser()
    if experiment is None:
        experiment = dataclasses.replace(read_config(path), mesh=parallel.MeshConfig(data=1, fsdp=-1))
    use_compilation_cache(experiment.compilation_cache)
    tokenizer = load_tokenizer(experiment.data.tokenizer, None, path / "tokenizer")
    assembly = assemble(experiment, tokenizer)
    step, params = restore_params(path, assembly.state.params, step)
    return Run(assembly, params, step, path)
