"""Kills a small training again and again and demands the history of an unbroken run, bit for bit.

python -m tests.soak --kills=25 --seed=0

Runs real processes and kills them with SIGKILL, SIGTERM, or SIGSTOP and then SIGKILL: during compilation, a step, an
evaluation, the write of a checkpoint, its commit, its deletion, right after a resume (so also twice in a row); of two
processes one. At the end the whole loss history, the parameters, the optimizer's state, the data iterator's state and
the hash of all examples read must equal those of a run that was left alone.
"""

import collections
import dataclasses
import json
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from absl import app, flags, logging

from tests.system import experiments, runs

EVERY = 10  # steps between checkpoints, and between evaluations
PREEMPTED = 75
LIMIT = 240.0  # seconds after which a process counts as hung


@dataclasses.dataclass(frozen=True)
class Case:
    """A run to be killed: its config and the number of its processes."""

    name: str
    make: Callable
    processes: int = 1


CASES = (
    Case("decoder", experiments.decoder),
    Case("encoder-decoder, UL2", experiments.encoder_decoder),
    Case("mixture of experts", experiments.experts),
    Case("decoder, 2 processes", experiments.decoder, 2),
)


@dataclasses.dataclass
class Watched:
    """What a workdir shows of the run in it."""

    workdir: pathlib.Path

    def step(self) -> int:
        file = self.workdir / "metrics.jsonl"
        if not file.exists():
            return 0
        lines = [line for line in file.read_text().splitlines() if line.endswith("}") and '"train"' in line]
        return json.loads(lines[-1])["step"] if lines else 0

    def starts(self) -> int:
        file = self.workdir / "run.json"
        return len(json.loads(file.read_text())["starts"]) if file.exists() else 0

    def checkpoints(self, pattern: str) -> bool:
        return any((self.workdir / "checkpoints").glob(pattern))


# Each returns whether the moment has come: (what is seen, step to wait for, starts before this one).
MOMENTS: dict[str, Callable[[Watched, int, int], bool]] = {
    "compilation": lambda seen, step, starts: seen.starts() > starts,
    "step": lambda seen, step, starts: seen.step() >= step,
    "evaluation": lambda seen, step, starts: seen.step() >= -(-step // EVERY) * EVERY,
    "write": lambda seen, step, starts: seen.step() >= step and seen.checkpoints("*.orbax-checkpoint-tmp*"),
    "commit": lambda seen, step, starts: (
        seen.step() >= step and seen.checkpoints("*.orbax-checkpoint-tmp*/manifest.json")
    ),
    "deletion": lambda seen, step, starts: seen.checkpoints("*.deleted"),
    "resume": lambda seen, step, starts: seen.starts() > starts and seen.step() >= 1,
}
# Longest random delay in seconds after the moment, so that kills fall into every part of it.
DELAYS = {"compilation": 1.5, "step": 0.03, "evaluation": 0.2, "write": 0.05, "commit": 0.003, "deletion": 0.003}


def _start(case: Case, arguments: list[str]) -> list[subprocess.Popen]:
    if case.processes == 1:
        return [runs.start("lm.train", *arguments)]
    return runs.start_many("lm.train", case.processes, 1, *arguments)


def _reap(processes: list[subprocess.Popen]) -> list[int]:
    for process in processes:
        process.kill()
    return [runs.finish(process)[0] for process in processes]


def _finish(processes: list[subprocess.Popen]) -> None:
    """Waits for a run to end by itself; raises if it does not end well."""
    try:
        ended = [runs.finish(process, LIMIT) for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(code for code, _, _ in ended):
        raise AssertionError(f"exit statuses {[code for code, _, _ in ended]}:\n{ended[0][2][-3000:]}")


def _kill(processes: list[subprocess.Popen], victim: int, kind: str) -> list[int]:
    """Kills one process, then the others as a launcher does; returns the exit statuses."""
    if kind == "SIGTERM":
        processes[victim].send_signal(signal.SIGTERM)
        deadline = time.monotonic() + LIMIT
        while processes[victim].poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        if processes[victim].returncode in (0, PREEMPTED):
            # All have agreed on the step: each ends by itself.
            return [runs.finish(process, LIMIT)[0] for process in processes]
        return _reap(processes)
    if kind == "SIGSTOP":
        processes[victim].send_signal(signal.SIGSTOP)
        time.sleep(1.0)
    processes[victim].kill()
    return _reap(processes)


def _wait(processes: list[subprocess.Popen], seen: Watched, moment: str, step: int) -> str | None:
    """Waits for a moment; returns what came: it, that it was too short to be seen, or None for the run's end."""
    starts, has_come = seen.starts(), MOMENTS[moment]
    deadline, looks = time.monotonic() + LIMIT, 0
    while all(process.poll() is None for process in processes):
        if has_come(seen, step, starts):
            return moment
        # A deletion lasts a millisecond: most looks must be quick.
        looks += 1
        if looks % 50 == 0 and seen.step() >= step + 2 * EVERY:
            return f"{moment} missed"
        if time.monotonic() > deadline:
            raise AssertionError(f"neither the moment nor the end came in {LIMIT} s")
        time.sleep(0.0003)
    return None


def _compare(whole: pathlib.Path, broken: pathlib.Path, num_steps: int) -> None:
    """Raises unless two runs are the same, bit for bit."""
    import jax
    import numpy as np

    from lm.data import load_tokenizer
    from lm.parallel import MeshConfig
    from lm.training.assembly import assemble
    from lm.training.checkpoints import Checkpoints
    from lm.training.workdir import read_config

    for split in ("train", "validation"):
        expected, got = runs.history(whole, split), runs.history(broken, split)
        steps = [line["step"] for line in got]
        assert steps == [line["step"] for line in expected], f"{split}: steps {steps}"
        for one, other in zip(expected, got, strict=True):
            assert one == other, f"{split}, step {one['step']}:\n{one}\n{other}"
    assert runs.history(broken)[-1]["step"] == num_steps
    found = []
    for folder in (whole, broken):
        experiment = dataclasses.replace(read_config(folder), mesh=MeshConfig())
        tokenizer = load_tokenizer(experiment.data.tokenizer, None, folder / "tokenizer")
        checkpoints = Checkpoints(folder, experiment.checkpoint)
        restored = checkpoints.restore(assemble(experiment, tokenizer).state)
        checkpoints.close()
        assert restored is not None
        assert restored.step == num_steps
        found.append((restored.state._replace(key=jax.random.key_data(restored.state.key)), restored.data))
    jax.tree.map(np.testing.assert_array_equal, found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def soak(folder: pathlib.Path, case: Case, kills: int, rng: random.Random, say: Callable[[str], None]) -> list[str]:
    """Runs a case once unbroken and once with kills; returns what was killed how, and raises if they differ."""
    folder.mkdir(parents=True, exist_ok=True)
    num_steps = 30 * kills + 2 * EVERY
    base = case.make(folder / "text", num_steps=num_steps, batch_size=8)
    experiment = dataclasses.replace(
        base,
        evaluation=dataclasses.replace(base.evaluation, every=EVERY, num_batches=1),
        checkpoint=dataclasses.replace(base.checkpoint, every=EVERY, keep_last=2),
    )
    config = experiments.save(experiment, folder / "config.json")
    whole, broken = folder / "whole", folder / "broken"
    _finish(_start(case, [config, f"--workdir={whole}"]))
    seen, done = Watched(broken), []
    moments: list[str] = []
    while len(done) < kills:
        if not moments:
            moments = rng.sample(list(MOMENTS), len(MOMENTS))
        moment, kind = moments.pop(), rng.choice(("SIGKILL", "SIGKILL", "SIGTERM", "SIGSTOP"))
        step = seen.step() + rng.randrange(1, EVERY + 3)
        processes = _start(case, [config, f"--workdir={broken}"])
        came = _wait(processes, seen, moment, step)
        if came is None:
            _finish(processes)
            say(f"{case.name}: finished before a {moment} came")
            break
        time.sleep(rng.uniform(0, DELAYS.get(moment, 0.01)))
        victim = rng.randrange(case.processes)
        codes = _kill(processes, victim, kind)
        done.append(f"{came}, {kind}")
        say(f"{case.name}: {kind} of process {victim} in {came} at step {seen.step()}: exit {codes}")
    _finish(_start(case, [config, f"--workdir={broken}"]))
    _compare(whole, broken, num_steps)
    return done


def main(_: list[str]) -> None:
    """Runs every case with its share of the kills."""
    logging.set_verbosity(logging.WARNING)
    kills, rng, started = _KILLS.value, random.Random(_SEED.value), time.monotonic()
    folder = pathlib.Path(_FOLDER.value or tempfile.mkdtemp(prefix="soak-"))
    counts: collections.Counter[str] = collections.Counter()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:6.1f} s] {text}", flush=True)

    for number, case in enumerate(CASES):
        share = kills // len(CASES) + (number < kills % len(CASES))
        if share:
            counts.update(soak(folder / str(number), case, share, rng, say))
            say(f"{case.name}: bit for bit the unbroken run")
    say(f"{counts.total()} kills, seed {_SEED.value}: " + "; ".join(f"{k} {n}" for k, n in sorted(counts.items())))
    if _FOLDER.value is None:
        shutil.rmtree(folder)
    if counts.total() < kills:
        sys.exit(f"only {counts.total()} of {kills} kills: the runs ended before")


if __name__ == "__main__":
    _KILLS = flags.DEFINE_integer("kills", 25, "How often to kill, over all cases.", lower_bound=1)
    _SEED = flags.DEFINE_integer("seed", 0, "Decides the moments, the signals and the victims.")
    _FOLDER = flags.DEFINE_string("folder", None, "Where the runs are kept; a temporary folder by default.")
    app.run(main)
