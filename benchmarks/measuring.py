"""Measures contenders side by side: each in a process of its own, round by round, the same cores for all.

Knows nothing of models. Laws: contenders never run at the same time; what is compared is the median of
ratios within a round, so that what else the machine does falls on all of them; first calls, which
compile, are timed apart.
"""

import contextlib
import dataclasses
import importlib
import multiprocessing
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

MATMUL = "matmul"
MEBIBYTE = 2**20
ROOT = pathlib.Path(__file__).parent.parent


class Sample(NamedTuple):
    """Seconds that passed, and seconds that all threads of the contender's process computed."""

    clock: float
    processor: float


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
    """A contender could not be made or run; the message is its last line."""


def serve(descriptor: int) -> None:
    """Runs in the contender's process: receives the contender, does what it is told, and answers with a Sample."""
    connection, name = Connection(descriptor), "contender"
    try:
        contender = connection.recv()
        name = contender.name
        work = contender.make(*contender.arguments)
        product, flops = work.matmul
        parts = {**work.parts, MATMUL: lambda: flops / min(_clock(product) for _ in range(5))}
        product()
        connection.send(None)
        while True:
            part = connection.recv()
            if part is None:
                facts = {k: v() if callable(v) else v for k, v in work.facts.items()}
                connection.send({"resident_bytes": peak_resident_bytes(), **facts})
                return
            started, processor = time.perf_counter(), time.process_time()
            result = parts[part]()
            sample = Sample(time.perf_counter() - started, time.process_time() - processor)
            connection.send((sample, result if isinstance(result, float | int) else None))
    except EOFError:
        return
    except Exception as error:
        last = traceback.format_exc().strip().splitlines()[-1]
        connection.send(ContenderError(f"{name}: {last} ({type(error).__name__})"[:300]))


def _clock(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def peak_resident_bytes() -> int:
    """Returns the most memory that this process has had, libraries included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Worker:
    """The process of a contender; made at once, and waits to be told what to do."""

    def __init__(self, contender: Contender) -> None:
        """Starts the process and waits until its work is made.

        Raises:
          ContenderError: it could not be made.
        """
        self.contender = contender
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
        with contextlib.suppress(ConnectionError):  # _receive says how it ended
            self._connection.send(contender)
        self._receive()

    def run(self, part: str) -> tuple[Sample, float | None]:
        """Runs a part once; returns its times and the number it gave, if any.

        Raises:
          ContenderError: it raised, or its process ended.
        """
        self._connection.send(part)
        return self._receive()

    def close(self) -> dict[str, Any]:
        """Ends the process and returns its facts."""
        self._connection.send(None)
        facts = self._receive()
        self._process.wait()
        return facts

    def stop(self) -> None:
        """Ends the process whatever it does."""
        self._process.kill()
        self._process.wait()

    def _receive(self) -> Any:
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


@dataclasses.dataclass
class Row:
    """What one contender did in one part of a subject.

    Attributes:
      subject: what was run.
      dtype: of computation.
      part: of it.
      who: the contender.
      first: seconds of the first call, which compiles.
      first_result: the number that it gave, such as a loss.
      samples: of the rounds.
      tokens: of one call.
      flops: the model's operations of one call, or None.
      matmul: FLOP/s of this machine's products in the same run, the best of all contenders.
      facts: of the contender.
      note: what a reader must know of the subject.
    """

    subject: str
    dtype: str
    part: str
    who: str
    first: float
    first_result: float | None
    samples: list[Sample]
    tokens: int
    flops: float | None
    matmul: float = 0.0
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    note: str = ""

    @property
    def seconds(self) -> float:
        """Median of a call by the clock."""
        return statistics.median(s.clock for s in self.samples)

    @property
    def spread(self) -> float:
        """Longest minus shortest, over the median."""
        clocks = [s.clock for s in self.samples]
        return (max(clocks) - min(clocks)) / self.seconds

    def speedup_over(self, other: "Row") -> tuple[float, float]:
        """Returns how many times faster this is: medians over rounds of the ratios by clock and by processor."""
        pairs = list(zip(other.samples, self.samples, strict=True))
        return (
            statistics.median(theirs.clock / ours.clock for theirs, ours in pairs),
            statistics.median(theirs.processor / max(ours.processor, 1e-9) for theirs, ours in pairs),
        )


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Contenders that do the same work.

    Attributes:
      subject: its name.
      dtype: of computation.
      contenders: the first one is ours; it is made before the others start.
      work: by part, tokens and model operations (or None) of one call.
      note: what a reader must know.
    """

    subject: str
    dtype: str
    contenders: tuple[Contender, ...]
    work: dict[str, tuple[int, float | None]]
    note: str = ""

    def measure(self, rounds: int, say: Callable[[str], None]) -> list[Row]:
        """Runs all contenders round by round; one that cannot run is left out, and `say` is told why."""
        workers: list[Worker] = []
        rows: dict[tuple[str, str], Row] = {}
        peaks: list[float] = []
        try:
            for contender in self.contenders:
                try:
                    worker = Worker(contender)
                    found = self._first_calls(worker)
                except ContenderError as failure:
                    say(f"{self.subject} {self.dtype}: left out: {failure}")
                    continue
                workers.append(worker)
                rows.update(found)
            for _ in range(rounds):
                for worker in workers:
                    for part in self.work:
                        rows[worker.contender.name, part].samples.append(worker.run(part)[0])
                peaks.append(max(worker.run(MATMUL)[1] or 0.0 for worker in workers))
            for worker in workers:
                facts = worker.close()
                for part in self.work:
                    row = rows[worker.contender.name, part]
                    row.facts, row.matmul = facts, statistics.median(peaks)
        finally:
            for worker in workers:
                worker.stop()
        return sorted(rows.values(), key=lambda row: list(self.work).index(row.part))

    def _first_calls(self, worker: Worker) -> dict[tuple[str, str], Row]:
        found = {}
        for part, (tokens, flops) in self.work.items():
            sample, result = worker.run(part)
            worker.run(part)  # settles allocators and caches
            name = worker.contender.name
            found[name, part] = Row(
                self.subject, self.dtype, part, name, sample.clock, result, [], tokens, flops, note=self.note
            )
        return found


HEADER = (
    f"{'subject':16} {'dtype':8} {'part':8} {'who':18} {'tokens/s':>10} {'spread':>6} {'GFLOP/s':>8} {'of peak':>7} "
    f"{'cpu s':>8} {'memory':>7} {'first s':>7} {'faster':>7} {'by cpu':>7}"
)


def lines(rows: Iterable[Row]) -> list[str]:
    """Returns the table's lines: one a row; "faster" is ours over theirs, beside theirs, by clock and by processor."""
    found, ours = [], {}
    for row in rows:
        mine = ours.setdefault((row.subject, row.dtype, row.part), row)
        speed = "       -       -" if row.flops is None else f"{row.flops / row.seconds / 1e9:8.1f} {_share(row):>7}"
        ratios = ("", "") if row is mine else tuple(f"{ratio:.2f}" for ratio in mine.speedup_over(row))
        memory = row.facts.get("device_bytes") or row.facts.get("resident_bytes", 0)
        found.append(
            f"{row.subject:16} {row.dtype:8} {row.part:8} {row.who:18} {row.tokens / row.seconds:10,.0f} "
            f"{row.spread:6.0%} {speed:>16} {statistics.median(s.processor for s in row.samples):8.3f} "
            f"{memory / MEBIBYTE:6,.0f}M {row.first:7.1f} {ratios[0]:>7} {ratios[1]:>7}"
        )
    return found


def _share(row: Row) -> str:
    return "-" if row.flops is None or not row.matmul else f"{row.flops / row.seconds / row.matmul:.1%}"


def use_threads(count: int | None) -> int:
    """Limits this process, and those it starts, to `count` cores (None: all that it has); returns how many."""
    cores = sorted(os.sched_getaffinity(0))
    if count is not None:
        os.sched_setaffinity(0, cores[:count])
    return min(count or len(cores), len(cores))
