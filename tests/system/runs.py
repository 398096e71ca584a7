"""Runs the programs as processes, with a tiny model on a tiny corpus of the standard library's own text."""

import importlib.metadata
import json
import os
import pathlib
import pydoc_data.topics
import socket
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parent.parent.parent
# What depends on the clock and may differ between runs.
TIMES = (
    "tokens_per_second",
    "seconds_per_step",
    "data_wait_fraction",
    "model_flops_per_second",
    "data_tokens_per_second",
    # Counted since the start of the process.
    "padding_fraction",
    "goodput",
    "recompilations",
)
TIME_PREFIXES = ("time/", "stalls/")
# Quick code generation, as in tests/conftest.py.
XLA_FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    XLA_FLAGS += " --xla_cpu_use_fusion_emitters=false"


def write_corpus(folder: pathlib.Path, num_documents: int = 60) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(list(pydoc_data.topics.topics.values())[:num_documents]):
        (folder / f"{number:03}.txt").write_text(text[:3000], encoding="utf-8")
    return f"{folder}/*.txt"


def tiny_flags(source: str, **overrides: object) -> list[str]:
    fields = {
        "data.source": source,
        "data.tokenizer": "Bytes",
        "data.sequence_length": 32,
        "data.validation_fraction": 0.2,
        "batch_size": 4,
        "num_steps": 300,
        "checkpoint.every": 40,
        "evaluation.num_batches": 2,
        "logging.every": 1,
        "logging.tensorboard": False,
        "compilation_cache": ROOT / ".jax_cache" / "programs",
        **overrides,
    }
    return ["--config=configs/llama3.py:tiny", *[f"--config.{name}={value}" for name, value in fields.items()]]


def start(program: str, *flags: str, root: pathlib.Path = ROOT, **environment: str) -> subprocess.Popen:
    # One device; the virtual devices of this process are not inherited.
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": XLA_FLAGS, **environment}
    return subprocess.Popen(
        [sys.executable, "-m", program, *flags],
        cwd=root,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_many(program: str, number: int, devices: int, *flags: str) -> list[subprocess.Popen]:
    """Starts a program as `number` processes of `devices` virtual devices each."""
    port = free_port()
    return [
        start(
            program,
            *flags,
            f"--coordinator=127.0.0.1:{port}",
            f"--num_processes={number}",
            f"--process_id={index}",
            JAX_NUM_CPU_DEVICES=str(devices),
        )
        for index in range(number)
    ]


def run_many(program: str, number: int, devices: int, *flags: str, timeout: float = 240) -> list[tuple[int, str, str]]:
    """Runs a program as many processes to its end; none outlives the time limit."""
    started = start_many(program, number, devices, *flags)
    try:
        return [finish(process, timeout) for process in started]
    finally:
        for process in started:
            process.kill()


def finish(process: subprocess.Popen, timeout: float = 300) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, err


def run(program: str, *flags: str, **environment: str) -> tuple[int, str, str]:
    return finish(start(program, *flags, **environment))


def history(workdir: pathlib.Path, split: str = "train") -> list[dict]:
    """The logged figures that must repeat bit for bit."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k not in TIMES and not k.startswith(TIME_PREFIXES)}
        for line in lines
        if line["split"] == split
    ]


def last_step(workdir: pathlib.Path) -> int:
    """Returns the last step whose training figures are logged; 0 if there are none."""
    file = workdir / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    steps = (json.loads(line)["step"] for line in reversed(lines) if line.endswith("\n") and '"train"' in line)
    return next(steps, 0)


def wait_for_step(process: subprocess.Popen, workdir: pathlib.Path, step: int, timeout: float = 240) -> None:
    """Waits until the run has logged `step`; fails if it ends before."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise AssertionError(f"ended with {process.returncode} before step {step}: {process.stderr.read()[-2000:]}")
        if last_step(workdir) >= step:
            return
        time.sleep(0.005)
    process.kill()
    raise AssertionError(f"did not reach step {step} in {timeout} s")
