"""Where a run's time goes: phases, goodput, stalls of each kind, and recompilations.

Knows no thread and no log. Phases are `start`, `compile` (the first step of a process), `data` (waiting for a batch),
`step` (dispatching one and waiting for the devices), `evaluate`, `evaluate_whole` (the whole split, where others are of
some batches), `save`. Law: each moment of the loop is in one phase, the innermost; goodput is the time of the phase
`step`, of steps that count, over the time since the run first began.
"""

import calendar
import collections
import contextlib
import dataclasses
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from lm.training.logging import read_metrics

# What of a start is remembered to tell a usual duration from an unusual one.
_REMEMBERED = 101
# Fewer durations of a phase than this tell nothing.
_ENOUGH = 5
# The phases whose duration is compared with that of a whole step.
_OF_A_STEP = ("data", "step")
# How the log calls the seconds of a phase, and those of none.
_PREFIX, _LOST = "time/", "lost"
_BACKEND_COMPILE = "/jax/core/compile/backend_compile_duration"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the loop stands.

    Attributes:
      phase: the innermost one.
      since: when it began, by the timeline's clock.
      number: counts phases, so that two visits are told apart.
    """

    phase: str
    since: float
    number: int


def age(starts: list[dict[str, Any]]) -> float:
    """Returns the seconds since the first of the starts that run.json records, by the wall clock; never negative.

    A start that does not say when it was is taken for one of now.
    """
    try:
        first = calendar.timegm(time.strptime(starts[0]["time"], "%Y-%m-%dT%H:%M:%SZ"))
    except (LookupError, TypeError, ValueError):
        return 0.0
    return max(0.0, time.time() - first)


def read_seconds(workdir: pathlib.Path, step: int) -> dict[str, float]:
    """Returns the seconds of each phase up to a step, or the last one before it that was logged; empty without one.

    They are read from the log and not from checkpoints, whose bits do not depend on any clock.
    """
    found: dict[str, float] = {}
    for line in read_metrics(workdir / "metrics.jsonl"):
        if line["split"] == "train" and line["step"] <= step:
            times = {name.removeprefix(_PREFIX): float(line[name]) for name in line if name.startswith(_PREFIX)}
            found = {name: value for name, value in times.items() if name != _LOST and 0 <= value < math.inf}
    return found


class Timeline:
    """The phases of one process, added to those of the run's earlier starts.

    Args:
      factor: a phase that takes so many times its median is a stall.
      least_seconds: what takes less is never a stall.
      clock: monotonic seconds.
    """

    def __init__(
        self, factor: float = 10.0, least_seconds: float = 1.0, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.clock, self._factor, self._least = clock, factor, least_seconds
        self.seconds: dict[str, float] = collections.defaultdict(float)
        self.stalls: dict[str, int] = dict.fromkeys((*_OF_A_STEP, "evaluate", "save"), 0)
        self.recompilations = 0
        self.last = 0.0
        self._known: dict[str, collections.deque[float]] = collections.defaultdict(
            lambda: collections.deque(maxlen=_REMEMBERED)
        )
        self._expected: dict[str, float] = {}
        self._began = self._mark = clock()
        self._step_seconds = 0.0
        self._before = 0.0
        self.place = Place("start", self._mark, 0)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time inside as that of a phase; `last` tells its seconds afterwards."""
        outer = self.place
        self._close(outer.phase)
        self.place = Place(name, self._mark, outer.number + 1)
        start = self._mark
        try:
            yield
        finally:
            self._close(name)
            self.last = self._mark - start
            self.place = Place(outer.phase, self._mark, self.place.number + 1)
            if self.last > self._least:
                limit = self.limit(name)
                if limit is not None and self.last > limit and name in self.stalls:
                    self.stalls[name] += 1
            if name in _OF_A_STEP:
                self._step_seconds += self.last
            else:
                self._known[name].append(self.last)

    def _close(self, phase: str) -> None:
        now = self.clock()
        self.seconds[phase] += now - self._mark
        self._mark = now

    def step_done(self) -> None:
        """Ends a step: what its phases took together is remembered as the duration of a step."""
        self._known["step"].append(self._step_seconds)
        self._step_seconds = 0.0

    def median(self, phase: str) -> float | None:
        """Returns the usual seconds of a phase, for `data` and `step` of a whole step; None before enough are known."""
        known = self._known["step" if phase in _OF_A_STEP else phase]
        return statistics.median(list(known)) if len(known) >= _ENOUGH else None

    def limit(self, phase: str) -> float | None:
        """Returns beyond how many seconds a phase is a stall; None while nobody can tell."""
        usual = self.median(phase)
        return None if usual is None else max(self._factor * usual, self._least)

    def expect(self, phase: str, steps: float | None) -> None:
        """Says as many steps as a phase certainly takes no longer than, its compilation apart; None tells nothing."""
        if steps is not None:
            self._expected[phase] = steps

    def first_limit(self, phase: str) -> float | None:
        """Returns beyond how many seconds a phase that has no usual time yet is slow; None while nobody can tell.

        By the few times that it was done before; else by what is expected of it, and the compilations so far.
        """
        known, step = self._known[phase], self.median("step")
        if phase not in _OF_A_STEP and known:
            return max(self._factor * max(known), self._least)
        if phase not in self._expected or step is None:
            return None
        compiling = sum(self._known["compile"])
        return max(self._factor * (self._expected[phase] * step + compiling), self._least)

    def compiled(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        """Listens to jax: a compilation inside a step other than a process's first is one too many."""
        del duration_secs, kwargs
        if event == _BACKEND_COMPILE and self.place.phase == "step":
            self.recompilations += 1

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Counts recompilations inside."""
        jax.monitoring.register_event_duration_secs_listener(self.compiled)
        try:
            yield
        finally:
            jax.monitoring.unregister_event_duration_listener(self.compiled)

    def resume(self, seconds: Mapping[str, float], age: float) -> None:
        """Adds what this process took so far to what the run took up to its checkpoint.

        Args:
          seconds: of each phase, as from `read_seconds`.
          age: seconds since the run first began, by the wall clock; 0 at its first start.
        """
        self._close(self.place.phase)
        for phase, value in seconds.items():
            self.seconds[phase] += value
        # A wall clock that went backwards makes a run no younger than what is known of it.
        self._before, self._began = max(age, sum(self.seconds.values())), self._mark

    def go_back(self, seconds: Mapping[str, float]) -> None:
        """Goes back to what the run took up to a checkpoint: what came after it is lost time."""
        self._close(self.place.phase)
        self.seconds.clear()
        self.seconds.update(seconds)

    def so_far(self) -> dict[str, float]:
        """Returns the seconds of each phase up to now."""
        self._close(self.place.phase)
        return dict(self.seconds)

    def figures(self) -> dict[str, float]:
        """Returns goodput, `time/PHASE` in seconds over the whole run, `time/lost`, `stalls/PHASE` of this process, and
        recompilations of this process.

        Lost is what is in no phase of a step that counts: between two starts, and what was done again.
        """
        seconds = self.so_far()
        whole = max(self._before + self._mark - self._began, sum(seconds.values()), 1e-9)
        found = {"goodput": seconds.get("step", 0.0) / whole}
        found |= {f"{_PREFIX}{phase}": value for phase, value in seconds.items()}
        found[_PREFIX + _LOST] = whole - sum(seconds.values())
        found |= {f"stalls/{phase}": float(value) for phase, value in self.stalls.items()}
        return found | {"recompilations": float(self.recompilations)}
