"""Kills a small training again and again and demands the history of an unbroken run, bit for bit.

python -m tests.soak --kills=25 --seed=0

Runs real processes and kills them with SIGKILL, SIGTERM, SIGSTOP and then SIGKILL, or SIGTERM and then SIGKILL before
the save may be done: during compilation, a step, an evaluation, the write of a checkpoint, its commit, its deletion,
right after a resume (so also twice in a row); of two processes one. A moment is hit if it still shows once all
processes stand still; one that is missed is tried again, after another start if it comes once a start, and not
counted. At the end the whole loss history, the
parameters, the optimizer's state, the data iterator's state and the hash of all examples read must equal those of a run
that was left alone. Two runs go side by side.
"""

import collections
import dataclasses
import pathlib
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent import futures

from absl import app, flags, logging

from tests.moments import EVERY, LIMIT, MOMENTS, Hunt, Watched, let_go_on
from tests.system import experiments, runs

PREEMPTED = 75
LANES = 2  # runs side by side


@dataclasses.dataclass(frozen=True)
class Case:
    """A run to be killed: its config and the number of its processes."""

    name: str
    make: Callable
    processes: int = 1


CASES = (
    Case("decoder", experiments.decoder),
    Case("encoder-decoder, UL2 on three sources", experiments.encoder_decoder),
    Case("mixture of experts", experiments.experts),
    Case("decoder, 2 processes", experiments.decoder, 2),
)
SIGNALS = ("SIGKILL", "SIGTERM", "SIGSTOP, SIGKILL", "SIGTERM, SIGKILL")


@dataclasses.dataclass(frozen=True)
class Kill:
    """What was killed, when and how; `saved` is whether its start had committed a checkpoint before."""

    case: str
    moment: str
    signal: str
    saved: bool


def _start(case: Case, arguments: list[str], root: pathlib.Path = runs.ROOT) -> list[subprocess.Popen]:
    if case.processes == 1:
        return [runs.start("lm.train", *arguments, root=root)]
    return runs.start_many("lm.train", case.processes, 1, *arguments)


def _finish(processes: list[subprocess.Popen]) -> None:
    """Waits for a run to end by itself; raises if it does not end well."""
    try:
        ended = [runs.finish(process, LIMIT) for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(code for code, _, _ in ended):
        raise AssertionError(f"exit statuses {[code for code, _, _ in ended]}:\n{ended[0][2][-3000:]}")


def _strike(processes: list[subprocess.Popen], victim: int, kind: str, rng: random.Random) -> list[int]:
    """Kills one of the processes, which stand still, and then the others as a launcher does; returns the statuses."""
    one, others = processes[victim], [process for number, process in enumerate(processes) if number != victim]
    first, _, then = kind.partition(", ")
    one.send_signal(signal.Signals[first])
    let_go_on(others if first == "SIGSTOP" else processes)
    if first == "SIGTERM" and not then:
        # All agree on the step, and each ends by itself.
        ended = [runs.finish(process, LIMIT) for process in processes]
        codes = [code for code, _, _ in ended]
        if codes != [PREEMPTED] * len(codes) and set(codes) != {-signal.SIGTERM}:
            raise AssertionError(f"exit statuses {codes} after SIGTERM:\n{ended[0][2][-3000:]}")
        assert set(codes) != {PREEMPTED} or "saved. The same command goes on from here" in ended[0][2], ended[0][2]
        return codes
    if then:
        time.sleep(1.0 if first == "SIGSTOP" else rng.uniform(0.0, 0.3))
        one.kill()
    # What the others do alone must do no harm.
    time.sleep(rng.uniform(0.0, 0.5) if others else 0.0)
    for process in others:
        process.kill()
    return [runs.finish(process)[0] for process in processes]


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
    assert [line["step"] for line in runs.history(broken)] == list(range(1, num_steps + 1))
    experiment = dataclasses.replace(read_config(broken), mesh=MeshConfig())
    tokenizer = load_tokenizer(experiment.data.tokenizer, None, broken / "tokenizer")
    like, found = assemble(experiment, tokenizer).state, []
    for folder in (whole, broken):
        checkpoints = Checkpoints(folder, experiment.checkpoint)
        restored = checkpoints.restore(like)
        checkpoints.close()
        assert restored is not None
        assert restored.step == num_steps
        found.append((restored.state._replace(key=jax.random.key_data(restored.state.key)), restored.data))
    jax.tree.map(np.testing.assert_array_equal, found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


@dataclasses.dataclass
class Soak:
    """A case, its kills, and where its two runs lie; enough steps for each kill that the run does not end before."""

    folder: pathlib.Path
    case: Case
    plan: list[tuple[str, str]]
    rng: random.Random
    say: Callable[[str], None]
    steps_per_kill: int = 60
    missed: int = 0

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.num_steps = self.steps_per_kill * len(self.plan) + 2 * EVERY
        base = self.case.make(self.folder / "text", num_steps=self.num_steps, batch_size=8)
        self.experiment = dataclasses.replace(
            base,
            evaluation=dataclasses.replace(base.evaluation, every=EVERY, num_batches=1),
            checkpoint=dataclasses.replace(base.checkpoint, every=EVERY, keep_last=2),
        )
        config = experiments.save(self.experiment, self.folder / "config.json")
        self._broken = [config, f"--workdir={self.folder / 'broken'}"]

    def leave_alone(self, root: pathlib.Path = runs.ROOT, **changes: object) -> None:
        """Makes the unbroken run, by the package in `root` and with changes to the config that change no figure."""
        config = experiments.save(dataclasses.replace(self.experiment, **changes), self.folder / "whole.json")
        _finish(_start(self.case, [config, f"--workdir={self.folder / 'whole'}"], root))

    def kill_all(self) -> list[Kill]:
        """Makes the other run, killing it as planned; returns what was hit, which is less if the run ends before."""
        done: list[Kill] = []
        for moment, kind in self.plan:
            step = Watched(self.folder / "broken").last_step() + self.rng.randrange(1, EVERY + 3)
            kill = self._kill(Hunt(moment, step, self.rng), kind)
            if kill is None:
                self.say(f"{self.case.name}: ended before {moment} was hit")
                break
            done.append(kill)
        _finish(_start(self.case, self._broken))
        return done

    def _kill(self, hunt: Hunt, kind: str) -> Kill | None:
        """Kills the run in a moment, starting it as often as that takes; None if the run ended first."""
        while True:
            seen = Watched(self.folder / "broken")
            processes = _start(self.case, self._broken)
            try:
                outcome = hunt.hit(processes, seen)
                if outcome == "ended":
                    _finish(processes)
                    return None
                if outcome == "hit":
                    kill = Kill(self.case.name, hunt.moment, kind, seen.has_saved())
                    victim = self.rng.randrange(self.case.processes)
                    codes = _strike(processes, victim, kind, self.rng)
                    self.missed += hunt.missed
                    where = f"of process {victim} in {hunt.moment} at step {seen.step}"
                    self.say(f"{self.case.name}: {kind} {where}: exit {codes}")
                    return kill
            finally:
                for process in processes:
                    process.kill()
                    process.wait()

    def compare(self) -> None:
        """Raises unless both runs are the same, bit for bit."""
        _compare(self.folder / "whole", self.folder / "broken", self.num_steps)


def make_plan(kills: int, rng: random.Random) -> list[tuple[str, str]]:
    """Returns as many pairs of moment and signal, each moment as often as the others, each signal too."""

    def dealt(names: Iterable[str]) -> list[str]:
        cards = list(names)
        return [name for _ in range(-(-kills // len(cards))) for name in rng.sample(cards, len(cards))][:kills]

    return list(zip(dealt(MOMENTS), dealt(SIGNALS), strict=True))


def main(_: list[str]) -> None:
    """Runs every case with its share of the kills."""
    logging.set_verbosity(logging.WARNING)
    kills, seed, started = _KILLS.value, _SEED.value, time.monotonic()
    folder = pathlib.Path(_FOLDER.value or tempfile.mkdtemp(prefix="soak-"))

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:6.1f} s] {text}", flush=True)

    rng = random.Random(seed)
    whole_plan, soaks = make_plan(kills, rng), []
    for number, case in enumerate(CASES[:kills]):
        plan = whole_plan[number :: len(CASES)]
        soaks.append(Soak(folder / str(number), case, plan, random.Random(f"{seed} {case.name}"), say))
    with futures.ThreadPoolExecutor(LANES) as lanes:
        broken = [lanes.submit(soak.kill_all) for soak in soaks]
        whole = [lanes.submit(soak.leave_alone) for soak in soaks]
        done = [kill for future in broken for kill in future.result()]
        for future in whole:
            future.result()
    for soak in soaks:
        soak.compare()
        say(f"{soak.case.name}: bit for bit the unbroken run")
    for name in ("case", "moment", "signal"):
        counts = collections.Counter(getattr(kill, name) for kill in done)
        say(f"by {name}: " + "; ".join(f"{key} {count}" for key, count in sorted(counts.items())))
    again = sum(not kill.saved for kill in done)
    say(
        f"{kills} kills asked for, {len(done)} landed, {again} of them before their start had saved anything; "
        f"{sum(soak.missed for soak in soaks)} moments missed and tried again; seed {seed}"
    )
    if len(done) < kills:
        raise AssertionError(f"only {len(done)} of {kills} kills: the runs in {folder} ended before")
    if _FOLDER.value is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    _KILLS = flags.DEFINE_integer("kills", 25, "How often to kill, over all cases.", lower_bound=1)
    _SEED = flags.DEFINE_integer("seed", 0, "Decides the moments, the signals and the victims.")
    _FOLDER = flags.DEFINE_string("folder", None, "Where the runs are kept; a temporary folder by default.")
    app.run(main)
