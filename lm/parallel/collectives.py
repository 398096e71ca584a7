"""What devices say to each other in a compiled program, read from its text.

Knows no model. Law: a program for one device has no collective; a loop counts its body as often as it turns,
where the text says how often that is.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)
# How TPUs name a kernel that sums and leaves each device its part: inside are an all-reduce and a slice.
SCATTER_FUSION = "all-reduce-scatter"
_BITS = {"pred": 8, "s4": 4, "u4": 4, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\]")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.-]+ = (?P<shape>\(.*?\)|\S+) (?P<kind>[a-z][a-z0-9-]*)\((?P<rest>.*)$")
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
_CALLED = re.compile(
    r"(?:to_apply|calls|body|condition|true_computation|false_computation|async_computation)=%?([\w.-]+)"
)
_LISTED = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION = re.compile(r"condition=%?([\w.-]+)")
_CONSTANT = re.compile(r"(\d+)\)")
Computations = dict[str, list[re.Match[str]]]


class Traffic(NamedTuple):
    """Collectives of one kind.

    Attributes:
      count: how many are run in one run of the program.
      bytes: what they leave on one device, added up: the results of all of them.
    """

    count: int
    bytes: int


class Collective(NamedTuple):
    """One instruction.

    Attributes:
      kind: one of KINDS.
      shape: its result as the compiler writes it, such as "f32[8,128]{1,0}".
      bytes: size of the result on one device.
      turns: how often it is run in one run of the program.
    """

    kind: str
    shape: str
    bytes: int
    turns: int

    @property
    def dimensions(self) -> list[tuple[int, ...]]:
        """Returns the shape of each array of the result."""
        return [tuple(int(size) for size in sizes.split(",") if size) for _, sizes in _ARRAY.findall(self.shape)]


def _bytes(dtype: str, sizes: str) -> int:
    digits = re.search(r"\d+", dtype)
    bits = _BITS.get(dtype) or (int(digits.group()) if digits else 0)
    return math.prod(int(size) for size in sizes.split(",") if size) * bits // 8


def _result_bytes(kind: str, shape: str) -> int:
    arrays = _ARRAY.findall(shape)
    if kind in ("all-gather-start", "collective-permute-start") and len(arrays) > 1:
        # The operands stand before the results, counters of the transfer behind both.
        arrays = [array for array in arrays if array != ("u32", "")]
        arrays = arrays[len(arrays) // 2 :]
    return sum(_bytes(*array) for array in arrays)


def _parse(text: str) -> tuple[str, Computations]:
    """Returns the name of the program's entry, and the instructions of each computation."""
    entry, name = "", ""
    computations: Computations = {}
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            name = header["name"]
            computations[name] = []
            entry = name if header["entry"] else entry
        elif name and (instruction := _INSTRUCTION.match(line)):
            computations[name].append(instruction)
    return entry, computations


def _turns(rest: str, computations: Computations) -> int:
    """Returns how often a loop turns: as it says, or else the number that its condition compares with, or else 1."""
    if known := _TURNS.search(rest):
        return int(known[1])
    condition = _CONDITION.search(rest)
    compared = computations.get(condition[1], ()) if condition else ()
    limits = [
        int(number[1])
        for instruction in compared
        if instruction["kind"] == "constant" and instruction["shape"].startswith("s32[]")
        if (number := _CONSTANT.match(instruction["rest"]))
    ]
    return max(limits, default=1)


def list_collectives(text: str) -> list[Collective]:
    """Lists the collectives of a compiled program, in order, those of functions once for each call.

    A loop counts its body as often as the compiler says that it turns (`known_trip_count`); where it does not say, as
    for TPUs, the largest constant of the loop's condition is taken for that, and where there is none, the body counts
    once. Of a conditional all branches count. A TPU's kernel that is written as an all-reduce and a slice is a
    reduce-scatter, which is what it sends.

    Args:
      text: `compiled.as_text()` of `jax.jit(...).lower(...).compile()`.
    """
    entry, computations = _parse(text)

    def walk(name: str, turns: int) -> Iterator[Collective]:
        for instruction in computations.get(name, ()):
            kind, shape, rest = instruction["kind"], instruction["shape"], instruction["rest"]
            if kind.removesuffix("-start") in KINDS:
                yield Collective(kind.removesuffix("-start"), shape, _result_bytes(kind, shape), turns)
                continue
            inner = turns * _turns(rest, computations) if kind == "while" else turns
            called = _CALLED.findall(rest)
            if kind == "fusion" and any(each.startswith(SCATTER_FUSION) for each in called):
                yield Collective("reduce-scatter", shape, _result_bytes("reduce-scatter", shape), turns)
                continue
            for listed in _LISTED.findall(rest):
                called += [each.strip().lstrip("%") for each in listed.split(",")]
            for each in called:
                yield from walk(each, inner)

    return list(walk(entry, 1))


def count_collectives(text: str) -> dict[str, Traffic]:
    """Counts the collectives of a compiled program by kind; kinds that it lacks are left out.

    Args:
      text: as of `list_collectives`, which says how loops and branches count.
    """
    found: dict[str, Traffic] = {}
    for each in list_collectives(text):
        before = found.get(each.kind, Traffic(0, 0))
        found[each.kind] = Traffic(before.count + each.turns, before.bytes + each.turns * each.bytes)
    return found
