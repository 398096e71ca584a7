"""Whether a mesh suits a run: what its axes must divide, and what may not be whole on every device.

Knows no model by name. Law: what passes here is divided evenly; each error is one sentence that names
the field of the config and what it does not suit.
"""

import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from lm import parallel
from lm.config import ConfigError
from lm.experiment import Experiment
from lm.models.kernels import platform_problems
from lm.training.state import HOST_MEMORY, Tree


def check_shards(params: Tree, axes: Tree, mesh: Mesh | AbstractMesh, rules: parallel.Rules) -> None:
    """Checks that the mesh divides each axis of the parameters and of what belongs to them that it shards.

    Raises:
      ConfigError: with one line for each pair of mesh axes and size that does not fit.
    """
    stages, repeats = mesh.shape["stage"], rules.pipeline.repeats
    found = dict.fromkeys(rules.pipeline.problems(stages) if stages > 1 else [], None)

    def check(path: tuple[Any, ...], array: Any, names: tuple[str | None, ...]) -> None:
        where = "/".join(str(entry.key) for entry in path)
        for table in (rules.parameters, rules.state):
            for size, name, entry in zip(array.shape, names, parallel.spec(names, table), strict=True):
                carriers = parallel.carriers(entry)
                shards = math.prod(mesh.shape[axis] for axis in carriers)
                if name == "layers" and stages > 1 and size % (stages * repeats):
                    found.setdefault(parallel.uneven(size, stages, repeats) + f" (of {where.rpartition('/block')[0]})")
                elif size % shards:
                    fields = ", ".join(f"mesh.{axis} {mesh.shape[axis]}" for axis in carriers if mesh.shape[axis] > 1)
                    verb = "does" if "," not in fields else "together do"
                    found.setdefault(
                        f"config.{fields} {verb} not divide the {size} {name} of {where}: choose a divisor of {size}"
                    )

    jax.tree_util.tree_map_with_path(check, params, axes)
    if found:
        # One sentence for each size that does not fit, not for each parameter that has it.
        unique = {line.partition(" of ")[0]: line for line in reversed(list(found))}
        raise ConfigError("\n".join(reversed(list(unique.values()))))
    if stages > 1 and not any("layers" in names for names in jax.tree.structure(params).flatten_up_to(axes)):
        raise ConfigError(
            f"config.mesh.stage {stages}: layers that share weights (model.share_layers) are no pipeline; set it to 1"
        )


def check_replicated(params: Tree, axes: Tree, mesh: Mesh | AbstractMesh, sharding: parallel.Sharding) -> None:
    """Checks that no large parameter, or state of one, is whole on every device of a mesh that could divide it.

    Raises:
      ConfigError: with one line for each such parameter.
    """
    table = sharding.rules().state
    dividing = {axis for row in table.values() for axis in row if mesh.shape[axis] > 1}
    found = []

    def check(path: tuple[Any, ...], array: Any, names: tuple[str | None, ...]) -> None:
        carriers = [axis for entry in parallel.spec(names, table) for axis in parallel.carriers(entry)]
        able = [axis for axis in sorted(dividing) if any(size % mesh.shape[axis] == 0 for size in array.shape)]
        if array.size > sharding.max_replicated and able and not dividing.intersection(carriers):
            where = "/".join(str(entry.key) for entry in path)
            found.append(
                f"config.mesh: {where} has {array.size:,} elements and is whole on every device, though mesh."
                f"{able[0]} {mesh.shape[able[0]]} could divide it: use mesh.fsdp too, or allow it by"
                f" sharding.max_replicated={array.size}"
            )

    jax.tree_util.tree_map_with_path(check, params, axes)
    if found:
        raise ConfigError("\n".join(found))


def row_shards(mesh: Mesh | AbstractMesh) -> int:
    """Returns over how many devices the rows of a batch are divided."""
    return math.prod(mesh.shape[axis] for axis in parallel.DEFAULT_RULES.activations["batch"])


def check_batch_size(experiment: Experiment, mesh: Mesh | AbstractMesh) -> None:
    """Checks that each microbatch divides over the devices that read different rows, and rows over those that share.

    Raises:
      ConfigError: it does not.
    """
    shards, pieces = row_shards(mesh), experiment.num_microbatches
    stages = mesh.shape["stage"]
    cuts = experiment.sharding.pipeline.pieces(stages) if stages > 1 else 1
    # Each piece that goes through a pipeline divides over the devices of one stage.
    needed = math.lcm(shards, shards // stages * cuts)
    found = []
    if experiment.batch_size // pieces % needed:
        pipeline = f" and, for {cuts} pieces in a pipeline, a multiple of {needed}" if cuts > 1 else ""
        found.append(
            f"config.batch_size {experiment.batch_size} in {pieces} microbatches does not divide over "
            f"data x fsdp x expert x stage = {shards} devices{pipeline}; make it a multiple of {needed * pieces}"
        )
    # What `context` alone must divide is said by `check_attention`.
    axes = ("context", "tensor") if experiment.sharding.sequence else ()
    parts = math.prod(mesh.shape[axis] for axis in axes)
    for name in ("sequence_length", "encoder_length"):
        length = getattr(experiment.data, name)
        if length is not None and length % parts:
            fields = ", ".join(f"mesh.{axis} {mesh.shape[axis]}" for axis in axes if mesh.shape[axis] > 1)
            found.append(f"config.data.{name} {length} does not divide over {fields}; make it a multiple of {parts}")
    if found:
        raise ConfigError("\n".join(found))


def check_attention(experiment: Experiment, mesh: Mesh | AbstractMesh) -> None:
    """Checks that the devices can run attention, and those along `context` divide it.

    Raises:
      ConfigError: they cannot; one line for each reason.
    """
    platform = parallel.platform_of(mesh)
    found = [] if platform is None else platform_problems(experiment.model.attention.kernel, platform)
    shards = mesh.shape["context"]
    lengths = {"sequence_length": experiment.data.sequence_length, "encoder_length": experiment.data.encoder_length}
    given = {name: length for name, length in lengths.items() if length is not None}
    if shards > 1:
        found += experiment.model.attention.context_problems(experiment.model, given, shards, mesh.shape["tensor"])
    if found:
        raise ConfigError("\n".join(found))


def check_memory(sharding: parallel.Sharding, mesh: Mesh) -> None:
    """Checks that devices can read the host's memory, if state is to lie there.

    Raises:
      ConfigError: they cannot.
    """
    device = mesh.devices.flat[0]
    if sharding.optimizer_on_host and HOST_MEMORY not in {memory.kind for memory in device.addressable_memories()}:
        raise ConfigError(
            f"config.sharding.optimizer_on_host: devices of the kind {device.device_kind} have no {HOST_MEMORY} memory;"
            " set it to False, or use optimizer.rule=AdamW8Bit or Adafactor"
        )
