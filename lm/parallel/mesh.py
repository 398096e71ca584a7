"""Meshes and pipelines as settings: the one place that builds a `jax.sharding.Mesh`, always with Auto axis types.

Knows neither models nor data. A single device is a mesh too, so that every program has one path.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

MESH_AXES = ("data", "fsdp", "tensor", "context", "expert", "stage")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many devices each mesh axis has; the product must be the number of devices.

    Attributes:
      data: replicas that each read other rows; -1 takes the devices that the other axes leave.
      fsdp: shards of parameters and optimizer state, which read other rows too (ZeRO-3).
      tensor: shards of heads, hidden units and vocabulary.
      context: shards of the sequence.
      expert: shards of the experts.
      stage: pipeline stages.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1
    expert: int = 1
    stage: int = 1

    def sizes(self, num_devices: int) -> tuple[int, ...]:
        """Returns the size of each of MESH_AXES on `num_devices` devices.

        Raises:
          ValueError: the sizes do not multiply to `num_devices`.
        """
        sizes = [getattr(self, axis) for axis in MESH_AXES]
        shown = " x ".join(f"{axis} {size}" for axis, size in zip(MESH_AXES, sizes, strict=True) if size != 1)
        if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
            raise ValueError(f"config.mesh: sizes are 1 or more, and at most one is -1; got {shown}")
        fixed = math.prod(size for size in sizes if size != -1)
        if -1 in sizes:
            if num_devices % fixed:
                raise ValueError(
                    f"config.mesh: {shown} asks for a multiple of {fixed} devices, there are {num_devices}"
                )
            sizes[sizes.index(-1)] = num_devices // fixed
        elif fixed != num_devices:
            raise ValueError(f"config.mesh: {shown or 'data 1'} makes {fixed} devices, there are {num_devices}")
        return tuple(sizes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pipeline:
    """How stages share a batch. Stages are idle (stages - 1) of (num_microbatches x repeats + stages - 1) turns.

    Attributes:
      num_microbatches: pieces of a batch that follow each other through the stages; none is one for each stage.
      repeats: how often a piece goes round all stages; above 1 a stage has layers of several depths, is less often
        idle, and weights are moved to their stages once per step.
    """

    num_microbatches: int | None = None
    repeats: int = 1

    def pieces(self, stages: int) -> int:
        """Returns the number of pieces that a batch is cut into."""
        return stages if self.num_microbatches is None else self.num_microbatches

    def problems(self, stages: int) -> list[str]:
        """Returns one sentence for each reason why this cannot work with so many stages."""
        found = []
        if self.repeats < 1:
            found.append(f"config.sharding.pipeline.repeats: {self.repeats} is not a positive number")
        least = stages if self.repeats > 1 else 1
        if self.pieces(stages) < least:
            found.append(
                f"config.sharding.pipeline.num_microbatches: {self.pieces(stages)} pieces cannot go round"
                f" {stages} stages {self.repeats} times; {least} is the least"
            )
        return found


def build_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Builds the six-axis mesh of `config` over `devices` (default: all of them).

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = config.sizes(len(devices))
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices)
