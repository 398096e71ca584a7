"""Where each process of a run stands: every one gives a sign now and then, the first reads them all.

The signs go through jax's coordination service, which answers while devices hang. Law: nobody waits for another
process, and no clock of another machine is compared; what went wrong here never stops a run.
"""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable
from typing import Protocol

import jax

from lm.parallel.service import client_of_service

_FOLDER = "lm/where"
# Signs that the service of a run of many processes takes in one second.
_SIGNS_PER_SECOND = 16


class Store(Protocol):
    """What of jax's client is used here."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool) -> None:
        """Sets a value for all processes."""

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        """Returns all keys below one, and their values."""
        ...


@dataclasses.dataclass(frozen=True)
class Where:
    """The last sign of a process.

    Attributes:
      process: its number.
      step: that it works on; -1 if it never gave a sign.
      phase: of the loop that it said it was in.
      seconds: for which it said that it was in this phase.
      silent_seconds: since that sign came.
    """

    process: int
    step: int
    phase: str
    seconds: float
    silent_seconds: float

    def __str__(self) -> str:
        if self.step < 0:
            return f"process {self.process}: no sign yet"
        return (
            f"process {self.process}: step {self.step}, phase {self.phase} for {self.seconds:.1f} s, "
            f"last seen {self.silent_seconds:.1f} s ago"
        )


class Whereabouts:
    """The signs of all processes; alone, a process gives none and reads none.

    Args:
      store: what the processes share; None takes jax's.
      process: this one's number.
      number: of processes.
      clock: monotonic seconds.
    """

    def __init__(
        self,
        store: Store | None = None,
        process: int | None = None,
        number: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store: Store | None = client_of_service() if store is None else store
        self._process = jax.process_index() if process is None else process
        self._number = jax.process_count() if number is None else number
        self._clock = clock
        self._next, self._count = -math.inf, 0
        # Of each process its last sign, and when it was first seen here.
        self._seen: dict[int, tuple[str, float]] = {}

    def sign(self, step: int, phase: str, seconds: float) -> None:
        """Says where this process stands, unless it did so a moment ago; the first process looks at the others."""
        now = self._clock()
        if self._number == 1 or self._store is None or now < self._next:
            return
        self._next = now + max(1.0, self._number / _SIGNS_PER_SECOND)
        self._count += 1
        text = json.dumps([self._count, step, phase, seconds])
        # The service is gone with the first process, and the run with it.
        with contextlib.suppress(RuntimeError):
            self._store.key_value_set(f"{_FOLDER}/{self._process}", text, allow_overwrite=True)
            if self._process == 0:
                self._look()

    def _look(self) -> None:
        assert self._store is not None
        now = self._clock()
        for key, text in self._store.key_value_dir_get(_FOLDER):
            process = int(key.rpartition("/")[2])
            if self._seen.get(process, ("", 0.0))[0] != text:
                self._seen[process] = (text, now)

    def read(self) -> list[Where]:
        """Returns where every process stands, as the first process knows it; empty for the others and for one alone."""
        if self._number == 1 or self._process != 0:
            return []
        now, found = self._clock(), []
        for process in range(self._number):
            text, at = self._seen.get(process, ('[0, -1, "", 0.0]', now))
            _, step, phase, seconds = json.loads(text)
            found.append(Where(process, step, phase, seconds, now - at))
        return found
