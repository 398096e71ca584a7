"""What to change in a run that does not fit its devices: mesh, recomputation, chunks, microbatches.

Knows what each change is for, by the config's fields; tries them by planning. Law: a suggestion was planned and fits,
and trains the same model on the same batch; where there is none, nothing is suggested.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from lm.config import ConfigError
from lm.experiment import Experiment
from lm.models import Chunked, Plain
from lm.parallel import MESH_AXES, MeshConfig
from lm.parallel.hardware import Hardware
from lm.scaling.planner import Plan, halvings, make_plan

TENSOR_SIZES = (1, 2, 4, 8)


class Suggestion(NamedTuple):
    """A change that makes a run fit.

    Attributes:
      overrides: as for the command line, without the dashes: "config.remat=full".
      plan: of the changed run.
    """

    overrides: tuple[str, ...]
    plan: Plan


def mesh_overrides(mesh: MeshConfig) -> tuple[str, ...]:
    """Returns the overrides that make a mesh of the default one."""
    default = MeshConfig()
    return tuple(
        f"config.mesh.{axis}={getattr(mesh, axis)}"
        for axis in MESH_AXES
        if getattr(mesh, axis) != getattr(default, axis)
    )


def meshes(experiment: Experiment, num_devices: int) -> Iterator[MeshConfig]:
    """Yields the meshes to try: the run's own, then all devices over parameters, then heads divided more and more."""
    yield experiment.mesh
    heads = experiment.model.sizes["K"]
    for tensor in TENSOR_SIZES:
        rest = num_devices // tensor
        if num_devices % tensor == 0 and heads % tensor == 0:
            fsdp = next((size for size in (rest, *reversed(halvings(rest))) if experiment.batch_size % size == 0), 1)
            if rest % fsdp == 0:
                yield MeshConfig(data=rest // fsdp, fsdp=fsdp, tensor=tensor)


def savings(experiment: Experiment) -> Iterator[tuple[tuple[str, ...], Experiment]]:
    """Yields changes that cost more and more time and save more and more memory, each with those before it."""
    overrides: tuple[str, ...] = ()
    yield overrides, experiment
    model, loss = experiment.model, experiment.loss
    length = experiment.data.sequence_length
    if loss.chunk is None and length > 1024:
        overrides, loss = (*overrides, "config.loss.chunk=1024"), dataclasses.replace(loss, chunk=1024)
        experiment = dataclasses.replace(experiment, loss=loss)
        yield overrides, experiment
    if model.remat != "full":
        overrides, model = (*overrides, "config.model.remat=full"), dataclasses.replace(model, remat="full")
        experiment = dataclasses.replace(experiment, model=model)
        yield overrides, experiment
    attention = model.attention
    if isinstance(attention.kernel, Plain) and not attention.dropout_rate and length > Chunked().chunk:
        attention = dataclasses.replace(attention, kernel=Chunked())
        overrides, model = (
            (*overrides, "config.model.attention.kernel=Chunked"),
            dataclasses.replace(model, attention=attention),
        )
        experiment = dataclasses.replace(experiment, model=model)
        yield overrides, experiment
    rows = experiment.batch_size // experiment.num_microbatches
    for pieces in halvings(rows):
        number = experiment.num_microbatches * pieces
        yield (
            (*overrides, f"config.num_microbatches={number}"),
            dataclasses.replace(experiment, num_microbatches=number),
        )


def suggest(experiment: Experiment, num_devices: int, hardware: Hardware, most: int = 40) -> Suggestion | None:
    """Finds the change that fits and is fastest of those that give up least; None if nothing fits.

    Args:
      experiment: the run.
      num_devices: how many devices.
      hardware: their kind.
      most: plans to make before giving up.
    """
    tried = 0
    for savings_overrides, saving in savings(experiment):
        found: list[Suggestion] = []
        for mesh in dict.fromkeys(meshes(experiment, num_devices)):
            if tried == most:
                return None
            try:
                plan = make_plan(dataclasses.replace(saving, mesh=mesh), num_devices, hardware)
            except ConfigError:
                continue
            tried += 1
            if plan.fits:
                changed = mesh_overrides(mesh) if mesh != experiment.mesh else ()
                found.append(Suggestion((*changed, *savings_overrides), plan))
        if found:
            return min(found, key=lambda suggestion: suggestion.plan.worst_seconds)
    return None
