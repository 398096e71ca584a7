"""What contenders did: samples of rounds, rows of contenders, and the table that they are printed in.

Knows neither processes nor models. Law: what is compared is the median of ratios within a round, so that
what else the machine does falls on both sides.
"""

import dataclasses
import json
import pathlib
import statistics
from collections.abc import Iterable
from typing import Any, NamedTuple

MEBIBYTE = 2**20
# How our side is called in the table.
OURS = "lm"


class Sample(NamedTuple):
    """Seconds that passed, and seconds that all threads of the contender's process computed."""

    clock: float
    processor: float


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
      moved: bytes that one call cannot but read, or None.
      bandwidth: bytes/s of this machine's memory in the same run, the best of all contenders.
      facts: of the contender.
      note: what a reader must know of the subject.
      turns: a number for each group of contenders that took turns; one that found no room among them ran alone.
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
    moved: float | None = None
    bandwidth: float = 0.0
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    note: str = ""
    turns: int = 0

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
        """Returns how many times faster this is, by clock and by processor: medians over rounds of the ratios.

        Of two that did not take turns, the ratios of their medians: their rounds have nothing to do with each other.
        """
        if self.turns != other.turns:
            processors = [statistics.median(s.processor for s in row.samples) for row in (other, self)]
            return other.seconds / self.seconds, processors[0] / max(processors[1], 1e-9)
        pairs = list(zip(other.samples, self.samples, strict=True))
        return (
            statistics.median(theirs.clock / ours.clock for theirs, ours in pairs),
            statistics.median(theirs.processor / max(ours.processor, 1e-9) for theirs, ours in pairs),
        )


class Record:
    """The file of a program's figures, whole after each of them, so that one that is killed leaves what it had.

    Args:
      facts: of the program and its machine.
      path: of the file; None is none.
    """

    def __init__(self, facts: dict[str, Any], path: pathlib.Path | None) -> None:
        self._found: dict[str, Any] = {**facts, "subjects": {}}
        self._path = path

    def keep(self, subject: str, figures: Any) -> None:
        """Puts the figures of a subject in the place of those that it had."""
        self._found["subjects"][subject] = figures
        if self._path is not None:
            beside = self._path.with_name(f".{self._path.name}.new")
            beside.write_text(json.dumps(self._found, indent=1), encoding="utf-8")
            beside.replace(self._path)


HEADER = (
    f"{'subject':16} {'dtype':8} {'part':8} {'who':18} {'tokens/s':>10} {'spread':>6} {'GFLOP/s':>8} {'of peak':>7} "
    f"{'cpu s':>8} {'memory':>7} {'first s':>7} {'faster':>7} {'by cpu':>7}"
)


def lines(rows: Iterable[Row]) -> list[str]:
    """Returns the table's lines: one a row; "faster" is ours over theirs, beside theirs, by clock and by processor."""
    found, ours = [], {}
    for row in rows:
        place = (row.subject, row.dtype, row.part)
        if row.who == OURS:
            ours[place] = row
        compared = row.who != OURS and place in ours
        ratios = tuple(f"{ratio:.2f}" for ratio in ours[place].speedup_over(row)) if compared else ("", "")
        memory = row.facts.get("device_bytes") or row.facts.get("resident_bytes", 0)
        found.append(
            f"{row.subject:16} {row.dtype:8} {row.part:8} {row.who:18} {row.tokens / row.seconds:10,.0f} "
            f"{row.spread:6.0%} {_speed(row):>16} {statistics.median(s.processor for s in row.samples):8.3f} "
            f"{memory / MEBIBYTE:6,.0f}M {row.first:7.1f} {ratios[0]:>7} {ratios[1]:>7}"
        )
    return found


def _speed(row: Row) -> str:
    """Returns operations, or bytes (marked so), in a second, and their share of what the machine can do."""
    done, peak, unit = (row.moved, row.bandwidth, "B") if row.flops is None else (row.flops, row.matmul, "")
    if done is None:
        return "       -       -"
    share = f"{done / row.seconds / peak:.1%}" if peak else "-"
    return f"{f'{done / row.seconds / 1e9:.1f}{unit}':>8} {share:>7}"
