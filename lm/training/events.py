"""What happened to a run besides training: events.jsonl, one line each, in the order of happening.

Knows no meaning of any event. Laws: lines are only ever added, by all threads of one process whole; metrics.jsonl is
the history of the run, this file that of its starts, so what a restart did again stands here twice. What the disk does
not take is kept for the next try and stops nobody.
"""

import json
import pathlib
import threading
import time
from collections.abc import Iterator
from typing import Any

from absl import logging

from lm.training.logging import append_lines, read_log


class Events:
    """Appends events; processes beyond the first have files of their own, events.1.jsonl and so on."""

    def __init__(self, workdir: pathlib.Path, process: int = 0) -> None:
        """Opens nothing yet: a run to which nothing happens has no such file."""
        self._path = workdir / (f"events.{process}.jsonl" if process else "events.jsonl")
        self._lock = threading.Lock()
        # Lines that a full or read-only disk did not take yet.
        self._waiting = b""

    def write(self, kind: str, step: int, **facts: Any) -> None:
        """Adds a line.

        Args:
          kind: one word.
          step: of the run at which it happened.
          **facts: plain data.
        """
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        line = json.dumps({"time": at, "kind": kind, "step": step, **facts})
        with self._lock:
            self._waiting += line.encode() + b"\n"
            if why := self._append():
                logging.error("%s cannot be written (%s); its lines are kept and tried again", self._path, why)

    def _append(self) -> str | None:
        """Writes what waits; returns why not."""
        try:
            # Unbuffered: what a full disk took a part of is not written twice.
            with self._path.open("ab", buffering=0) as file:
                self._waiting, trouble = append_lines(file, self._waiting)
        except OSError as error:
            trouble = error
        return None if trouble is None else trouble.strerror

    def close(self) -> None:
        """Tries once more to write what waits, and says how many events are lost; what comes later is still written."""
        with self._lock:
            if self._waiting and (why := self._append()):
                logging.error("%s: its last %d event(s) are lost (%s)", self._path, self._waiting.count(b"\n"), why)
                self._waiting = b""


def read_events(workdir: pathlib.Path, kind: str | None = None) -> Iterator[dict[str, Any]]:
    """Yields the events of the first process, all or those of one kind, oldest first."""
    for line in read_log(workdir / "events.jsonl", lambda line: isinstance(line.get("kind"), str)):
        if kind is None or line["kind"] == kind:
            yield line
