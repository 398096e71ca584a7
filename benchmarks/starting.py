"""Seconds from the start of `python -m lm.train` to its first finished step, cold and with its compilation cache.

The process is a fresh one, as a user starts it; the step is finished when metrics.jsonl tells its loss.
Cold: no compilation cache and no tokenizer; warm: both are there, and nothing else of the run.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import time

CONFIG = "configs/quickstart.py"


def first_step_seconds(workdir: pathlib.Path, cache: pathlib.Path, extra: tuple[str, ...] = ()) -> float:
    """Starts a run, waits for its first step and stops it.

    Raises:
      RuntimeError: the run ended before.
    """
    command = [sys.executable, "-m", "lm.train", f"--config={CONFIG}", f"--workdir={workdir}"]
    command += [f"--config.compilation_cache={cache}", *extra]
    metrics = workdir / "metrics.jsonl"
    started = time.perf_counter()
    root = pathlib.Path(__file__).parent.parent
    with subprocess.Popen(
        command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=dict(os.environ), text=True
    ) as process:
        try:
            while not (metrics.exists() and metrics.read_text(encoding="utf-8").count("\n")):
                if process.poll() is not None:
                    said = process.stderr.read() if process.stderr else ""
                    raise RuntimeError(f"the run ended with status {process.returncode}: {said[-300:]}")
                time.sleep(0.01)
            return time.perf_counter() - started
        finally:
            process.kill()


def measure(folder: pathlib.Path) -> dict[str, float]:
    """Returns the seconds of a cold start and of a warm one."""
    cold = first_step_seconds(folder / "cold", folder / "cache")
    tokenizer = folder / "cold" / "tokenizer"
    (folder / "warm").mkdir()
    shutil.copytree(tokenizer, folder / "warm" / "tokenizer")
    return {"cold_seconds": cold, "warm_seconds": first_step_seconds(folder / "warm", folder / "cache")}
