"""The train step of a run as an abstract program: on a mesh without devices, or on devices that are not here.

Owns the shapes of a batch. Knows no hardware. Law: what is traced, lowered and compiled here is the step that
`lm.train` runs, with the same shardings.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from lm import parallel
from lm.batch import DTYPES, ENCODER_FIELDS, Batch
from lm.config import ConfigError
from lm.experiment import Experiment
from lm.scaling import program
from lm.scaling.cost import Cost
from lm.scaling.spread import Spec
from lm.training.assembly import Assembly, check_batch_size, describe
from lm.training.state import HOST_MEMORY, shardings_of
from lm.training.step import make_train_step

ALWAYS = ("inputs", "targets", "weights", "segment_ids", "positions", "bidirectional")


@dataclasses.dataclass(frozen=True)
class Step:
    """A train step, described.

    Attributes:
      assembly: the run's parts; its state has shapes and shardings only.
      batch: shapes and shardings of what a step reads.
    """

    assembly: Assembly
    batch: Batch

    @property
    def function(self) -> Any:
        """The pure step; the bytes of its tokens are not known, and their number alone matters."""
        experiment = self.assembly.experiment
        sizes = np.zeros(experiment.model.vocab_size, np.int32)
        return make_train_step(experiment, self.assembly.model, self.assembly.optimizer, sizes)

    @property
    def gradients(self) -> Any:
        """Shapes and shardings of the gradients, which lie as the optimizer's state does."""
        assembly = self.assembly
        places = shardings_of(assembly.state.params, assembly.model.axes(), assembly.mesh, assembly.rules.state)
        return jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            assembly.state.params,
            places,
        )

    def count(self, platform: str = "tpu") -> Cost:
        """Traces the step and counts what it costs one device of a platform, which need not be that of the mesh."""
        mesh = self.assembly.mesh
        # On a mesh whose devices say what they are, the form for that platform alone would be traced.
        anywhere = AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=mesh.axis_types)
        state, batch = jax.tree.map(
            lambda leaf: leaf.update(sharding=NamedSharding(anywhere, leaf.sharding.spec)),
            (self.assembly.state, self.batch),
        )
        with parallel.use(anywhere, self.assembly.rules):
            closed = jax.make_jaxpr(self.function)(state, batch)
        parameters: dict[tuple[int, ...], Spec] = {}
        leaves = jax.tree.leaves(self.gradients)
        for leaf in leaves:
            # Inside a loop over layers a gradient lacks their axis; what is one parameter's shape stays that one's.
            parameters.setdefault(leaf.shape[1:], spec_of(leaf)[1:])
        parameters |= {leaf.shape: spec_of(leaf) for leaf in leaves}
        arguments = [spec_of(leaf) for leaf in jax.tree.leaves((self.assembly.state, self.batch))]
        sizes = dict(self.assembly.mesh.shape)
        table = self.assembly.rules.parameters
        kept = tuple(dict.fromkeys(axis for name in ("vocab", "heads", "kv_heads", "mlp") for axis in table[name]))
        return program.count(closed, arguments, program.Setting(sizes, parameters, platform, kept))

    def lower(self, keep_unused: bool = False) -> Any:
        """Lowers the step for the devices of its mesh, the state donated, as the train loop runs it.

        Args:
          keep_unused: whether what the model does not read, such as flags of a batch, is an argument all the same.
        """
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.assembly.state)
        with self.assembly.placed():
            jitted = jax.jit(self.function, donate_argnums=0, out_shardings=(shardings, None), keep_unused=keep_unused)
            return jitted.lower(self.assembly.state, self.batch)


def spec_of(leaf: jax.ShapeDtypeStruct) -> Spec:
    """Returns which mesh axes divide each dimension."""
    assert isinstance(leaf.sharding, NamedSharding)
    entries = (*leaf.sharding.spec, *(None,) * (len(leaf.shape) - len(leaf.sharding.spec)))
    return tuple((entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in entries)


def local_bytes(tree: Any) -> int:
    """Returns the bytes of one device's shards of arrays."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def host_bytes(tree: Any) -> int:
    """Returns the bytes of one device's shards of those arrays that lie in its host's memory."""
    return local_bytes([leaf for leaf in jax.tree.leaves(tree) if leaf.sharding.memory_kind == HOST_MEMORY])


def describe_batch(experiment: Experiment, assembly: Assembly) -> Batch:
    """Returns shapes and shardings of the batches that the run will read."""
    lengths, traits = experiment.data.lengths, experiment.objective.traits
    names = [*ALWAYS, *sorted(traits.fields.difference(ALWAYS))]
    if lengths.encoder is not None:
        names += ENCODER_FIELDS
    if traits.component_names:
        names.append("components")
    sharding = NamedSharding(assembly.mesh, parallel.spec(("batch", "length"), assembly.rules.activations))
    arrays = {}
    for name in dict.fromkeys(names):
        length = lengths.encoder or 0 if name in ENCODER_FIELDS else lengths.tokens
        arrays[name] = jax.ShapeDtypeStruct((experiment.batch_size, length), DTYPES[name], sharding=sharding)
    return Batch(**arrays)


def describe_step(experiment: Experiment, mesh: Mesh | AbstractMesh) -> Step:
    """Describes the train step of a run on a mesh; allocates nothing and needs no device.

    Raises:
      ConfigError: the mesh does not fit the model or the batch.
    """
    assembly = describe(experiment, mesh)
    check_batch_size(experiment, assembly.mesh)
    return Step(assembly, describe_batch(experiment, assembly))


def abstract_mesh(config: parallel.MeshConfig, num_devices: int) -> AbstractMesh:
    """Returns the mesh of a config over a number of devices that need not exist.

    Raises:
      ConfigError: the sizes do not multiply to that number.
    """
    try:
        sizes = config.sizes(num_devices)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return AbstractMesh(sizes, parallel.MESH_AXES, axis_types=(AxisType.Auto,) * len(sizes))
