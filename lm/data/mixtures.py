"""Which source each row of a run comes from.

Owns the proportional interleave of weighted sources. Knows no document and no tokenizer. Law: the source
of row `m` is a closed form of (weights, m), so any process can compute any row's; weights are proportions
of rows (and so of positions), of the whole run, of every stretch of it and of every lane.
"""

import bisect
import dataclasses
import functools
import itertools

# 2**64 divided by the golden ratio, made odd: the multiples of it modulo 2**64 spread more evenly over every
# prefix than any other sequence of multiples (Knuth, The Art of Computer Programming, 6.4). A rational
# interleave would resonate: with two lanes and equal weights each lane would see one source only.
_GOLDEN = 0x9E3779B97F4A7C15
_MODULUS = 1 << 64


@dataclasses.dataclass(frozen=True)
class Interleave:
    """A deterministic low-discrepancy sequence of source numbers.

    Attributes:
      weights: relative share of rows of each source, positive.
    """

    weights: tuple[float, ...]

    @functools.cached_property
    def _ends(self) -> list[int]:
        total = sum(self.weights)
        ends = [int(end / total * _MODULUS) for end in itertools.accumulate(self.weights)]
        # The last end is exact whatever the rounding: every point belongs to a source.
        return [*ends[:-1], _MODULUS]

    def source(self, row: int) -> int:
        """Returns the source of row `row` (batch number times batch size, plus the row in the batch)."""
        return bisect.bisect_right(self._ends, (row * _GOLDEN) % _MODULUS)
