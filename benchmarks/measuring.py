"""Measures contenders side by side: each in a process of its own, round by round, the same cores for all.

Knows nothing of models. Laws: contenders never run at the same time; what is compared is the median of
ratios within a round, so that what else the machine does falls on all of them; first calls, which
compile, are timed apart.
"""

import contextlib
import dataclasses
import importlib
import math
import multiprocessing
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.results import Row, Sample

ROOT = pathlib.Path(__file__).parent.parent

# Parts that give the machine's own speed: FLOP/s of a matrix product, bytes/s through memory.
MATMUL, COPY = "matmul", "copy"
# What a contender is asked for its facts with.
FACTS = "facts"
# How memory that is not there is called: by XLA, by PyTorch, by Python.
NO_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory", "MemoryError")
# Seconds that contenders have for a first round, and then for their facts, when the time is up.
GRACE = 10.0


@dataclasses.dataclass(frozen=True)
class Work:
    """What a contender can be told to do.

    Attributes:
      parts: by name, functions that return when the work is done.
      matmul: runs one square matrix product in the dtype that is compared; and its operations.
      facts: what is worth knowing beside its times; functions are called at the end.
    """

    parts: dict[str, Callable[[], Any]]
    matmul: tuple[Callable[[], Any], float]
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Named:
    """A function by name: its module needs what only the process that calls it has, and imports.

    Attributes:
      module: where it is.
      function: in it.
    """

    module: str
    function: str

    def __call__(self, *arguments: Any) -> Any:
        return getattr(importlib.import_module(self.module), self.function)(*arguments)


@dataclasses.dataclass(frozen=True)
class Contender:
    """One side of a comparison.

    Attributes:
      name: for the table.
      make: makes its work, in its own process; a function of a module.
      arguments: of `make`.
      python: runs the process; another than ours needs no package that `make` does not.
    """

    name: str
    make: Callable[..., Work]
    arguments: tuple[Any, ...]
    python: str = sys.executable


class ContenderError(Exception):
    """A contender could not be made or run; the message says why in a line."""

    @property
    def lacks_memory(self) -> bool:
        """Whether there was too little memory."""
        return any(words in str(self) for words in NO_MEMORY)


class TimeUpError(ContenderError):
    """A contender gave no answer in time."""


def serve(descriptor: int) -> None:
    """Runs in the contender's process: receives the contender, does what it is told, and answers with a Sample."""
    connection, name = Connection(descriptor), "contender"
    try:
        contender = connection.recv()
        name = contender.name
        work = contender.make(*contender.arguments)
        product, flops = work.matmul
        parts = {**work.parts, MATMUL: lambda: best_speed(product, flops)}
        product()
        connection.send(None)
        while True:
            part = connection.recv()
            if part == FACTS:
                facts = {k: v() if callable(v) else v for k, v in work.facts.items()}
                connection.send({"resident_bytes": peak_resident_bytes(), **facts})
                continue
            started, processor = time.perf_counter(), time.process_time()
            result = parts[part]()
            sample = Sample(time.perf_counter() - started, time.process_time() - processor)
            connection.send((sample, result if isinstance(result, float | int) else None))
    except EOFError:
        return
    except Exception as error:
        why = " ".join(str(error).split())
        connection.send(ContenderError(f"{name}: {type(error).__name__}: {why}"[:300]))


def best_speed(function: Callable[[], Any], amount: float) -> float:
    """Returns how much is done in a second by the quickest of five calls that each do so much."""
    return amount / min(_clock(function) for _ in range(5))


def _clock(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def peak_resident_bytes() -> int:
    """Returns the most memory that this process has had, libraries included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Worker:
    """The process of a contender; made at once, and waits to be told what to do.

    Attributes:
      contender: whose it is.
      until: by `time.monotonic()`, how long it is waited for.
    """

    def __init__(self, contender: Contender, until: float = math.inf) -> None:
        """Starts the process and waits until its work is made.

        Raises:
          ContenderError: it could not be made.
        """
        self.contender, self.until = contender, until
        self._connection, theirs = multiprocessing.Pipe()
        serving = f"from benchmarks import measuring; measuring.serve({theirs.fileno()})"
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [contender.python, "-c", serving],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.DEVNULL,  # what a library prints belongs in no table
        )
        theirs.close()
        try:
            with contextlib.suppress(ConnectionError):  # _receive says how it ended
                self._connection.send(contender)
            self._receive()
        except ContenderError:
            self.stop()
            raise

    def run(self, part: str) -> tuple[Sample, float | None]:
        """Runs a part once; returns its times and the number it gave, if any.

        Raises:
          ContenderError: it raised, or its process ended.
        """
        self._send(part)
        return self._receive()

    def facts(self) -> dict[str, Any]:
        """Returns what the process knows beside its times.

        Raises:
          ContenderError: it raised, or its process ended.
        """
        self._send(FACTS)
        while not isinstance(facts := self._receive(), dict):
            pass  # an answer that nobody waited for
        return facts

    def stop(self) -> None:
        """Ends the process whatever it does."""
        self._process.kill()
        self._process.wait()

    def _send(self, message: Any) -> None:
        with contextlib.suppress(ConnectionError):  # _receive says how the process ended
            self._connection.send(message)

    def _receive(self) -> Any:
        if self.until < math.inf and not self._connection.poll(max(self.until - time.monotonic(), 0.0)):
            raise TimeUpError(f"{self.contender.name}: no answer before the time was up")
        try:
            answer = self._connection.recv()
        except (EOFError, ConnectionError) as error:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
            why = f"its process ended with status {self._process.returncode}"
            raise ContenderError(f"{self.contender.name}: {why}") from error
        if isinstance(answer, ContenderError):
            self.stop()
            raise answer
        return answer


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Contenders that do the same work.

    Attributes:
      subject: its name.
      dtype: of computation.
      contenders: the first one is ours; it is made before the others start.
      work: by part, tokens and model operations (or None) of one call.
      note: what a reader must know.
      copies: whether contenders have the part COPY, which is run once after the rounds.
    """

    subject: str
    dtype: str
    contenders: tuple[Contender, ...]
    work: dict[str, tuple[int, float | None]]
    note: str = ""
    copies: bool = False

    def measure(
        self,
        rounds: int,
        say: Callable[[str], None],
        keep: Callable[[list[Row]], None] = lambda rows: None,
        until: float = math.inf,
    ) -> list[Row]:
        """Runs all contenders round by round; one that cannot run is left out, and `say` is told why.

        One whose memory is taken by the others, as on a device that all share, runs after them, alone.

        Args:
          rounds: at most so many.
          say: prints a line.
          keep: is given the rows after each round.
          until: by `time.monotonic()`, when the time is up: what cannot be made by then is left out.
        """
        rows: list[Row] = []
        waiting = [self.contenders]
        number = 0
        while waiting:
            turns = _Turns(self, number, say, until)
            try:
                for contender in waiting.pop(0):
                    turns.add(contender)
                while turns.workers and turns.num_rounds < rounds and turns.play():
                    keep(rows + turns.finished())
                if turns.workers and turns.num_rounds < rounds:
                    say(f"{self.subject} {self.dtype}: the time is up after {turns.num_rounds} of {rounds} rounds")
                turns.ask_facts()
            finally:
                turns.stop()
            rows.extend(turns.finished())
            waiting += [(contender,) for contender in turns.lacking]
            number += 1
        return sorted(rows, key=lambda row: list(self.work).index(row.part))


class _Turns:
    """Contenders that take turns.

    Attributes:
      workers: processes of those that can run.
      num_rounds: how many were finished.
      lacking: contenders that found no memory beside the others.
    """

    def __init__(self, comparison: Comparison, number: int, say: Callable[[str], None], until: float) -> None:
        self._number = number
        self.workers: list[Worker] = []
        self.num_rounds = 0
        self.lacking: list[Contender] = []
        self._comparison, self._say, self._until = comparison, say, until
        self._rows: dict[tuple[str, str], Row] = {}
        self._peaks: list[float] = []

    def add(self, contender: Contender) -> None:
        """Makes a contender's work and does it twice."""
        try:
            self.workers.append(Worker(contender, self._until))
            self._first_calls(self.workers[-1])
        except ContenderError as failure:
            self._leave_out(contender, failure)

    def play(self) -> bool:
        """Runs a round; returns whether it was finished, for all or for none, before the time was up.

        What is made by then has its first round in any case, if it is quick.
        """
        for worker in self.workers:
            worker.until = self._until if self.num_rounds else max(self._until, time.monotonic() + GRACE)
        samples: dict[tuple[str, str], Sample] = {}
        peak = 0.0
        try:
            for parts in (tuple(self._comparison.work), (MATMUL,)):
                for worker in list(self.workers):
                    try:
                        for part in parts:
                            samples[worker.contender.name, part], result = worker.run(part)
                            peak = max(peak, result or 0.0) if part == MATMUL else peak
                    except TimeUpError:
                        raise
                    except ContenderError as failure:
                        self._leave_out(worker.contender, failure)
        except TimeUpError:
            return False
        for key, row in self._rows.items():
            row.samples.append(samples[key])
        self._peaks.append(peak)
        self.num_rounds += 1
        return True

    def ask_facts(self) -> None:
        """Adds what those that answer know, and then the machine's own speed, to their rows."""
        bandwidth = 0.0
        for worker in self.workers:
            worker.until = max(self._until, time.monotonic() + GRACE)
            try:
                facts = worker.facts()
                for part in self._comparison.work:
                    self._rows[worker.contender.name, part].facts = facts
                if self._comparison.copies:
                    # After the facts: what it copies is no memory that the work needs.
                    bandwidth = max(bandwidth, worker.run(COPY)[1] or 0.0)
            except ContenderError as failure:
                self._say(f"{self._comparison.subject} {self._comparison.dtype}: at the end: {failure}")
        for row in self._rows.values():
            row.matmul, row.bandwidth = statistics.median(self._peaks or [0.0]), bandwidth

    def finished(self) -> list[Row]:
        """Returns the rows of at least one round."""
        return [row for row in self._rows.values() if row.samples]

    def stop(self) -> None:
        """Ends all processes."""
        for worker in self.workers:
            worker.stop()

    def _first_calls(self, worker: Worker) -> None:
        comparison, name = self._comparison, worker.contender.name
        for part, (tokens, flops) in comparison.work.items():
            sample, result = worker.run(part)
            worker.run(part)  # settles allocators and caches
            self._rows[name, part] = Row(
                comparison.subject,
                comparison.dtype,
                part,
                name,
                sample.clock,
                result,
                [],
                tokens,
                flops,
                note=comparison.note,
                turns=self._number,
            )

    def _leave_out(self, contender: Contender, failure: ContenderError) -> None:
        for worker in [worker for worker in self.workers if worker.contender is contender]:
            worker.stop()
            self.workers.remove(worker)
        for part in self._comparison.work:
            self._rows.pop((contender.name, part), None)
        later = failure.lacks_memory and bool(self.workers)
        if later:
            self.lacking.append(contender)
        how = "alone, after the others" if later else "left out"
        self._say(f"{self._comparison.subject} {self._comparison.dtype}: {how}: {failure}")


def use_threads(count: int | None) -> int:
    """Limits this process, and those it starts, to `count` cores (None: all that it has); returns how many."""
    cores = sorted(os.sched_getaffinity(0))
    if count is not None:
        os.sched_setaffinity(0, cores[:count])
    return min(count or len(cores), len(cores))
