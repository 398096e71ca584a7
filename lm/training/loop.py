"""The train loop: next batch, one step, write down, now and then evaluate and save.

Owns the order of those things and nothing of what they do. Laws: the loop can be killed anywhere, and
started again it goes on with the same losses, bit for bit; it reads the metrics of step k - 1 while
step k runs, so the devices never wait for the host.
"""

import dataclasses
import math
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax

from lm.data import fingerprint, load_tokenizer, train_batches
from lm.experiment import Experiment
from lm.parallel.hardware import peak_flops
from lm.training.assembly import Assembly, assemble, use_compilation_cache
from lm.training.checkpoints import Checkpoints, restore_params
from lm.training.logging import MetricsWriter, Progress
from lm.training.state import TrainState, Tree
from lm.training.step import make_train_step
from lm.training.workdir import locked, open_workdir, write_record

# sysexits.h EX_TEMPFAIL: saved, not finished, to be started again.
EXIT_PREEMPTED = 75

# (parameters, whether the whole split is wanted) -> held-out figures, "nll" among them.
Evaluate = Callable[[Tree, bool], dict[str, float]]


@dataclasses.dataclass
class Counters:
    """What a run has read, saved with it.

    Attributes:
      seen_tokens: tokens read so far, padding left out.
      skipped_steps: updates left out because they were not finite.
    """

    seen_tokens: int = 0
    skipped_steps: int = 0


@contextmanager
def _stop_requested() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set; a second SIGINT interrupts at once."""
    event = threading.Event()

    def request(number: int, _: Any) -> None:
        if event.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        event.set()

    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    old = {number: signal.signal(number, request) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield event
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


class TrainLoop:
    """One start of a run, from the state that was restored to its end or to a request to stop."""

    def __init__(
        self, assembly: Assembly, workdir: pathlib.Path, batches: Any, checkpoints: Checkpoints, evaluate: Evaluate
    ) -> None:
        """Takes the parts; restores nothing and runs nothing yet."""
        self.assembly = assembly
        self.config = assembly.experiment
        self.batches = batches
        self.checkpoints = checkpoints
        self.evaluate = evaluate
        self.workdir = workdir
        self.counters = Counters()
        self.step = 0
        self._compiled: Any = None
        self._held_out: tuple[int, dict[str, float]] = (-1, {})

    def restore(self) -> TrainState:
        """Returns the newest sound state, or the first one; sets the data and the counters to match."""
        found = self.checkpoints.restore(self.assembly.state)
        if found is None:
            state = self.assembly.init()
            if self.config.init_from is not None:
                _, params = restore_params(pathlib.Path(self.config.init_from), self.assembly.state.params)
                average = self.config.optimizer.average
                state = state._replace(params=params, average=None if average is None else average.init(params))
            return state
        self.step = found.step
        self.batches.set_state(found.data["batches"])
        self.counters = Counters(**found.data["counters"])
        return found.state

    def run(self, state: TrainState) -> bool:
        """Trains to the last step; returns False if it was asked to stop before."""
        step_function = jax.jit(
            make_train_step(
                self.config, self.assembly.model, self.assembly.optimizer, self.assembly.tokenizer.token_bytes
            ),
            donate_argnums=0,
        )
        writer = MetricsWriter(self.workdir, self.config.logging, self.step)
        progress = Progress(self.config.logging, self.step, self.config.num_steps)
        meter = _Meter(self.config, self.assembly)
        pending: dict[str, jax.Array] | None = None
        try:
            with _stop_requested() as stop, self.assembly.placed():
                while self.step < self.config.num_steps and not stop.is_set():
                    started = time.perf_counter()
                    batch = next(self.batches)
                    meter.waited(time.perf_counter() - started)
                    state, metrics = step_function(state, self.assembly.place(batch))
                    if pending is not None:
                        self._note(self.step, pending, meter, writer, progress)
                    pending = metrics
                    self.step += 1
                    due = self._due(stop.is_set())
                    if due:
                        self._note(self.step, pending, meter, writer, progress)
                        pending = None
                        self._evaluate_and_save(state, writer, progress, stop.is_set())
                        meter.restart()
                if pending is not None:
                    self._note(self.step, pending, meter, writer, progress)
                self._finish(state, writer, progress, stopped=self.step < self.config.num_steps)
        finally:
            progress.close()
            writer.close()
        return self.step >= self.config.num_steps

    def _due(self, stopping: bool) -> bool:
        every = (self.config.evaluation.every, self.config.checkpoint.every)
        return stopping or any(n is not None and self.step % n == 0 for n in every)

    def _note(
        self, step: int, metrics: dict[str, jax.Array], meter: "_Meter", writer: MetricsWriter, progress: Progress
    ) -> None:
        """Counts one finished step, and writes it down if it is time to."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.counters.seen_tokens += int(values["seen_tokens"])
        self.counters.skipped_steps += int(values["skipped"])
        meter.stepped(values["seen_tokens"])
        progress.update(step, values["loss"], meter.tokens_per_second)
        if step % self.config.logging.every == 0 or step == self.config.num_steps or step == 1:
            totals = {"total_tokens": self.counters.seen_tokens, "skipped_steps": self.counters.skipped_steps}
            writer.write(step, "train", values | totals | meter.read())

    def _evaluate_and_save(self, state: TrainState, writer: MetricsWriter, progress: Progress, stopping: bool) -> None:
        every = self.config.evaluation.every
        if every is not None and self.step % every == 0 and not stopping and self.step < self.config.num_steps:
            self._held_out = (self.step, self._evaluate(state, writer, progress, whole=False))
        if stopping or (self.step % self.config.checkpoint.every == 0):
            self._save(state)

    def _evaluate(
        self, state: TrainState, writer: MetricsWriter, progress: Progress, *, whole: bool
    ) -> dict[str, float]:
        params = state.params if state.average is None else state.average
        figures = self.evaluate(params, whole)
        writer.write(self.step, "validation", figures)
        if figures:
            progress.say(
                f"step {self.step}: held-out loss {figures['nll']:.4f} nats/token, "
                f"{figures['bits_per_byte']:.4f} bits/byte"
            )
        return figures

    def _save(self, state: TrainState) -> None:
        data = {"batches": self.batches.get_state(), "counters": dataclasses.asdict(self.counters)}
        figures = self._held_out[1] if self._held_out[0] == self.step else None
        self.checkpoints.save(state, data, figures or None)

    def _finish(self, state: TrainState, writer: MetricsWriter, progress: Progress, *, stopped: bool) -> None:
        """Evaluates on the whole split if the run is done, saves, and waits for the disk."""
        if not stopped and self._held_out[0] != self.step:
            self._held_out = (self.step, self._evaluate(state, writer, progress, whole=True))
        self._save(state)
        self.checkpoints.wait()
        if stopped:
            progress.say(f"stopped after step {self.step}; saved. The same command goes on from here.")


class _Meter:
    """Speed since the last line: tokens/s, model FLOP/s, and the share of time spent waiting for data."""

    def __init__(self, config: Experiment, assembly: Assembly) -> None:
        self._flops = config.model.flops_per_token(config.data.sequence_length)
        self._positions = config.batch_size * config.data.sequence_length
        device = assembly.mesh.devices.flat[0]
        peak = peak_flops(device)
        self._peak = None if peak is None else peak * assembly.mesh.size
        self._skip_first = True
        self.tokens_per_second = math.nan
        self.restart()

    def restart(self) -> None:
        """Forgets what was measured, after an evaluation or a save."""
        self._start, self._steps, self._tokens, self._waiting = time.perf_counter(), 0, 0.0, 0.0

    def waited(self, seconds: float) -> None:
        """Adds time spent waiting for a batch."""
        self._waiting += seconds

    def stepped(self, tokens: float) -> None:
        """Adds one finished step; the first one of a process is compilation and not counted."""
        if self._skip_first:
            self._skip_first = False
            self.restart()
            return
        self._steps += 1
        self._tokens += tokens
        self.tokens_per_second = self._tokens / max(time.perf_counter() - self._start, 1e-9)

    def read(self) -> dict[str, float]:
        """Returns the figures since the last reading and starts anew; empty before the second step."""
        if not self._steps:
            return {}
        seconds = max(time.perf_counter() - self._start, 1e-9)
        flops = self._flops * self._positions * self._steps / seconds
        figures = {
            "tokens_per_second": self._tokens / seconds,
            "seconds_per_step": seconds / self._steps,
            "data_wait_fraction": min(self._waiting / seconds, 1.0),
            "model_flops_per_second": flops,
        }
        if self._peak is not None:
            figures["model_flops_utilization"] = flops / self._peak
        self.restart()
        return figures


def train(
    experiment: Experiment,
    workdir: str,
    make_evaluate: Callable[[Assembly], Evaluate],
    *,
    force_config: bool = False,
) -> bool:
    """Trains a run to its end, from its newest checkpoint if it has one.

    Args:
      experiment: the resolved config.
      workdir: folder of the run.
      make_evaluate: makes the held-out evaluation of this run.
      force_config: go on although the folder holds another config.

    Returns:
      Whether the run is finished; False if it was asked to stop.

    Raises:
      UserError: config, data, folder or checkpoint cannot be used.
    """
    experiment.validate()
    use_compilation_cache(experiment.compilation_cache)
    folder = open_workdir(workdir, experiment, force_config=force_config)
    with locked(folder):
        tokenizer = load_tokenizer(experiment.data.tokenizer, experiment.data, folder / "tokenizer")
        assembly = assemble(experiment, tokenizer)
        batches = train_batches(
            experiment.data,
            experiment.objective,
            tokenizer,
            experiment.batch_size,
            jax.process_index(),
            jax.process_count(),
        )
        checkpoints = Checkpoints(folder, experiment.checkpoint)
        try:
            loop = TrainLoop(assembly, folder, batches, checkpoints, make_evaluate(assembly))
            state = loop.restore()
            facts = {
                "from_step": loop.step,
                "data_fingerprint": fingerprint(experiment.data),
                "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(assembly.state.params)),
            }
            write_record(folder, experiment, assembly.mesh, facts)
            return loop.run(state)
        finally:
            checkpoints.close()
            batches.close()
