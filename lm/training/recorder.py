"""Writes a run's figures down: the line of metrics.jsonl, the terminal, the speed and the time behind them.

Knows no device: figures come as plain numbers. Law: what is written depends on the clock in the
figures of speed and of time only.
"""

import math
import pathlib
import sys
from collections.abc import Mapping

import jax

from lm.experiment import Experiment
from lm.parallel import processes
from lm.training.assembly import Assembly
from lm.training.health import Counters
from lm.training.logging import MetricsWriter, Progress
from lm.training.meter import Meter
from lm.training.timeline import Timeline


class Recorder:
    """The records of one start of a run.

    Args:
      assembly: the parts of the run.
      workdir: its folder.
      step: number of updates done; lines of later ones are taken back.
      timeline: where its time goes.
    """

    def __init__(self, assembly: Assembly, workdir: pathlib.Path, step: int, timeline: Timeline) -> None:
        self._config: Experiment = assembly.experiment
        self._workdir, self._timeline = workdir, timeline
        # Of many processes only the first writes and speaks.
        self._is_first = processes.is_first()
        self._writer = self._open(step)
        self._progress = Progress(self._config.logging if self._is_first else None, step, self._config.num_steps)
        self.meter = Meter(self._config, assembly)

    def _open(self, step: int) -> MetricsWriter:
        return MetricsWriter(self._workdir if self._is_first else None, self._config.logging, step)

    def go_back(self, step: int) -> None:
        """Takes back the lines of steps after one that the run went back to."""
        self._writer.close()
        self._writer = self._open(step)
        self.meter.restart()

    def stepped(
        self,
        step: int,
        values: Mapping[str, float],
        counters: Counters,
        data: Mapping[str, float],
        order: str,
        *,
        ended: float,
        last: bool,
    ) -> None:
        """Notes one finished step, and writes it down if it is time to.

        Args:
          step: its number.
          values: its figures.
          counters: of the run, this step included.
          data: figures of the data.
          order: hash of the data read up to it.
          ended: `time.perf_counter()` when it was done.
          last: whether no other step follows in this process.
        """
        self.meter.stepped(values["seen_tokens"], ended)
        self._progress.update(step, values["loss"], self.meter.tokens_per_second)
        if step % self._config.logging.every and step not in (1, self._config.num_steps) and not last:
            return
        totals = {
            "total_tokens": counters.seen_tokens,
            "flops": self.meter.step_flops,
            "total_flops": self.meter.step_flops * step,
            "skipped_steps": counters.skipped_steps,
        }
        speed = self.meter.read()
        if speed:
            speed["data_tokens_per_second"] = data["tokens_per_second"]
            speed["padding_fraction"] = data["padding_fraction"]
        self._writer.write(step, "train", {**values, **totals, **speed, **self._timeline.figures()}, data_order=order)

    def evaluated(self, step: int, figures: Mapping[str, float], *, again: bool) -> None:
        """Writes held-out figures down; with `again`, in the place of those that the step may have already."""
        if again:
            self._writer.take_back(step, "validation")
        self._writer.write(step, "validation", figures)
        self._progress.say(
            f"step {step}: held-out loss {figures['nll']:.4f} nats/token, "
            f"{figures['bits_per_byte']:.4f} bits/byte (unigram entropy {figures['unigram_bits_per_byte']:.4f})"
        )

    def say(self, text: str) -> None:
        """Prints a line."""
        self._progress.say(text)

    def warn(self, text: str) -> None:
        """Prints what is of this process and not of the run, whichever process it is."""
        if self._is_first:
            self.say(text)
        else:
            print(f"process {jax.process_index()}: {text}", file=sys.stderr, flush=True)

    def say_goodbye(self, step: int, counters: Counters, data: Mapping[str, float], *, finished: bool) -> None:
        """Prints how the start ended."""
        if not finished:
            self.say(f"stopped after step {step}; saved. The same command goes on from here.")
            return
        speed = ""
        if math.isfinite(self.meter.overall):  # no step was timed where the run was finished before
            speed = (
                f"; train step {self.meter.overall:,.0f} tokens/s, data pipeline {data['tokens_per_second']:,.0f} "
                f"tokens/s when not waited for, {data['padding_fraction']:.1%} padding"
            )
        done = f"finished: {step} steps, {counters.seen_tokens:,} tokens{speed}"
        self.say(f"{done}. Everything is in {self._workdir}")

    def close(self) -> None:
        """Closes the files and ends the terminal's line."""
        self._progress.close()
        self._writer.close()
