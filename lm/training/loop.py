"""The train loop: next batch, one step, write down, now and then evaluate and save.

Owns the order of those things and nothing of what they do. Laws: the loop can be killed anywhere, and
started again it goes on with the same losses, bit for bit; it reads the metrics of step k - 1 while
step k runs, so the devices never wait for the host.
"""

import dataclasses
import json
import math
import os
import pathlib
import threading
import time
from collections.abc import Callable

import jax

from lm import parallel
from lm.batch import Batch
from lm.config import ConfigError, UserError
from lm.data import Batches, fingerprint, load_tokenizer, merge_states, train_batches
from lm.experiment import Experiment
from lm.optim import RollBack
from lm.parallel import processes
from lm.training.advance import Advance, UnequalError
from lm.training.agreement import Agreement
from lm.training.assembly import (
    Assembly,
    ImportParams,
    assemble,
    check_batch_size,
    first_params,
    set_up_jax,
)
from lm.training.checkpoints import Checkpoints, Restored
from lm.training.diagnosis import find_first_bad
from lm.training.events import Events
from lm.training.health import Counters, Finished, Health, SickRunError, Verdict, read_saved
from lm.training.measuring import Evaluate, Measuring
from lm.training.order import Detours, PassedOver, chain
from lm.training.recorder import Recorder
from lm.training.state import TrainState
from lm.training.step import means
from lm.training.stopping import StoppedError, Stopping, stop_requested
from lm.training.timeline import Timeline, age, read_seconds
from lm.training.watchdog import Watchdog
from lm.training.workdir import check_config, check_data, locked, open_workdir, read_starts, save_config, write_record


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
        timeline: Timeline | None = None,
    ) -> None:
        """Takes the parts; restores nothing and runs nothing yet."""
        self.assembly = assembly
        self.config = assembly.experiment
        self.batches = batches
        self.checkpoints = checkpoints
        self.measuring = Measuring(self.config, workdir, evaluate)
        self.import_params = import_params
        self.workdir = workdir
        self.counters = Counters()
        self.step = 0
        self._timeline = Timeline(self.config.health.slow_factor) if timeline is None else timeline
        self._timeline.expect("evaluate", self.config.evaluation.steps_worth(self.config.batch_size))
        self._events = Events(workdir, jax.process_index())
        self._health = Health(self.config.health, self._events, workdir)
        self._detours = Detours(workdir)
        # A step that asks for more than going on, and what it asks for.
        self._verdict: tuple[Verdict, Finished] | None = None
        self._agreement = Agreement(assembly)
        # Programs of several virtual CPU devices that are in flight together can starve each other of threads.
        on_cpu = parallel.platform_of(assembly.mesh) == "cpu"
        self._one_at_a_time = on_cpu and assembly.mesh.size > 1

    def restore(self) -> TrainState:
        """Returns the newest sound state, or the first one; sets the data and the counters to match."""
        found = self.checkpoints.restore(self.assembly.state)
        starts = read_starts(self.workdir)
        if found is not None:
            self.batches.set_state(read_saved(found.data)[0])
        seconds = read_seconds(self.workdir, 0 if found is None else found.step)
        self._timeline.resume(seconds, age(starts) if starts else 0.0)
        state = self._go_on_from(found)
        self._detours.forget_after(self.step)
        # Killed after a roll back and before the next checkpoint: what was passed over is passed over again.
        while self.batches.get_state()["batches"] < self._detours.batch_number(self.step + 1) - 1:
            next(self.batches)
        return state

    def _go_on_from(self, found: Restored | None) -> TrainState:
        """Returns the state of a checkpoint, or the first one; sets step and counters to match."""
        self.step = 0 if found is None else found.step
        self.counters = Counters() if found is None else read_saved(found.data)[1]
        if found is not None:
            return found.state
        state = self.assembly.init()
        if self.config.init_from is not None:
            params = first_params(self.assembly, self.config.init_from, self.import_params)
            average = self.config.optimizer.average
            state = state._replace(params=params, average=None if average is None else average.init(params))
        return state

    def run(self, state: TrainState, asked: threading.Event) -> bool:
        """Trains to the last step and evaluates; returns False if it was asked to stop before."""
        self._stopping = Stopping(asked, self._agreement.any_process)
        self._recorder = Recorder(self.assembly, self.workdir, self.step, self._timeline)
        patience = self.config.health.first_patience
        watchdog = Watchdog(self._timeline, self._events, lambda: self.step, self._recorder.warn, patience)
        box = [state]
        try:
            with (
                self.assembly.placed(),
                self._timeline.listening(),
                watchdog.watching(),
            ):
                if self.measuring.is_owed(self.step) and self._evaluate(box[0], whole=False, again=True):
                    self._save(box[0])
                finished = self._run_steps(box) and self._evaluate(box[0], whole=True)
                self._save(box[0])
                self.checkpoints.wait()
            self._recorder.say_goodbye(self.step, self.counters, self.batches.statistics(), finished=finished)
            return finished
        except UserError:
            # Something outside the state is wrong (data, disk): what was computed is kept. Of many processes the
            # others do not know of it and would not save with this one.
            if box and jax.process_count() == 1:
                self._save(box[0])
                self.checkpoints.wait()
            raise
        finally:
            self._events.close()
            self._recorder.close()

    def _run_steps(self, box: list[TrainState]) -> bool:
        """Runs steps, leaving the newest state in `box`; returns whether the run is done."""
        advance = Advance(self.assembly)
        while True:
            done = self._run_good_steps(advance, box)
            if self._verdict is None:
                return done
            (verdict, finished), self._verdict = self._verdict, None
            if verdict is Verdict.STOP:
                raise self._too_many_skipped(box[0], finished)
            self._roll_back(box, finished)

    def _run_good_steps(self, advance: Advance, box: list[TrainState]) -> bool:
        """Runs steps until the run is done, is to stop, or a step asks for more than going on."""
        pending: Finished | None = None
        while self.step < self.config.num_steps and not self._stopping.is_due():
            try:
                with self._timeline.phase("data"):
                    batch = next(self.batches, None)
            except UserError:
                # The state that will be saved holds this step, so its figures must be down too.
                self._note(pending)
                raise
            if batch is None:  # data.num_epochs are over
                break
            self._recorder.meter.waited(self._timeline.last)
            last, pending = pending, self._advance(advance, box, batch)
            # Written down one step late: while this step runs, the last one's figures are read.
            self._note(last)
            if self._verdict is None and (self._due() or self._health.is_on_edge(self.counters)):
                self._note(pending)
                pending = None
            if self._verdict is not None:
                return False
            if self._due():
                self._evaluate_and_save(box[0])
                self._recorder.meter.restart()
        self._note(pending, last=not self._stopping.is_due())
        return not self._stopping.is_due() or self.step >= self.config.num_steps

    def _advance(self, advance: Advance, box: list[TrainState], batch: Batch) -> Finished:
        """Dispatches one step; the first of its kind also compiles it."""
        placed, state, number = self.assembly.place(batch), self.batches.get_state(), self.step + 1
        word = self._agreement.say(self.batches, self._stopping.is_asked())
        finished = Finished(number, {}, word, state["batches"], batch, self.batches.document_ids(), state)
        with self._timeline.phase("compile" if advance.compiles(number) else "step"):
            try:
                box[0], metrics = advance(box[0], placed, number)
            except UnequalError as error:
                raise self._health.stop(
                    finished, "the hardware computed one step twice, unequally", str(error)
                ) from error
            if self._one_at_a_time:
                jax.block_until_ready((metrics, word))
        # On a CPU a step is over when its dispatch is, though it is noted a step later.
        is_over = all(leaf.is_ready() for leaf in jax.tree.leaves(metrics))
        self.step = number
        return finished._replace(metrics=metrics, ended=time.perf_counter() if is_over else None)

    def _too_many_skipped(self, state: TrainState, finished: Finished) -> SickRunError:
        """Looks into a step that changed nothing, and returns the report."""
        key = jax.random.fold_in(state.key, finished.step - 1)
        finding = find_first_bad(self.assembly, state.params, self.assembly.place(finished.batch), key)
        count = self.counters.skipped_in_a_row
        return self._health.stop(finished, f"{count} updates in a row were not finite or out of bounds", finding)

    def _roll_back(self, box: list[TrainState], finished: Finished) -> None:
        """Goes back to the checkpoint before a spike, and on with the batch after it."""
        spikes = self.config.health.spikes
        assert isinstance(spikes, RollBack)
        # Room for the state that is restored.
        box.clear()
        found = self.checkpoints.restore_before(self.assembly.state, finished.step)
        to = 0 if found is None else found.step
        left_out = finished.number - self._detours.batch_number(to + 1) + 1
        self._detours.forget_after(to)
        times = sum(one.after == to for one in self._detours.found)
        if times == spikes.max_times:
            why = f"{times} roll backs to step {to} did not get past the spike that followed"
            raise self._health.stop(finished, why, "the loss or the gradient is finite and out of bounds")
        # Killed before the roll back is written down, the run comes here again; killed after, it goes on from it.
        self.checkpoints.forget_after(to)
        detour = PassedOver(after=to, batches=left_out, spike=finished.step)
        self._detours.add(detour, write=jax.process_index() == 0)
        self._timeline.go_back(read_seconds(self.workdir, to))
        box.append(self._go_on_from(found))
        self.batches.set_state(finished.data_state)
        self._recorder.go_back(to)
        self.measuring.forget()
        self._events.write("roll_back", finished.step, to_step=to, batches_passed_over=left_out)
        self._recorder.say(f"step {finished.step} was a spike: back to step {to}, passing over {left_out} batches")

    def _due(self) -> bool:
        every = (self.config.evaluation.every, self.config.checkpoint.every)
        return any(n is not None and self.step % n == 0 for n in every)

    def _note(self, finished: Finished | None, *, last: bool = False) -> None:
        """Counts one finished step, and writes it down if it is time to."""
        if finished is None:
            return
        step = finished.step
        with self._timeline.phase("step"):
            values = means(jax.device_get(finished.metrics))
        ended = time.perf_counter() if finished.ended is None else finished.ended
        self._timeline.step_done()
        digest, stop = self._agreement.hear(finished.word)
        self._stopping.hear(stop)
        self.counters.data_order = chain(self.counters.data_order, digest)
        finished = finished._replace(order=self.counters.data_order)
        self.counters.seen_tokens += int(values["seen_tokens"])
        verdict = self._health.judge(finished, values, self.counters)
        if verdict is not Verdict.GO_ON:
            self._verdict = (verdict, finished)
        data = self.batches.statistics()
        self._recorder.stepped(step, values, self.counters, data, finished.order, ended=ended, last=last)

    def _evaluate_and_save(self, state: TrainState) -> None:
        if self.measuring.is_due(self.step) and not self._evaluate(state, whole=False):
            return
        # The last step is saved after its evaluation, with its figures.
        if self.step % self.config.checkpoint.every == 0 and self.step < self.config.num_steps:
            self._save(state)

    def _evaluate(self, state: TrainState, *, whole: bool, again: bool = False) -> bool:
        """Returns whether it came to its end; if the run is asked to stop, the next start does it instead.

        With `again`, or `whole`, its figures take the place of those that the step may have in the log already.
        """
        with self._timeline.phase(self.config.evaluation.phase(whole=whole)):
            try:
                figures = self.measuring.measure(self.step, state, self._stopping.check, whole=whole)
            except StoppedError:
                return False
        if figures:
            # Whole: a finished run that is started again, or data that ended where an evaluation was due.
            self._recorder.evaluated(self.step, figures, again=again or whole)
        return True

    def _save(self, state: TrainState) -> None:
        """Saves the state; of one that is saved already, the held-out figures that it was saved without."""
        with self._timeline.phase("save"):
            states = [json.loads(text) for text in processes.gather(json.dumps(self.batches.get_state()))]
            whole = merge_states(list({state["first"]: state for state in states}.values()))
            data = {"batches": whole, "counters": dataclasses.asdict(self.counters)}
            self.checkpoints.save(state, data, self.measuring.figures(self.step))


def train(
    experiment: Experiment,
    workdir: str,
    make_evaluate: Callable[[Assembly], Evaluate],
    *,
    force_config: bool = False,
    take_over: bool = False,
    import_params: ImportParams | None = None,
) -> bool:
    """Trains a run to its end, from its newest checkpoint if it has one.

    Args:
      experiment: the resolved config.
      workdir: folder of the run.
      make_evaluate: makes the held-out evaluation of this run.
      force_config: go on although the folder holds another config.
      take_over: go on although a run of another machine may be alive in the folder, which ends it.
      import_params: reads `init_from` where that is a folder of another project; None reads only runs.

    Returns:
      Whether the run is finished; False if it was asked to stop.

    Raises:
      UserError: config, data, folder or checkpoint cannot be used.
    """
    experiment.validate()
    timeline = Timeline(experiment.health.slow_factor)
    set_up_jax(experiment.compilation_cache)
    folder = open_workdir(workdir)
    with stop_requested() as asked, processes.first_holds(locked(folder, take_over=take_over)):
        # Only a first start reads it: a run goes on when the folder it came from is gone.
        if not any((folder / "checkpoints").glob("*")) and not os.path.isdir(experiment.init_from or "."):
            raise ConfigError(f"config.init_from: no directory {experiment.init_from}")

        def prepare() -> None:
            check_config(folder, experiment, force_config=force_config)
            load_tokenizer(experiment.data.tokenizer, experiment.data, folder / "tokenizer")

        processes.first(prepare)
        tokenizer = load_tokenizer(experiment.data.tokenizer, experiment.data, folder / "tokenizer")
        assembly = assemble(experiment, tokenizer)
        check_batch_size(experiment, assembly.mesh)
        batches = train_batches(
            experiment.data, experiment.objective, tokenizer, experiment.batch_size, *assembly.row_block()
        )
        checkpoints = Checkpoints(folder, experiment.checkpoint)
        try:
            loop = TrainLoop(assembly, folder, batches, checkpoints, make_evaluate(assembly), import_params, timeline)
            state = loop.restore()
            processes.first(lambda: _record(loop, force_config))
            finished = loop.run(state, asked)
        except BaseException:
            # Of many processes the others do not know of it and would not close with this one.
            if jax.process_count() == 1:
                checkpoints.close()
            raise
        finally:
            batches.close()
        checkpoints.close()
        return finished


def _record(loop: TrainLoop, force_config: bool) -> None:
    """Writes this start and its config down, unless the text is not what the run has read so far."""
    data = fingerprint(loop.config.data)
    if loop.step:
        check_data(loop.workdir, data, force_config=force_config)
    facts = {
        "from_step": loop.step,
        "data_fingerprint": data,
        "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(loop.assembly.state.params)),
    }
    save_config(loop.workdir, loop.config)
    write_record(loop.workdir, loop.config, loop.assembly.device_mesh, facts)
