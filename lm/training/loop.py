"""The train loop: next batch, one step, write down, now and then evaluate and save.

Owns the order of those things and nothing of what they do. Laws: the loop can be killed anywhere, and
started again it goes on with the same losses, bit for bit; it reads the metrics of step k - 1 while
step k runs, so the devices never wait for the host.
"""

import dataclasses
import hashlib
import math
import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax

from lm import parallel
from lm.batch import WeightedSum
from lm.config import ConfigError, UserError
from lm.data import Batches, fingerprint, load_tokenizer, train_batches
from lm.experiment import Experiment
from lm.training.assembly import Assembly, assemble, check_batch_size, check_tokenizer, use_compilation_cache
from lm.training.checkpoints import Checkpoints, restore_params
from lm.training.logging import MetricsWriter, Progress
from lm.training.meter import Meter
from lm.training.state import TrainState, Tree, place
from lm.training.step import TrainMetrics, make_train_step
from lm.training.workdir import check_data, locked, open_workdir, save_config, write_record

# sysexits.h EX_TEMPFAIL: saved, not finished, to be started again.
EXIT_PREEMPTED = 75

# (parameters, whether the whole split is wanted) -> held-out figures, "nll" among them.
Evaluate = Callable[[Tree, bool], dict[str, float]]

# (folder, model's config) -> parameters on the host; None if the folder is in no other project's format.
ImportParams = Callable[[str, Any], Tree | None]


@dataclasses.dataclass
class Counters:
    """What a run has read, saved with it.

    Attributes:
      seen_tokens: tokens read so far, padding left out.
      skipped_steps: updates left out because they were not finite.
      data_order: hash of every batch read so far, in order.
    """

    seen_tokens: int = 0
    skipped_steps: int = 0
    data_order: str = ""


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


# (step, its metrics still on the devices, hash of the data read up to it)
Finished = tuple[int, TrainMetrics, str]


class TrainLoop:
    """One start of a run, from the state that was restored to its end or to a request to stop."""

    def __init__(
        self,
        assembly: Assembly,
        workdir: pathlib.Path,
        batches: Batches,
        checkpoints: Checkpoints,
        evaluate: Evaluate,
        import_params: ImportParams | None = None,
    ) -> None:
        """Takes the parts; restores nothing and runs nothing yet."""
        self.assembly = assembly
        self.config = assembly.experiment
        self.batches = batches
        self.checkpoints = checkpoints
        self.evaluate = evaluate
        self.import_params = import_params
        self.workdir = workdir
        self.counters = Counters()
        self.step = 0
        self._held_out: tuple[int, dict[str, float]] = (-1, {})
        # Programs of several virtual CPU devices that are in flight together can starve each other of threads.
        devices = assembly.mesh.devices
        on_cpu = devices.flat[0].platform == "cpu"
        self._one_at_a_time = devices.size > 1 and on_cpu
        if on_cpu:
            parallel.keep_freed_memory()

    def restore(self) -> TrainState:
        """Returns the newest sound state, or the first one; sets the data and the counters to match."""
        found = self.checkpoints.restore(self.assembly.state)
        if found is None:
            state = self.assembly.init()
            if self.config.init_from is not None:
                params = self._first_params(self.config.init_from)
                average = self.config.optimizer.average
                state = state._replace(params=params, average=None if average is None else average.init(params))
            return state
        self.step = found.step
        self.batches.set_state(found.data["batches"])
        self.counters = Counters(**found.data["counters"])
        return found.state

    def _first_params(self, folder: str) -> Tree:
        """Returns the parameters of another run or, if they can be imported, of another project, on the devices."""
        like = self.assembly.state.params
        params = None if self.import_params is None else self.import_params(folder, self.config.model)
        if params is None:
            check_tokenizer(pathlib.Path(folder), self.assembly.tokenizer)
            return restore_params(pathlib.Path(folder), like)[1]
        return place(params, like)

    def run(self, state: TrainState) -> bool:
        """Trains to the last step; returns False if it was asked to stop before."""
        self._writer = MetricsWriter(self.workdir, self.config.logging, self.step)
        self._progress = Progress(self.config.logging, self.step, self.config.num_steps)
        self._meter = Meter(self.config, self.assembly)
        box = [state]
        try:
            with _stop_requested() as stop, self.assembly.placed():
                finished = self._run_steps(box, stop)
                if finished:
                    self._evaluate(box[0], whole=True)
                self._save(box[0])
                self.checkpoints.wait()
            self._say_goodbye(finished)
            return finished
        except UserError:
            # Something outside the state is wrong (data, disk): what was computed is kept.
            self._save(box[0])
            self.checkpoints.wait()
            raise
        finally:
            self._progress.close()
            self._writer.close()

    def _say_goodbye(self, finished: bool) -> None:
        if not finished:
            self._progress.say(f"stopped after step {self.step}; saved. The same command goes on from here.")
            return
        data, speed = self.batches.statistics(), ""
        if math.isfinite(self._meter.overall):  # no step was timed where the run was finished before
            speed = (
                f"; train step {self._meter.overall:,.0f} tokens/s, data pipeline {data['tokens_per_second']:,.0f} "
                f"tokens/s when not waited for, {data['padding_fraction']:.1%} padding"
            )
        done = f"finished: {self.step} steps, {self.counters.seen_tokens:,} tokens{speed}"
        self._progress.say(f"{done}. Everything is in {self.workdir}")

    def _run_steps(self, box: list[TrainState], stop: threading.Event) -> bool:
        """Runs steps, leaving the newest state in `box`; returns whether the run is done."""
        model, tokenizer = self.assembly.model, self.assembly.tokenizer
        step = make_train_step(self.config, model, self.assembly.optimizer, tokenizer.token_bytes)
        step = jax.jit(step, donate_argnums=0)
        pending: Finished | None = None
        while self.step < self.config.num_steps and not stop.is_set():
            started = time.perf_counter()
            try:
                batch = next(self.batches, None)
            except UserError:
                # The state that will be saved holds this step, so its figures must be down too.
                self._note(pending)
                raise
            if batch is None:  # data.num_epochs are over
                break
            self._meter.waited(time.perf_counter() - started)
            box[0], metrics = step(box[0], self.assembly.place(batch))
            if self._one_at_a_time:
                jax.block_until_ready(metrics)
            self.step += 1
            self.counters.data_order = _chain(self.counters.data_order, self.batches.digest())
            # Written down one step late: while this step runs, the last one's figures are read.
            self._note(pending)
            pending = (self.step, metrics, self.counters.data_order)
            if self._due():
                self._note(pending)
                pending = None
                self._evaluate_and_save(box[0])
                self._meter.restart()
        self._note(pending, last=not stop.is_set())
        return not stop.is_set() or self.step >= self.config.num_steps

    def _due(self) -> bool:
        every = (self.config.evaluation.every, self.config.checkpoint.every)
        return any(n is not None and self.step % n == 0 for n in every)

    def _note(self, finished: Finished | None, *, last: bool = False) -> None:
        """Counts one finished step, and writes it down if it is time to."""
        if finished is None:
            return
        step, metrics, order = finished
        values = _means(jax.device_get(metrics))
        self.counters.seen_tokens += int(values["seen_tokens"])
        self.counters.skipped_steps += int(values["skipped"])
        self._meter.stepped(values["seen_tokens"])
        self._progress.update(step, values["loss"], self._meter.tokens_per_second)
        if step % self.config.logging.every == 0 or step in (1, self.config.num_steps) or last:
            data = self.batches.statistics()
            values["total_tokens"] = self.counters.seen_tokens
            values["flops"] = self._meter.step_flops
            values["total_flops"] = self._meter.step_flops * step
            values["skipped_steps"] = self.counters.skipped_steps
            speed = self._meter.read()
            if speed:
                speed["data_tokens_per_second"] = data["tokens_per_second"]
                speed["padding_fraction"] = data["padding_fraction"]
            self._writer.write(step, "train", values | speed, data_order=order)

    def _evaluate_and_save(self, state: TrainState) -> None:
        every = self.config.evaluation.every
        if every is not None and self.step % every == 0 and self.step < self.config.num_steps:
            self._evaluate(state, whole=False)
        # The last step is saved after its evaluation, with its figures.
        if self.step % self.config.checkpoint.every == 0 and self.step < self.config.num_steps:
            self._save(state)

    def _evaluate(self, state: TrainState, *, whole: bool) -> None:
        params = state.params if state.average is None else state.average
        figures = self.evaluate(params, whole)
        self._held_out = (self.step, figures)
        if whole and self.config.checkpoint.keep_best and self.config.evaluation.num_batches is not None:
            # Checkpoints are compared by the figures of the same batches.
            self._held_out = (self.step, self.evaluate(params, False))
        if figures:
            if whole:  # a finished run that is started again, or data that ended where an evaluation was due
                self._writer.take_back(self.step, "validation")
            self._writer.write(self.step, "validation", figures)
            self._progress.say(
                f"step {self.step}: held-out loss {figures['nll']:.4f} nats/token, "
                f"{figures['bits_per_byte']:.4f} bits/byte (unigram entropy {figures['unigram_bits_per_byte']:.4f})"
            )

    def _save(self, state: TrainState) -> None:
        data = {"batches": self.batches.get_state(), "counters": dataclasses.asdict(self.counters)}
        figures = self._held_out[1] if self._held_out[0] == self.step else None
        self.checkpoints.save(state, data, figures or None)


def _means(metrics: TrainMetrics) -> dict[str, float]:
    """Returns plain figures; a mean over nothing is left out."""
    found = {}
    for name, value in metrics.items():
        if not isinstance(value, WeightedSum):
            found[name] = float(value)
        elif value.weight > 0:
            found[name] = float(value.sum) / float(value.weight)
    return found


def _chain(before: str, digest: str) -> str:
    """A hash of everything read so far, in order: equal hashes mean equal tokens in equal order."""
    return hashlib.blake2b(f"{before}{digest}".encode(), digest_size=8).hexdigest()


def train(
    experiment: Experiment,
    workdir: str,
    make_evaluate: Callable[[Assembly], Evaluate],
    *,
    force_config: bool = False,
    import_params: ImportParams | None = None,
) -> bool:
    """Trains a run to its end, from its newest checkpoint if it has one.

    Args:
      experiment: the resolved config.
      workdir: folder of the run.
      make_evaluate: makes the held-out evaluation of this run.
      force_config: go on although the folder holds another config.
      import_params: reads `init_from` where that is a folder of another project; None reads only runs.

    Returns:
      Whether the run is finished; False if it was asked to stop.

    Raises:
      UserError: config, data, folder or checkpoint cannot be used.
    """
    experiment.validate()
    use_compilation_cache(experiment.compilation_cache)
    folder = open_workdir(workdir)
    with locked(folder):
        # Only a first start reads it: a run goes on when the folder it came from is gone.
        if not any((folder / "checkpoints").glob("*")) and not os.path.isdir(experiment.init_from or "."):
            raise ConfigError(f"config.init_from: no directory {experiment.init_from}")
        save_config(folder, experiment, force_config=force_config)
        tokenizer = load_tokenizer(experiment.data.tokenizer, experiment.data, folder / "tokenizer")
        assembly = assemble(experiment, tokenizer)
        check_batch_size(experiment, assembly.mesh)
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
            loop = TrainLoop(assembly, folder, batches, checkpoints, make_evaluate(assembly), import_params)
            state = loop.restore()
            data = fingerprint(experiment.data)
            if loop.step:
                check_data(folder, data, force_config=force_config)
            facts = {
                "from_step": loop.step,
                "data_fingerprint": data,
                "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(assembly.state.params)),
            }
            write_record(folder, experiment, assembly.mesh, facts)
            return loop.run(state)
        finally:
            checkpoints.close()
            batches.close()
