"""Ours beside what a user would pick instead: python -m benchmarks.run --suite=cpu --against=torch,transformers

Each subject is run by all contenders in turn, round by round, each in a process of its own with the same cores,
shapes, dtype and data. Columns: tokens/s at the median round; spread (longest minus shortest round over the median);
model FLOP/s and their share of the best matrix-product speed measured in the same rounds (decoding: GB/s of weights
and cache, marked B, and their share of the best copy's); processor seconds of all threads; peak memory (of the
process, libraries included, or of the device where it counts); seconds of the first call, which compiles; and, beside
a peer, how many times faster we are: median over rounds of theirs over ours, by the clock and by processor seconds
(steadier where the machine is shared). What finds no memory beside the others runs after them, alone. On a GPU
float32 products are of TensorFloat-32 on both sides, as jax does by default. Exit status 2: a flag or the device does
not fit.

Subjects: train-SIZE, generate-SIZE-ROWS, memory (remat and chunked loss), data (the pipeline alone), start (process
start to first step of the quickstart). --subjects takes whole names or beginnings. --minutes ends the program by
itself; --output is written after each round, so that a program that is killed leaves what it had.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time
from typing import Any

from absl import flags

from benchmarks.measuring import use_threads
from benchmarks.results import HEADER, Record, Row, lines
from lm import flags as program
from lm.config import UserError

_SUITE = flags.DEFINE_enum("suite", "cpu", ["cpu", "gpu"], "Which sizes, and on which device.")
_AGAINST = flags.DEFINE_list(
    "against", ["torch", "transformers"], "Peers: torch, transformers, maxtext; empty for none."
)
_SUBJECTS = flags.DEFINE_list("subjects", [], "Names of subjects or their beginnings; empty for all.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Interleaved rounds.", lower_bound=1)
_DTYPES = flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "Dtypes of computation.")
_THREADS = flags.DEFINE_integer("threads", None, "Cores for each contender; all by default.", lower_bound=1)
_COMPILED = flags.DEFINE_bool("torch_compile", True, "Whether peers are also measured under torch.compile.")
_MINUTES = flags.DEFINE_float("minutes", None, "Ends after so many, with what was measured by then.", lower_bound=0.0)
_MAXTEXT = flags.DEFINE_string(
    "maxtext_python", None, "The Python that has MaxText, which brings a jax of its own; by default this one."
)
_OUTPUT = flags.DEFINE_string("output", None, "JSON file for every sample of every round.")

PEERS = ("torch", "transformers", "maxtext")
EXTRA = ("memory", "data", "start")


def _check() -> list[str]:
    """Returns the subjects that are wanted.

    Raises:
      UserError: a flag names nothing, or the device is missing.
    """
    for peer in _AGAINST.value:
        if peer not in PEERS:
            raise UserError(f"--against: {peer!r} is no peer; there are {', '.join(PEERS)}")
        if peer == "maxtext":
            if _SUITE.value == "gpu":
                raise UserError("--against: maxtext is compared on CPUs; leave it out of --suite=gpu")
            _maxtext_versions(_pythons()[peer])
        elif importlib.util.find_spec(peer) is None:
            raise UserError(f"--against: {peer} is not installed; leave it out or pip install -e .[oracle]")
    for dtype in _DTYPES.value:
        if dtype not in ("float32", "bfloat16"):
            raise UserError(f"--dtypes: {dtype!r} is neither float32 nor bfloat16")
    if not _DTYPES.value:
        raise UserError("--dtypes is empty; give float32, bfloat16 or both")
    if _MAXTEXT.value and "maxtext" not in _AGAINST.value:
        raise UserError("--maxtext_python is read with maxtext in --against only; add it there or leave this out")
    if _MINUTES.value is not None and math.isnan(_MINUTES.value):
        raise UserError("--minutes: nan is no time; give a number of minutes")
    if _OUTPUT.value is not None:
        path = pathlib.Path(_OUTPUT.value)
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise UserError(f"--output: {path} cannot be written; give a file in a folder that exists")
    _choose_device()
    from benchmarks import subjects

    known = [*(subjects.CPU if _SUITE.value == "cpu" else subjects.GPU), *EXTRA]
    for wanted in _SUBJECTS.value:
        if not wanted or not any(name.startswith(wanted) for name in known):
            raise UserError(f"--subjects: {wanted!r} begins no subject; there are {', '.join(known)}")
    # A whole name is that subject's alone, though others begin with it.
    whole, beginnings = set(_SUBJECTS.value) & set(known), tuple(set(_SUBJECTS.value) - set(known))
    return [name for name in known if not _SUBJECTS.value or name in whole or name.startswith(beginnings)]


def _choose_device() -> None:
    """Sets what the contenders' processes inherit.

    Raises:
      UserError: there is no such device.
    """
    if _SUITE.value == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
    else:
        # Contenders share the device's memory.
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        import jax

        if jax.default_backend() != "gpu":
            raise UserError(f"--suite=gpu needs a GPU that jax can use; jax sees only {jax.default_backend()}")
    # Threads of a peer that wait must not keep the others' cores busy; every start compiles.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    # The peers' weights are ours: nothing is looked up.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _pythons() -> dict[str, str]:
    """Returns by peer the Python that runs it."""
    others = {"maxtext": _MAXTEXT.value} if _MAXTEXT.value else {}
    return {peer: others.get(peer, sys.executable) for peer in _AGAINST.value}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("jax", "torch", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if "maxtext" in _AGAINST.value:
        found |= _maxtext_versions(_pythons()["maxtext"])
    return found


def _maxtext_versions(python: str) -> dict[str, str]:
    """Asks a Python for the versions of its MaxText and jax.

    Raises:
      UserError: it does not run, or has no MaxText.
    """
    asked = "from importlib.metadata import version; print(version('maxtext'), version('jax'))"
    try:
        done = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True)
        maxtext, jax = done.stdout.split()
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        how = "docs/performance.md says how to install it; or leave maxtext out of --against"
        raise UserError(f"--maxtext_python: {python} has no MaxText; {how}") from error
    return {"maxtext": maxtext, "maxtext's jax": jax}


def _processor() -> str:
    """Returns the processor's name."""
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _say(text: str) -> None:
    print(text, flush=True)


def _compared(name: str, folder: pathlib.Path, record: Record, until: float) -> None:
    """Measures a subject that has peers, in each dtype; prints its lines."""
    from benchmarks import subjects

    subject: Any = (subjects.CPU if _SUITE.value == "cpu" else subjects.GPU)[name]
    found: list[Row] = []

    def keep(rows: list[Row]) -> None:
        record.keep(name, [dataclasses.asdict(row) for row in found + rows])

    for dtype in _DTYPES.value:
        with tempfile.TemporaryDirectory(dir=folder) as own:
            comparison = subject.compare(name, dtype, _pythons(), pathlib.Path(own))
            if not _COMPILED.value:
                kept = tuple(c for c in comparison.contenders if not c.name.endswith("compiled"))
                comparison = dataclasses.replace(comparison, contenders=kept)
            rows = comparison.measure(_ROUNDS.value, _say, keep, until)
        if isinstance(subject, subjects.Generation):
            rows = subjects.add_decoding(rows, subject.new_tokens, subject.rows.batch, subject.bytes_read(dtype))
        for line in lines(row for row in rows if row.part != "whole"):
            _say(line)
        found += rows
        keep([])
    if subject.note:
        _say(f"{name}: {subject.note}")


def _extra(name: str, folder: pathlib.Path, until: float) -> dict[str, Any]:
    """Measures a subject without peers; prints and returns its figures."""
    from benchmarks import memory, pipeline, starting

    if name == "memory":
        return memory.measure(_SUITE.value, _ROUNDS.value, _say, until)
    if name == "start":
        found = starting.measure(folder)
        _say(
            f"start: first step after {found['cold_seconds']:.1f} s cold, {found['warm_seconds']:.1f} s with the cache"
        )
        return found
    found = pipeline.measure(5.0, folder)
    _say(f"data: {found['tokens_per_second']:,.0f} tokens/s of the quickstart's text, packed")
    return found


def main(_: list[str]) -> int:
    """Measures what the flags ask for."""
    until = math.inf if _MINUTES.value is None else time.monotonic() + 60 * _MINUTES.value
    names = _check()
    threads = use_threads(_THREADS.value)
    machine = {"processor": _processor(), "threads": threads, "load": os.getloadavg()[0], **_versions()}
    if _SUITE.value == "gpu":
        import jax

        machine["device"] = jax.devices()[0].device_kind
    _say(", ".join(f"{key} {value}" for key, value in machine.items()))
    _say(f"{_ROUNDS.value} rounds\n{HEADER}")
    found = {"machine": machine, "started": time.strftime("%Y-%m-%d %H:%M:%S")}
    record = Record(found, None if _OUTPUT.value is None else pathlib.Path(_OUTPUT.value))
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            if time.monotonic() > until:
                _say(f"{name}: left out: the time is up")
            elif name in EXTRA:
                try:
                    record.keep(name, _extra(name, pathlib.Path(folder), until))
                except (RuntimeError, UserError) as error:
                    _say(f"{name}: left out: {error}")
            else:
                _compared(name, pathlib.Path(folder), record, until)
    return 0


if __name__ == "__main__":
    program.run(main)
