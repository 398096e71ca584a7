"""The train step compiled for devices that are not here, and what XLA says of it: memory, operations, collectives.

Owns virtual CPU devices and TPU topologies. Knows no hardware figures. Law: what is compiled is the step that
`lm.train` runs.
"""

import dataclasses
import importlib.util
import math
import os
import time
from typing import Any

import jax
from jax.sharding import Mesh

from lm import parallel
from lm.config import ConfigError
from lm.experiment import Experiment
from lm.scaling.step import describe_step, host_bytes

# Names of TPU topologies: the kind and how many dimensions its torus has.
DIMENSIONS = {"v4": 3, "v5p": 3, "v5e": 2, "v6e": 2}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of a TPU pod.

    Attributes:
      name: as libtpu calls it, such as "v5p:4x4x4".
      hardware: the kind of chip, a key of `lm.parallel.hardware.HARDWARE`.
      num_devices: number of jax devices.
    """

    name: str
    hardware: str
    num_devices: int


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What XLA says of a compiled step, of each device.

    Attributes:
      argument_bytes: state and batch in the device's memory.
      output_bytes: new state and metrics.
      alias_bytes: outputs that take the place of arguments.
      temporary_bytes: what the step is given for a time; more than it needs where there is room.
      peak_bytes: most bytes alive at once, arguments included; for TPUs (a CPU's leaves out temporaries).
      flops: XLA's count of operations; the body of a loop counts once.
      collectives: by kind: how many, loops counted as often as they run, and the bytes of their results.
      seconds: that lowering and compiling took.
      unseen_bytes: state of the host that the compiler, whose devices have one memory, took for an argument; it is in
        no other figure, and what is fetched of it for the update is not in the temporaries.
    """

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temporary_bytes: int
    peak_bytes: int
    flops: float
    collectives: dict[str, parallel.Traffic]
    seconds: float
    unseen_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Memory at its fullest: arguments, temporaries, and outputs that take no argument's place."""
        return self.argument_bytes + self.temporary_bytes + self.output_bytes - self.alias_bytes


def parse_topology(name: str) -> Topology:
    """Reads the name of a TPU topology, such as "v5p:4x4x4".

    Raises:
      ConfigError: no such kind, or the wrong number of dimensions.
    """
    kind, _, shape = name.partition(":")
    known = ", ".join(f"{kind}:{'x'.join('4' * count)}" for kind, count in DIMENSIONS.items())
    sides = shape.split("x")
    if kind not in DIMENSIONS or not all(side.isdigit() and int(side) for side in sides):
        raise ConfigError(f"--topology={name} is no TPU topology; they look like {known}")
    if len(sides) != DIMENSIONS[kind]:
        raise ConfigError(
            f"--topology={name}: {kind} has {DIMENSIONS[kind]} dimensions, not {len(sides)} (as in {known})"
        )
    return Topology(name, kind, math.prod(int(side) for side in sides))


def topology_mesh(config: parallel.MeshConfig, topology: Topology) -> Mesh:
    """Builds the mesh of a config over the chips of a TPU slice that is not here.

    Raises:
      ConfigError: libtpu is not installed, knows no such topology, or the mesh does not fit it.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("--topology compiles for TPUs with libtpu, which is not installed: pip install 'lm[aot]'")
    # Without these, libtpu asks the cloud for the machine's TPUs and waits for an answer; and of two processes that
    # only compile, the second would be refused, as if there were a TPU to share.
    settings = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    for key, value in settings.items():
        os.environ.setdefault(key, value)
    from jax.experimental import topologies

    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology.name).devices
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"--topology={topology.name} does not exist for libtpu: {reason}") from error
    return _mesh(config, devices)


def virtual_mesh(config: parallel.MeshConfig, num_devices: int) -> Mesh:
    """Builds the mesh of a config over virtual CPU devices; to be called before jax starts any.

    Raises:
      ConfigError: jax has started others, or the mesh does not fit them.
    """
    try:
        jax.config.update("jax_num_cpu_devices", num_devices)
    except RuntimeError as error:
        if len(jax.devices("cpu")) < num_devices:
            raise ConfigError(f"--compile: jax has already started {len(jax.devices('cpu'))} devices") from error
    return _mesh(config, jax.devices("cpu")[:num_devices])


def _mesh(config: parallel.MeshConfig, devices: Any) -> Mesh:
    try:
        return parallel.build_mesh(config, devices)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def compile_step(experiment: Experiment, mesh: Mesh) -> Compiled:
    """Compiles the train step of a run for a mesh and returns what XLA says of it.

    Raises:
      ConfigError: the mesh does not fit the run, or the compiler says that the step does not fit the memory.
    """
    step = describe_step(experiment, mesh)
    start = time.perf_counter()
    try:
        compiled = step.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ConfigError(f"XLA: the step does not fit: {str(error).partition(chr(10))[0]}") from error
    seconds = time.perf_counter() - start
    memory, costs = compiled.memory_analysis(), compiled.cost_analysis() or {}
    # Of CPU devices the host's memory is their own: each of these figures counts what lies there.
    unseen = max(host_bytes(step.assembly.state) - memory.host_argument_size_in_bytes, 0)
    return Compiled(
        argument_bytes=memory.argument_size_in_bytes - unseen,
        output_bytes=memory.output_size_in_bytes - unseen,
        alias_bytes=memory.alias_size_in_bytes - unseen,
        temporary_bytes=memory.temp_size_in_bytes,
        peak_bytes=memory.peak_memory_in_bytes - unseen,
        flops=float(costs.get("flops", math.nan)),
        collectives=parallel.count_collectives(compiled.as_text()),
        seconds=seconds,
        unseen_bytes=unseen,
    )
