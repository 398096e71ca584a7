"""What to change in a run that does not fit its devices: mesh, recomputation, chunks, microbatches, optimizer state.

Knows what each change is for, by the config's fields; tries them by planning. Laws: a suggestion was planned with its
own overrides and fits, and trains the same model on the same batch; one that rounds otherwise (moments in 8 bits) is
made only where none that does not was found; where there is none, nothing is suggested.
"""

from collections.abc import Iterator
from typing import NamedTuple

from lm.config import ConfigError, override
from lm.experiment import Experiment
from lm.models import Blocked, Chunked, Plain
from lm.optim import AdamW
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


def mesh_overrides(mesh: MeshConfig, own: MeshConfig) -> tuple[str, ...]:
    """Returns the overrides that make a mesh of a run's own."""
    return tuple(
        f"config.mesh.{axis}={getattr(mesh, axis)}" for axis in MESH_AXES if getattr(mesh, axis) != getattr(own, axis)
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


def savings(experiment: Experiment) -> Iterator[tuple[str, ...]]:
    """Yields changes that cost more and more time and save more and more memory of activations, with those before."""
    changes: tuple[str, ...] = ()
    yield changes
    model, length = experiment.model, experiment.data.sequence_length
    attention = model.attention
    if experiment.loss.chunk is None and length > 1024:
        yield (changes := (*changes, "config.loss.chunk=1024"))
    if model.remat != "full":
        yield (changes := (*changes, "config.model.remat=full"))
    if isinstance(attention.kernel, Plain | Blocked) and not attention.dropout_rate and length > Chunked().chunk:
        yield (changes := (*changes, "config.model.attention.kernel=Chunked"))
    rows = experiment.batch_size // experiment.num_microbatches
    for pieces in halvings(rows):
        yield (*changes, f"config.num_microbatches={experiment.num_microbatches * pieces}")


def state_savings(experiment: Experiment, hardware: Hardware) -> list[tuple[str, ...]]:
    """Returns ways to keep less of AdamW's state on the devices, none first.

    The host's memory is offered where the speed of its link is published (which are GPUs, whose runtime has it): the
    same numbers, and a transfer of known length in each step. Moments in 8 bits round otherwise. Both is last.
    """
    on_host = ("config.sharding.optimizer_on_host=True",)
    if experiment.sharding.optimizer_on_host or hardware.host_link is None:
        on_host = ()
    eight_bits = ("config.optimizer.rule=AdamW8Bit",) if isinstance(experiment.optimizer.rule, AdamW) else ()
    return list(dict.fromkeys([(), on_host, eight_bits, (*on_host, *eight_bits)]))


def suggest(experiment: Experiment, num_devices: int, hardware: Hardware, most: int = 40) -> Suggestion | None:
    """Finds the change that fits and is fastest of those that give up least; None if nothing fits.

    Args:
      experiment: the run.
      num_devices: how many devices.
      hardware: their kind.
      most: plans to make with each way to keep the optimizer's state before giving it up.
    """
    for state_changes in state_savings(experiment, hardware):
        found = _fit(experiment, state_changes, num_devices, hardware, most)
        if found:
            return min(found, key=lambda suggestion: suggestion.plan.worst_seconds)
    return None


def _fit(
    experiment: Experiment, state_changes: tuple[str, ...], num_devices: int, hardware: Hardware, most: int
) -> list[Suggestion]:
    """Returns what fits on any mesh with the first of `savings` that does on one."""
    candidates = dict.fromkeys(meshes(experiment, num_devices))
    tried = 0
    for changes in savings(experiment):
        found: list[Suggestion] = []
        for mesh in list(candidates):
            if tried == most:
                return found
            overrides = (*mesh_overrides(mesh, experiment.mesh), *state_changes, *changes)
            try:
                plan = make_plan(override(experiment, _values(overrides)), num_devices, hardware)
            except ConfigError:
                continue
            tried += 1
            if plan.fits:
                found.append(Suggestion(overrides, plan))
            elif not plan.update_fits:
                # What is left of activations makes no difference to the update.
                del candidates[mesh]
        if found:
            return found
    return []


def _values(overrides: tuple[str, ...]) -> dict[str, str]:
    return dict(item.removeprefix("config.").split("=", 1) for item in overrides)
