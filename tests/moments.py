"""The moments in which the soak program kills: how they are seen from outside, and how a run is halted inside one.

All is read from the workdir, as a stranger would. A moment is hit if it still shows once all processes stand still.
"""

import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from typing import Literal

EVERY = 10  # steps between checkpoints, and between evaluations
LIMIT = 900.0  # seconds after which a process counts as hung


class Watched:
    """What a workdir shows of the start of a run that is about to be made."""

    def __init__(self, workdir: pathlib.Path) -> None:
        self._log, self._record, self._checkpoints = (
            workdir / "metrics.jsonl",
            workdir / "run.json",
            workdir / "checkpoints",
        )
        self._starts_before = self._starts()
        self._log_before = self._inode(self._log)
        self._folders_before = set(self._folders())
        self.first_step = -1
        self.step = self.evaluated = 0

    @staticmethod
    def _inode(path: pathlib.Path) -> int:
        try:
            return path.stat().st_ino
        except OSError:
            return 0

    def _starts(self) -> list[dict]:
        return json.loads(self._record.read_text())["starts"] if self._record.exists() else []

    def _folders(self) -> dict[tuple[str, int], str]:
        try:
            return {(entry.name, entry.inode()): entry.path for entry in os.scandir(self._checkpoints)}
        except OSError:
            return {}

    def look(self) -> None:
        """Reads how far the run has come; of a start that has not begun yet, the last one's."""
        if self.first_step < 0:
            starts = self._starts()
            if len(starts) > len(self._starts_before):
                self.first_step = self.step = starts[-1]["from_step"]
        # The log is written anew once a start begins.
        if self.first_step < 0 or self._inode(self._log) in (0, self._log_before):
            return
        with self._log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 20_000))
            lines = file.read().split(b"\n")[:-1]
        for line in lines[1:] if len(lines) > 1 else lines:
            found = json.loads(line)
            if found["split"] == "train":
                self.step = found["step"]
            else:
                self.evaluated = found["step"]

    def last_step(self) -> int:
        """Returns the last step in the log, of whichever start."""
        lines = self._log.read_bytes().split(b"\n")[:-1] if self._log.exists() else []
        return max((json.loads(line)["step"] for line in lines[-3:]), default=0)

    @property
    def has_begun(self) -> bool:
        return self.first_step >= 0

    @property
    def steps_done(self) -> int:
        return self.step - self.first_step if self.has_begun else 0

    def folders(self, *, ending: str = "", holding: str = "") -> list[str]:
        """Returns the folders of this start among the checkpoints."""
        new = {key: path for key, path in self._folders().items() if key not in self._folders_before}
        return [
            path
            for (name, _), path in new.items()
            if ((name.endswith(ending) and name[0].isdecimal()) if ending else ".orbax-checkpoint-tmp" in name)
            and (not holding or os.path.exists(f"{path}/{holding}"))
        ]

    def has_saved(self) -> bool:
        return any(name.isdecimal() for name, _ in set(self._folders()) - self._folders_before)


# Each returns whether the moment is now: (what is seen, the first step at which it may be).
MOMENTS: dict[str, Callable[[Watched, int], bool]] = {
    "compilation": lambda seen, step: seen.has_begun and seen.steps_done == 0,
    "resume": lambda seen, step: 1 <= seen.steps_done <= 3,
    "step": lambda seen, step: seen.step >= step and seen.step % EVERY != 0,
    "evaluation": lambda seen, step: seen.step >= step and seen.step % EVERY == 0 and seen.evaluated < seen.step,
    "write": lambda seen, step: seen.step >= step and bool(seen.folders()),
    "commit": lambda seen, step: seen.step >= step and bool(seen.folders(holding="manifest.json")),
    "deletion": lambda seen, step: seen.step >= step and bool(seen.folders(ending=".deleted")),
}
# Longest random delay in seconds after a moment has come, so that kills fall into every part of it.
DELAYS = {"compilation": 1.5, "step": 0.02, "evaluation": 0.1, "write": 0.05, "commit": 0.002, "deletion": 0.0005}
# Over in a millisecond, where no look may be missed; they come with a checkpoint.
SHORT = ("commit", "deletion", "resume")
# Come once a start: with a warm compilation cache a quick machine is through the first within a second.
ONCE = ("compilation", "resume")


def _halt(process: subprocess.Popen) -> bool:
    """Stops a process and returns once it stands still; False if it has ended."""
    if process.poll() is not None:
        return False
    process.send_signal(signal.SIGSTOP)
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    if os.WIFSTOPPED(status):
        return True
    process.returncode = os.waitstatus_to_exitcode(status)
    return False


def let_go_on(processes: Iterable[subprocess.Popen]) -> None:
    for process in processes:
        process.send_signal(signal.SIGCONT)


@dataclasses.dataclass
class Hunt:
    """A moment that is waited for from step `step` on, over as many starts as it takes.

    Attributes:
      missed: how often it slipped by.
    """

    moment: str
    step: int
    rng: random.Random
    missed: int = 0

    def hit(self, processes: list[subprocess.Popen], seen: Watched) -> Literal["hit", "passed", "ended"]:
        """Halts the processes inside the moment; "passed" if this start will not come to it any more."""
        is_now, deadline = MOMENTS[self.moment], time.monotonic() + LIMIT
        while True:
            seen.look()
            if not is_now(seen, self.step):
                if any(process.poll() is not None for process in processes):
                    return "ended"
                if self.moment in ONCE and seen.steps_done > EVERY:
                    self.missed += 1
                    return "passed"
                if time.monotonic() > deadline:
                    raise AssertionError(f"neither the moment nor the end came in {LIMIT} s")
                near = self.moment in SHORT and seen.has_begun and (seen.step + 2) % EVERY <= 3
                time.sleep(0 if near else 0.002)
                continue
            time.sleep(self.rng.uniform(0.0, DELAYS.get(self.moment, 0.005) / 2**self.missed))
            stand = [_halt(process) for process in processes]
            seen.look()
            if all(stand) and is_now(seen, self.step):
                return "hit"
            let_go_on(process for process, stands in zip(processes, stand, strict=True) if stands)
            if not all(stand):
                return "ended"
            if self.moment not in ONCE:
                self.missed += 1
