"""Puts a run's parts together: mesh, tokenizer, model, optimizer, and where each array lives.

The train loop, evaluation and generation all start here, so that a trained run is rebuilt in one way.
Knows no loop. Law: two assemblies of one config describe the same arrays.
"""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from lm import parallel
from lm.batch import Batch
from lm.config import ConfigError
from lm.data import Bytes, load_tokenizer
from lm.experiment import Experiment, too_few_ids
from lm.optim import build_optimizer
from lm.parallel import processes
from lm.training.checkpoints import CheckpointError, restore_params
from lm.training.division import check_attention, check_memory, check_replicated, check_shards
from lm.training.division import check_batch_size as check_batch_size
from lm.training.division import row_shards as row_shards
from lm.training.state import TrainState, Tree, init_state, place, state_shardings
from lm.training.workdir import read_config

# (folder, model's config) -> parameters on the host; None if the folder is in no other project's format.
ImportParams = Callable[[str, Any], Tree | None]

# For a program that runs once: LLVM makes the same numbers in a quarter of the time.
QUICK = {"xla_backend_optimization_level": 1}


@dataclasses.dataclass(frozen=True)
class Assembly:
    """The parts of a run.

    Attributes:
      experiment: the resolved config.
      mesh: over all devices; abstract for what is only planned.
      rules: the sharding table.
      tokenizer: turns text to ids and back.
      model: pure functions init, apply, logits.
      optimizer: pure functions init, update.
      state: ShapeDtypeStructs of the train state, each with its sharding.
    """

    experiment: Experiment
    mesh: Mesh | AbstractMesh
    rules: parallel.Rules
    tokenizer: Any
    model: Any
    optimizer: optax.GradientTransformationExtraArgs
    state: TrainState

    @property
    def device_mesh(self) -> Mesh:
        """The mesh of a run, which has devices, as that of a plan has not."""
        assert isinstance(self.mesh, Mesh)
        return self.mesh

    @contextlib.contextmanager
    def placed(self) -> Iterator[None]:
        """Puts the mesh and the rules in force; everything that traces the model runs inside."""
        with parallel.use(self.mesh, self.rules):
            yield

    def place(self, batch: Batch) -> Batch:
        """Moves this process's rows to its devices; the result is the global batch."""
        num_blocks = self.row_block()[1]

        def to_devices(x: Any) -> jax.Array:
            axes = ("batch", "length")[: x.ndim]
            sharding = NamedSharding(self.mesh, parallel.spec(axes, self.rules.activations))
            return jax.make_array_from_process_local_data(sharding, x, (x.shape[0] * num_blocks, *x.shape[1:]))

        return jax.tree.map(to_devices, batch)

    def row_block(self) -> tuple[int, int]:
        """Returns which block of each batch's rows this process reads, and of how many; see `processes.row_block`."""
        return processes.row_block(self.device_mesh, self.rules)

    def init(self) -> TrainState:
        """Makes the first state of the run, each array on its devices from the start."""
        with self.placed():
            make = jax.jit(
                lambda seed: _first_state(self.experiment, self.model, self.optimizer, seed),
                out_shardings=jax.tree.map(lambda s: s.sharding, self.state),
                compiler_options=QUICK if parallel.platform_of(self.mesh) == "cpu" else None,
            )
            return make(np.asarray(self.experiment.seed, np.int32))


def set_up_jax(directory: str | None) -> None:
    """Tells jax how to run, before its devices are used: memory is kept, and programs too, in `directory` if any.

    Where the compilation cache cannot be written, says so and compiles every time.
    """
    parallel.keep_freed_memory()
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


def _first_state(experiment: Experiment, model: Any, optimizer: Any, seed: jax.Array) -> TrainState:
    return init_state(model, optimizer, seed, experiment.optimizer.average, experiment.health.spikes)


def first_params(assembly: Assembly, folder: str, import_params: ImportParams | None) -> Tree:
    """Returns the parameters of another run or, if they can be imported, of another project, on the devices.

    Raises:
      ConfigError: they are of another tokenizer or another model. CheckpointError: they cannot be read.
    """
    experiment, like = assembly.experiment, assembly.state.params
    params = None if import_params is None else import_params(folder, experiment.model)
    if params is not None:
        return place(params, like)
    check_tokenizer(pathlib.Path(folder), assembly.tokenizer)
    try:
        return restore_params(pathlib.Path(folder), like)[1]
    except CheckpointError as error:
        theirs, ours = (type(c.model).__name__ for c in (read_config(pathlib.Path(folder)), experiment))
        raise ConfigError(f"config.init_from: {folder} is a run of {theirs}, this is one of {ours}; {error}") from error


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
    check_memory(experiment.sharding, mesh)
    return describe(experiment, mesh, tokenizer)


def describe(experiment: Experiment, mesh: Mesh | AbstractMesh, tokenizer: Any = None) -> Assembly:
    """Builds the parts of a run for a mesh whose devices need not be here; allocates nothing.

    Args:
      experiment: the run.
      mesh: where it would live; what is only planned lives on an abstract one, or on a topology's.
      tokenizer: None for what is only planned.

    Raises:
      ConfigError: the mesh does not fit the model.
    """
    rules = experiment.sharding.rules()
    check_attention(experiment, mesh)
    model = experiment.model.build()
    with parallel.shapes_only():
        params = jax.eval_shape(model.init, jax.random.key(0))
        optimizer = build_optimizer(experiment.optimizer, experiment.num_steps, params, model.axes())
        shapes = jax.eval_shape(lambda seed: _first_state(experiment, model, optimizer, seed), jnp.zeros((), jnp.int32))
    check_shards(shapes.params, model.axes(), mesh, rules)
    check_replicated(shapes.params, model.axes(), mesh, experiment.sharding)
    shardings = state_shardings(model, shapes, mesh, rules)
    state = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings)
    return Assembly(experiment, mesh, rules, tokenizer, model, optimizer, state)


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
    path = pathlib.Path(os.path.expanduser(workdir))
    if experiment is None:
        experiment = dataclasses.replace(read_config(path), mesh=parallel.MeshConfig(data=1, fsdp=-1))
    set_up_jax(experiment.compilation_cache)
    tokenizer = load_tokenizer(experiment.data.tokenizer, None, path / "tokenizer")
    assembly = assemble(experiment, tokenizer)
    step, params = restore_params(path, assembly.state.params, step)
    return Run(assembly, params, step, path)
