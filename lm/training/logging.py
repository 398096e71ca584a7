"""What a run writes down: metrics.jsonl, TensorBoard event files, and the line on the terminal.

Knows no model and no device. Law: metrics.jsonl is the history of one run; lines of steps that a
resumed run does again are taken back first, so the file equals that of an unbroken run but for times.
"""

import contextlib
import io
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, cast

from absl import logging
from tqdm import tqdm

from lm.config import UserError
from lm.experiment import LoggingConfig

# What in a line of metrics.jsonl is no figure.
WORDS = ("split", "data_order")
# Counts are below it; JSON has integers that no float holds.
_BEYOND_NUMBERS = 1 << 63
# Numbers of damaged lines that are told.
_SHOWN = 5


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Writes a whole file or nothing: to a temporary name, then renamed.

    Raises:
      OSError: the disk does not allow it; nothing is left behind.
    """
    temporary = path.with_name(f"{path.name}.tmp.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # of the same disk
            temporary.unlink(missing_ok=True)
        raise


def append_lines(file: BinaryIO, waiting: bytes) -> tuple[bytes, OSError | None]:
    """Appends lines to an unbuffered file; returns what the disk did not take, for the next try, and why."""
    try:
        while waiting:
            waiting = waiting[file.write(waiting) :]
    except OSError as error:
        return waiting, error
    return waiting, None


def read_log(path: pathlib.Path, is_sound: Callable[[dict[str, Any]], bool]) -> Iterator[dict[str, Any]]:
    """Yields the objects of a file with one in each line, those with a step that are sound.

    Others are passed over and told, by the number of the line; a last line cut short by a kill goes without saying.
    """
    damaged = []
    with path.open(encoding="utf-8", errors="replace") if path.is_file() else io.StringIO() as file:
        for number, line in enumerate(file, start=1):
            try:
                found = json.loads(line)
            except (ValueError, RecursionError):
                found = None
            if isinstance(found, dict) and _is_step(found.get("step")) and is_sound(found):
                yield found
            elif line.endswith("\n"):
                damaged.append(number)
    if damaged:
        shown = ", ".join(map(str, damaged[:_SHOWN])) + (", ..." if len(damaged) > _SHOWN else "")
        logging.warning("%s: %d damaged line(s) passed over: %s", path, len(damaged), shown)


def read_metrics(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Yields the lines of a metrics.jsonl; damaged ones are passed over, as `read_log` does."""
    return read_log(path, _is_metrics)


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _BEYOND_NUMBERS


def _is_metrics(line: dict[str, Any]) -> bool:
    if not isinstance(line.get("split"), str):
        return False
    return all(isinstance(value, str) if name in WORDS else _is_figure(value) for name, value in line.items())


def _is_figure(value: Any) -> bool:
    if isinstance(value, int):
        return abs(value) < _BEYOND_NUMBERS
    return isinstance(value, float) or value in ("nan", "inf", "-inf")


class _EventFile:
    """TensorBoard's file of a run, made with its first figures: the import takes a second, which no start waits for.

    The thread that writes it has ended once the disk did not take something; what comes later is left out then.
    """

    def __init__(self, workdir: pathlib.Path, first_step: int) -> None:
        self._folder, self._first_step, self._writer = str(workdir / "tensorboard"), first_step, None
        self._is_lost = False

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Adds the figures of a step."""
        if self._is_lost:
            return
        # Generated classes, which type checkers cannot see.
        from tensorboard.compat.proto import event_pb2, summary_pb2

        scalars = [cast(Any, summary_pb2).Summary.Value(tag=f"{split}/{k}", simple_value=v) for k, v in values.items()]
        summary = cast(Any, summary_pb2).Summary(value=scalars)
        with self._telling():
            self._open(event_pb2).add_event(
                cast(Any, event_pb2).Event(step=step, wall_time=time.time(), summary=summary)
            )

    def close(self) -> None:
        """Flushes and closes it."""
        with self._telling():
            if self._writer is not None and not self._is_lost:
                self._writer.close()

    def _open(self, events: Any) -> Any:
        if self._writer is None:
            from tensorboard.summary.writer.event_file_writer import EventFileWriter

            self._writer = EventFileWriter(self._folder)
            if self._first_step:
                # Tells TensorBoard to forget what an interrupted run logged after this step.
                start = events.SessionLog(status=events.SessionLog.START)
                event = events.Event(step=self._first_step + 1, wall_time=time.time(), session_log=start)
                self._writer.add_event(event)
        return self._writer

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._is_lost = True
            logging.error("tensorboard/ cannot be written (%s); this start writes no more of it", error.strerror)


class LogError(UserError):
    """The history of a run cannot be written."""


class MetricsWriter:
    """Appends figures to metrics.jsonl and to a TensorBoard event file."""

    def __init__(self, workdir: pathlib.Path | None, config: LoggingConfig, first_step: int) -> None:
        """Opens both files.

        Args:
          workdir: of the run; None writes nothing, as all processes but the first do.
          config: whether to write event files.
          first_step: number of updates done; later lines of an interrupted run are taken back.

        Raises:
          LogError: metrics.jsonl cannot be written.
        """
        self._file: BinaryIO | None = None
        # Lines that a full disk did not take yet.
        self._waiting = b""
        self._is_full = False
        self._events = None
        if workdir is None:
            return
        self._path = workdir / "metrics.jsonl"
        try:
            self._file = self._reopen(lambda line: line["step"] <= first_step)
        except OSError as error:
            raise LogError(
                f"{self._path} cannot be written ({error.strerror}); move it away, or mend the disk"
            ) from error
        self._events = _EventFile(workdir, first_step) if config.tensorboard else None

    def _reopen(self, is_kept: Callable[[dict[str, Any]], bool]) -> BinaryIO:
        if self._path.exists():
            kept = [line for line in read_metrics(self._path) if is_kept(line)]
            write_atomically(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        return self._path.open("ab", buffering=0)

    def take_back(self, step: int, split: str) -> None:
        """Takes back the line of a step that is measured again.

        Where the disk does not allow it, says so: the line stays, before the new one.
        """
        if self._file is None:
            return
        try:
            old, self._file = self._file, self._reopen(lambda line: (line["step"], line["split"]) != (step, split))
            old.close()
        except OSError as error:
            why = error.strerror
            logging.error("%s: the old %s line of step %d could not be taken back (%s)", self._path, split, step, why)

    def write(self, step: int, split: str, values: Mapping[str, float], **notes: str) -> None:
        """Writes one line; figures that are not finite are written as strings, so that the file stays JSON.

        Args:
          step: number of updates done.
          split: "train" or "validation".
          values: figures by name.
          **notes: words for metrics.jsonl only.
        """
        if self._file is None:
            return
        shown = {k: v if math.isfinite(v) else str(v) for k, v in values.items()}
        line = json.dumps({"step": step, "split": split, **notes, **shown}) + "\n"
        self._waiting += line.encode()
        trouble = self._append(self._file)
        if trouble and not self._is_full:
            logging.error("%s cannot be written (%s); its lines are kept and tried again", self._path, trouble.strerror)
        self._is_full = trouble is not None
        if self._events is not None:
            self._events.write(step, split, values)

    def _append(self, file: BinaryIO) -> OSError | None:
        try:
            if not self._path.exists():
                # Deleted underneath: what is written now at least is kept.
                self._file = self._path.open("ab", buffering=0)
                file.close()
                file = self._file
        except OSError as error:
            return error
        self._waiting, trouble = append_lines(file, self._waiting)
        return trouble

    def close(self) -> None:
        """Flushes and closes both files; says how many lines are lost."""
        if self._file is not None:
            self._waiting, trouble = append_lines(self._file, self._waiting)
            if trouble:
                lost = self._waiting.count(b"\n")
                logging.error("%s: its last %d line(s) are lost (%s)", self._path, lost, trouble.strerror)
            self._file.close()
            # A second close, as after a roll back that could not open the file anew, has nothing to do.
            self._file = None
        if self._events is not None:
            self._events.close()


def _speed(tokens_per_second: float) -> str:
    """The first step of a process is compilation and has no speed."""
    return "" if math.isnan(tokens_per_second) else f"  {tokens_per_second:,.0f} tokens/s"


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours:02}:{rest // 60:02}:{rest % 60:02}"


class Progress:
    """The terminal's view of a run: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, config: LoggingConfig | None, first_step: int, num_steps: int) -> None:
        """Starts at `first_step` of `num_steps`; without a config it is silent, as all processes but the first are."""
        self._silent = config is None
        wanted = "none" if config is None else config.progress
        if wanted == "auto":
            wanted = "bar" if sys.stderr.isatty() else "lines"
        self._lines = wanted == "lines"
        self._num_steps = num_steps
        self._started, self._first, self._shown = time.monotonic(), first_step, 0.0
        self._bar = None
        if wanted == "bar":
            self._bar = tqdm(initial=first_step, total=num_steps, unit="step", dynamic_ncols=True, desc="train")

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Shows that `step` updates are done."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}{_speed(tokens_per_second)}", refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        if self._lines and (now - self._shown > 5 or step == self._num_steps):
            self._shown = now
            left = (now - self._started) / max(step - self._first, 1) * (self._num_steps - step)
            print(
                f"step {step}/{self._num_steps}  loss {loss:.4f}{_speed(tokens_per_second)}  {_duration(left)} left",
                file=sys.stderr,
                flush=True,
            )

    def say(self, text: str) -> None:
        """Prints a line without disturbing the bar."""
        if self._silent:
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends the bar's line."""
        if self._bar is not None:
            self._bar.close()
