"""How a run is asked to stop, and that all of its processes stop at one place.

Knows no step and no checkpoint. Laws: every process hears of it at the same step, or before the same batch of an
evaluation; nothing that is asked of a start between its begin and its end is lost.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax

# sysexits.h EX_TEMPFAIL: saved, not finished, to be started again.
EXIT_PREEMPTED = 75


class StoppedError(Exception):
    """An evaluation was left off, in all processes before the same batch."""


@contextmanager
def stop_requested() -> Iterator[threading.Event]:
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


class Stopping:
    """Whether a run is to stop.

    Args:
      event: set where this process was asked to.
      any_process: tells whether any process says yes; all must ask together.
    """

    def __init__(self, event: threading.Event, any_process: Callable[[bool], bool]) -> None:
        self._event, self._any_process = event, any_process
        self._alone = jax.process_count() == 1
        # Whether all processes know by now that one was asked to stop.
        self._agreed = False

    def is_asked(self) -> bool:
        """Returns whether this process was asked to stop."""
        return self._event.is_set()

    def hear(self, stop: bool) -> None:
        """Takes note of what all processes said of a step."""
        self._agreed |= stop

    def is_due(self) -> bool:
        """Returns whether to stop now; of many processes all do at the same step, one after they heard of it."""
        return self._event.is_set() if self._alone else self._agreed

    def check(self) -> None:
        """Is called before each batch of an evaluation, by all processes.

        Raises:
          StoppedError: one of them was asked to stop.
        """
        self._agreed = self._agreed or self._any_process(self._event.is_set())
        if self._agreed:
            raise StoppedError
