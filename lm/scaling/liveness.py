"""How much memory a list of operations needs: what is written out, until when it is read, and the bytes moved.

Knows neither shardings nor models. Law: an elementwise chain is one kernel; only what a product, a loop or another
kernel reads is written to memory.
"""

from collections.abc import Sequence
from typing import NamedTuple

# Kernels of their own: their results are written to memory, and what they read must be.
KERNELS = (
    "dot_general",
    "ragged_dot",
    "scan",
    "while",
    "gather",
    "scatter",
    "scatter-add",
    "sort",
    "top_k",
    "conv_general_dilated",
    "dynamic_update_slice",
    "concatenate",
    "all_gather",
    "all_to_all",
    "ppermute",
    "reduce_scatter",
)

# What is the same memory under another shape or name.
VIEWS = ("reshape", "squeeze", "transpose", "copy", "stop_gradient", "sharding_constraint", "device_put")
SLICES = ("dynamic_slice", "slice", "split")
# What every reader makes for itself.
REPEATED = ("broadcast_in_dim", "iota")


class Operation(NamedTuple):
    """One operation.

    Attributes:
      name: of the primitive.
      reads: numbers of the arrays that it reads.
      writes: numbers of its results.
      inside: bytes that it needs while it runs.
    """

    name: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    inside: int = 0

    @property
    def is_kernel(self) -> bool:
        """Whether it reads and writes memory, whoever its neighbours are."""
        return self.name in KERNELS

    def is_view(self, sizes: Sequence[int]) -> bool:
        """Whether its result is its operand, seen otherwise."""
        return self.name in VIEWS and sizes[self.reads[0]] == sizes[self.writes[0]]

    @property
    def is_reduction(self) -> bool:
        """Whether it ends a chain: it may read what was never written out, and its result is written."""
        return self.name.startswith(("reduce_", "arg", "cum"))


def measure(
    operations: Sequence[Operation], sizes: Sequence[int], kept: Sequence[int], results: Sequence[int]
) -> tuple[int, float]:
    """Returns the most bytes alive at once, arguments not counted, and the bytes read and written.

    Args:
      operations: in order.
      sizes: bytes of each array.
      kept: arrays that must be there at the end.
      results: arrays that are written in any case; in place of arguments, those of them that are not kept.
    """
    written = _written(operations, sizes, results)
    sources: dict[int, frozenset[int]] = {}
    last: dict[int, int] = {}
    moved = 0.0
    for place, op in enumerate(operations):
        behind = frozenset[int]().union(*(sources.get(read, frozenset((read,))) for read in op.reads))
        for write in op.writes:
            if write not in written:
                # Of what is sliced only the slice is read.
                sources[write] = frozenset((write,)) if op.name in SLICES else behind
        if written.intersection(op.writes) or op.name in SLICES:
            last.update(dict.fromkeys(behind, place))
            if op.name in SLICES or op.name == "gather":
                moved += sum(2 * sizes[w] for w in op.writes if w in written)
            elif op.name not in ("scan", "while"):
                moved += sum(sizes[n] for n in behind) + sum(sizes[w] for w in op.writes if w in written)
    for number in kept:
        last.update(dict.fromkeys(sources.get(number, (number,)), len(operations)))
    return _peak(operations, sizes, last, written - (set(results) - set(kept))), moved


def _written(operations: Sequence[Operation], sizes: Sequence[int], results: Sequence[int]) -> set[int]:
    """Returns the arrays that are written to memory."""
    needed = set(results)
    readers: dict[int, list[Operation]] = {}
    for op in reversed(operations):
        for read in op.reads:
            readers.setdefault(read, []).append(op)
        if op.is_kernel or (op.is_view(sizes) and needed.intersection(op.writes)):
            needed.update(op.reads)

    def narrowed(number: int) -> list[int]:
        """Returns the rounded results that a product writes in place of its own, if nobody reads that."""
        found: list[int] = []
        for op in readers.get(number, []):
            if op.name == "convert_element_type" and sizes[op.writes[0]] < sizes[number]:
                found += op.writes
            elif op.is_view(sizes) and (further := narrowed(op.writes[0])):
                found += further
            else:
                return []
        return found

    written: set[int] = set()
    for op in operations:
        if op.is_view(sizes) or op.name in REPEATED:
            continue
        rounded = narrowed(op.writes[0]) if op.name == "dot_general" else []
        if rounded:
            written.update(rounded)
        else:
            stands = op.is_kernel or op.is_reduction
            written.update(write for write in op.writes if stands or write in needed)
    return written


def _peak(operations: Sequence[Operation], sizes: Sequence[int], last: dict[int, int], counted: set[int]) -> int:
    ends: dict[int, list[int]] = {}
    for number, place in last.items():
        ends.setdefault(place, []).append(number)
    alive: set[int] = set()
    total = peak = 0
    for place, op in enumerate(operations):
        new = counted.intersection(op.writes)
        alive |= new
        total += sum(sizes[n] for n in new)
        peak = max(peak, total + op.inside)
        for number in (*ends.get(place, ()), *new):
            if number in alive and last.get(number, -1) <= place:
                alive.remove(number)
                total -= sizes[number]
    return peak
