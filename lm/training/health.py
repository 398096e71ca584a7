"""Judges each finished step: go on, go back, or stop with a report; and keeps what the report needs.

Knows no device and no checkpoint. Law: the verdict follows from the step's figures and from counters that are saved
with the run, so a run that was killed comes to the same verdicts again.
"""

import dataclasses
import enum
import math
import pathlib
from typing import Any, NamedTuple

from lm.batch import Batch
from lm.config import UserError
from lm.experiment import HealthConfig
from lm.training.agreement import Word
from lm.training.events import Events
from lm.training.step import TrainMetrics

# sysexits.h EX_SOFTWARE: started again the run would come to the same end, so a launcher must not.
EXIT_SICK = 70
# Document ids that a report on the terminal names; events.jsonl has them all.
_SHOWN_IDS = 8


class SickRunError(Exception):
    """A run stopped itself; the message is the report."""


@dataclasses.dataclass
class Counters:
    """What a run has read, saved with it.

    Attributes:
      seen_tokens: tokens read so far, padding left out.
      skipped_steps: updates left out because they were not finite or out of bounds.
      data_order: hash of every batch read so far, in order.
      skipped_in_a_row: those of them that the last steps were.
    """

    seen_tokens: int = 0
    skipped_steps: int = 0
    data_order: str = ""
    skipped_in_a_row: int = 0


def read_saved(data: Any) -> tuple[dict[str, Any], Counters]:
    """Returns what a checkpoint says of the data: the state of the batches, which they check, and the counters.

    Raises:
      UserError: it is damaged.
    """
    counters = data.get("counters") if isinstance(data, dict) else None
    names = {field.name for field in dataclasses.fields(Counters)}
    if not isinstance(counters, dict) or not isinstance(data.get("batches"), dict) or not counters.keys() <= names:
        raise UserError("a checkpoint is damaged: its data are not the state of the batches and the run's counters")
    for name, value in counters.items():
        kind = type(getattr(Counters(), name))
        if type(value) is not kind or (kind is int and value < 0):
            raise UserError(f"a checkpoint is damaged: its {name} cannot be {str(value)[:40]!a}")
    return data["batches"], Counters(**counters)


class Finished(NamedTuple):
    """A step that was dispatched.

    Attributes:
      step: its number, from 1.
      metrics: still on the devices.
      word: what the processes said at it.
      number: of its batch.
      batch: this process's rows of it, on the host.
      document_ids: of these rows.
      data_state: of the data behind it.
      order: hash of the data read up to it, once that is heard.
      ended: `time.perf_counter()` when it was done, if it was before the next one was dispatched; else None.
    """

    step: int
    metrics: TrainMetrics
    word: Word
    number: int
    batch: Batch
    document_ids: list[str]
    data_state: dict[str, Any]
    order: str = ""
    ended: float | None = None


class Verdict(enum.Enum):
    """What is to be done after a step."""

    GO_ON = enum.auto()
    GO_BACK = enum.auto()
    STOP = enum.auto()


class Health:
    """The judge of one run.

    Args:
      config: what is allowed.
      events: where bad steps are written down.
      workdir: of the run, for the commands that a report names.
    """

    def __init__(self, config: HealthConfig, events: Events, workdir: pathlib.Path) -> None:
        self._config, self._events, self._workdir = config, events, workdir

    def judge(self, finished: Finished, values: dict[str, float], counters: Counters) -> Verdict:
        """Counts a step, writes a bad one down, and says what is to be done.

        Args:
          finished: the step.
          values: its figures.
          counters: of the run, changed in place.
        """
        if not values["skipped"]:
            counters.skipped_in_a_row = 0
            return Verdict.GO_ON
        counters.skipped_steps += 1
        counters.skipped_in_a_row += 1
        kind = "spike" if values.get("spike") else "not_finite"
        figures = {name: _plain(values[name]) for name in ("loss", "gradient_norm") if name in values}
        self._events.write(kind, finished.step, **figures, **self.facts(finished))
        if self._config.spikes is not None and self._config.spikes.rolls_back and kind == "spike":
            return Verdict.GO_BACK
        limit = self._config.max_skipped_in_a_row
        return Verdict.STOP if limit is not None and counters.skipped_in_a_row >= limit else Verdict.GO_ON

    def is_on_edge(self, counters: Counters) -> bool:
        """Returns whether one more bad step would stop the run: then no other one is to be dispatched before it."""
        limit = self._config.max_skipped_in_a_row
        return limit is not None and counters.skipped_in_a_row >= limit - 1

    def facts(self, finished: Finished) -> dict[str, Any]:
        """Returns what names the batch of a step, as plain data."""
        return {
            "batch": finished.number,
            "data_order": finished.order,
            "document_ids": finished.document_ids,
            "replay": f"python -m lm.replay --workdir={self._workdir} --step={finished.step}",
        }

    def stop(self, finished: Finished, why: str, finding: str) -> SickRunError:
        """Writes the report down and returns it as the error to raise.

        Args:
          finished: the step at which the run stops.
          why: what happened.
          finding: what looking into it found.
        """
        facts = self.facts(finished)
        self._events.write("stopped", finished.step, why=why, finding=finding, **facts)
        ids = list(dict.fromkeys(finished.document_ids))
        more = f" and {len(ids) - _SHOWN_IDS} more" if len(ids) > _SHOWN_IDS else ""
        return SickRunError(
            f"stopped at step {finished.step}: {why}.\n"
            f"  found: {finding}\n"
            f"  batch {finished.number} of documents {', '.join(ids[:_SHOWN_IDS])}{more}\n"
            f"  see it: {facts['replay']}\n"
            f"  nothing was saved after the last checkpoint; all document ids are in {self._workdir}/events.jsonl"
        )


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
