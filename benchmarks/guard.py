"""Notices when a change makes the train step do more work: python -m benchmarks.guard [--update]

Counts operations, bytes, collectives and instructions of small train steps on eight virtual CPU devices and compares
them with benchmarks/guard.json. No wall time: the counts are those of the traced and partitioned program, the same on
every machine, stored for each version of jax. Exit status 0 where nothing grew, 1 where something did.
"""

import collections
import dataclasses
import json
import os
import pathlib
import re
import sys

from absl import app, flags

_UPDATE = flags.DEFINE_bool(
    "update", False, "Store today's counts, to be committed with the change that explains them."
)
_CASES = flags.DEFINE_list("cases", [], "Only these, such as 'decoder on fsdp'; all of them by default.")

STORED = pathlib.Path(__file__).with_name("guard.json")
NUM_DEVICES = 8
# Code generation changes no count, only the time that compiling takes.
XLA_FLAGS = " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
Counts = dict[str, int]


def cases() -> dict:
    """Returns the runs that are counted, by name."""
    from configs import bert, llama3, mixtral, t5
    from lm.parallel import MeshConfig

    runs = {
        "decoder": llama3.get_config("tiny"),
        "encoder": bert.get_config("tiny"),
        "encoder_decoder": t5.get_config("tiny"),
        "experts": mixtral.get_config("tiny"),
    }
    meshes = {
        "data": MeshConfig(data=8),
        "fsdp": MeshConfig(data=1, fsdp=8),
        "fsdp x tensor": MeshConfig(data=1, fsdp=4, tensor=2),
    }
    return {
        f"{run} on {mesh}": dataclasses.replace(config, mesh=sizes, batch_size=16)
        for run, config in runs.items()
        for mesh, sizes in meshes.items()
    }


def count(experiment) -> Counts:
    """Counts one train step, of each device."""
    import jax

    from lm import parallel
    from lm.scaling.step import describe_step

    mesh = parallel.build_mesh(experiment.mesh, jax.devices()[:NUM_DEVICES])
    step = describe_step(experiment, mesh)
    cost = step.count("cpu")
    lowered = step.lower()
    instructions = collections.Counter(re.findall(r"= \"?stablehlo\.(\w+)", lowered.as_text()))
    counts = {
        "operations in products": round(cost.flops),
        "bytes through memory": round(cost.traffic),
        "bytes of temporaries": cost.peak,
        "instructions": sum(instructions.values()),
        "products": instructions["dot_general"],
        "loops": instructions["while"],
    }
    for kind, (number, size) in parallel.count_collectives(lowered.compile().as_text()).items():
        counts[f"{kind} messages"], counts[f"{kind} bytes"] = number, size
    return counts


def compare(name: str, stored: Counts, found: Counts) -> list[str]:
    """Returns a sentence for each count that grew."""
    grown = []
    for what in dict.fromkeys((*stored, *found)):
        before, now = stored.get(what, 0), found.get(what, 0)
        if now > before:
            by = f"by {now / before - 1:.1%}" if before else "from nothing"
            grown.append(f"{name}: {what} grew {by}, {before:,} to {now:,}")
    return grown


def guard(names: list[str], update: bool = False) -> list[str]:
    """Counts the named cases and compares or stores; returns what grew."""
    import jax

    known = cases()
    stored = json.loads(STORED.read_text()) if STORED.exists() else {}
    here = stored.setdefault(jax.__version__, {})
    grown = []
    for name in names or known:
        found = count(known[name])
        if name in here and not update:
            grown += compare(name, here[name], found)
            shrunk = compare(name, found, here[name])
            print(
                f"{name}: {len(shrunk)} counts are smaller than stored (--update keeps that)"
                if shrunk
                else f"{name}: ok"
            )
        elif not update:
            print(f"{name}: no counts are stored for jax {jax.__version__}; store them with --update")
        here[name] = found
    if update:
        STORED.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n")
        print(f"wrote {STORED.name} for jax {jax.__version__}")
    return grown


def main(_) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + XLA_FLAGS
    import jax

    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
    unknown = [name for name in _CASES.value if name not in cases()]
    if unknown:
        sys.exit(f"guard: no case {', '.join(unknown)}; there are {', '.join(cases())}")
    grown = guard(_CASES.value, _UPDATE.value)
    for line in grown:
        print(line, file=sys.stderr)
    sys.exit(1 if grown else 0)


if __name__ == "__main__":
    app.run(main)
