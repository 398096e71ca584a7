"""The lease of a run's folder: which machine writes to it, where a lock does not reach from machine to machine.

A file beside the run that its holder writes anew every few seconds. Laws: no clock is compared between machines, a
lease that does not change for a stated time is dead; whoever loses it ends at its next sign and writes nothing more.
"""

import contextlib
import json
import os
import pathlib
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from lm.config import UserError
from lm.training.logging import write_atomically

FILE = "lease.json"
# Seconds between two signs of its holder.
BEAT = 10.0
# A lease that shows no sign for so many seconds is dead; file systems over a bucket may show a file a minute late.
EXPIRY = 120.0
# A holder whose folder belongs to another run ends with the status of what has to be mended.
_EXIT_LOST = 2


class LeaseError(UserError):
    """Another machine is training in this folder."""


def this_machine() -> str:
    """Returns a name that no other machine has, and this one has another of after each boot."""
    with contextlib.suppress(OSError):
        return (
            f"{platform.node()} {pathlib.Path('/proc/sys/kernel/random/boot_id').read_text(encoding='utf-8').strip()}"
        )
    return platform.node()


def _end(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)
    os._exit(_EXIT_LOST)


class Lease:
    """A folder's lease for this process.

    Args:
      workdir: the folder.
      machine: the name of this machine.
      beat: seconds between two signs.
      expiry: seconds without a sign after which the lease of another machine is dead.
      end: is told in a sentence that another run took the folder, and ends this one.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        machine: str | None = None,
        beat: float = BEAT,
        expiry: float = EXPIRY,
        end: Callable[[str], None] = _end,
    ) -> None:
        self._path, self._beat, self._expiry, self._end = workdir / FILE, beat, expiry, end
        self._machine = this_machine() if machine is None else machine
        self._owner = {"machine": self._machine, "process": os.getpid(), "since": time.time()}
        self._number = 0

    def _read(self) -> dict[str, Any] | None:
        """Returns what the file says; None where there is none, or none that can be read."""
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None

    def _is_mine(self, found: dict[str, Any]) -> bool:
        return all(found.get(name) == value for name, value in self._owner.items())

    def _sign(self) -> None:
        """Writes the lease; raises OSError where the folder cannot be written to."""
        self._number += 1
        write_atomically(self._path, json.dumps({**self._owner, "sign": self._number}) + "\n")

    def _wait(self, found: dict[str, Any], say: Callable[[str], None]) -> None:
        """Waits for the lease of another machine to die.

        Raises:
          LeaseError: it is alive.
        """
        host = str(found.get("machine")).partition(" ")[0]
        holder = f"process {found.get('process')} on {host}"
        say(f"{self._path.parent} was last used by {holder}; waiting {self._expiry:.0f} s for a sign of it")
        deadline = time.monotonic() + self._expiry
        while time.monotonic() < deadline:
            time.sleep(min(1.0, self._beat / 4))
            now = self._read()
            if now is None:
                return
            if now != found:
                raise LeaseError(
                    f"{self._path.parent} is in use by {holder}; wait for it, choose another --workdir, or give "
                    "--take_over, which ends that run"
                )

    @contextlib.contextmanager
    def held(self, *, take_over: bool, say: Callable[[str], None]) -> Iterator[None]:
        """Holds the lease inside.

        What another process of this machine left is taken at once: a lock keeps two of them apart.

        Args:
          take_over: takes the lease of another machine without waiting for its death.
          say: prints a line.

        Raises:
          LeaseError: another machine holds it.
        """
        found = self._read()
        if found is not None and found.get("machine") != self._machine and not take_over:
            self._wait(found, say)
        self._sign()
        done = threading.Event()
        thread = threading.Thread(target=self._keep, args=(done,), daemon=True, name="lease")
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            found = self._read()
            if found is not None and self._is_mine(found):
                with contextlib.suppress(OSError):
                    self._path.unlink()

    def _keep(self, done: threading.Event) -> None:
        while not done.wait(self._beat):
            found = self._read()
            if found is not None and not self._is_mine(found):
                host = str(found.get("machine")).partition(" ")[0]
                self._end(
                    f"{self._path.parent} was taken over by process {found.get('process')} on {host}; this run ends "
                    "here and writes nothing more"
                )
                return
            # A disk that takes nothing now may do so later.
            with contextlib.suppress(OSError):
                self._sign()
