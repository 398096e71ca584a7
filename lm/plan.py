"""Says what a run needs before it runs: python -m lm.plan --config=configs/llama3.py:8b --devices=64 --hardware=v5p

Prints parameters, memory of each device, operations, collectives and time of a step on named hardware, and what to
change if it does not fit. Needs none of the devices. --compile also compiles the real train step for as many virtual
CPU devices, --topology=v5p:4x4x4 for that TPU topology (pip install lm[aot]), and prints XLA's own figures.
"""

from absl import flags

from lm import flags as program
from lm.config import ConfigError

_DEVICES = flags.DEFINE_integer("devices", None, "How many devices (default: those of the topology, or 1).", 1)
_HARDWARE = flags.DEFINE_string("hardware", None, "Which: v4, v5e, v5p, v6e, a100, h100, h200, b200.")
_COMPILE = flags.DEFINE_bool("compile", False, "Also compile the step for as many virtual CPU devices.")
_TOPOLOGY = flags.DEFINE_string("topology", None, "Also compile the step for this TPU topology, such as v5e:4x4.")


def _schema() -> type:
    from lm.experiment import Experiment

    return Experiment


def main(_: list[str]) -> int:
    """Plans the run that the flags name."""
    experiment = program.config(_schema())
    experiment.validate()
    import jax

    # A plan needs no accelerator, and must not take one from a run.
    jax.config.update("jax_platforms", "cpu")
    from lm.parallel.hardware import HARDWARE
    from lm.scaling import compiled, report
    from lm.scaling.planner import make_plan
    from lm.scaling.suggestions import suggest

    if _COMPILE.value and _TOPOLOGY.value:
        raise ConfigError("--compile is for virtual CPU devices, --topology for a TPU's: give one of them")
    topology = compiled.parse_topology(_TOPOLOGY.value) if _TOPOLOGY.value else None
    devices = _DEVICES.value or (topology.num_devices if topology else 1)
    if topology and devices != topology.num_devices:
        raise ConfigError(f"--topology={_TOPOLOGY.value} has {topology.num_devices} devices, --devices={devices}")
    name = _HARDWARE.value or (topology.hardware if topology else "v5p")
    if name not in HARDWARE:
        raise ConfigError(f"--hardware={name} is not known; there are {', '.join(HARDWARE)}")
    mesh = None
    if topology:
        mesh = compiled.topology_mesh(experiment.mesh, topology)
    elif _COMPILE.value:
        mesh = compiled.virtual_mesh(experiment.mesh, devices)
    plan = make_plan(experiment, devices, HARDWARE[name])
    print(report.describe(plan), flush=True)
    if not plan.fits:
        print("\n" + report.advise(plan, suggest(experiment, devices, HARDWARE[name])), flush=True)
    if mesh is not None:
        print("\n" + report.describe_compiled(compiled.compile_step(experiment, mesh), plan))
    return 0


if __name__ == "__main__":
    program.run(main, _schema)
