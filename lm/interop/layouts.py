"""How one tensor of another project is the same numbers as leaves of ours, as an equation.

`"(N H) D -> D N H"` says: their two axes, the first of which counts heads and channels of a head, are
our three. Both directions are read off the one string. Knows no model, no name and no file. Law:
`merge(split(x)) == x`, bit for bit.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Sequence

import numpy as np


class LayoutError(ValueError):
    """An array that does not have the shape its layout says."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """An axis-by-axis description of their tensor and of our leaves; build with `parse_layout`.

    Attributes:
      theirs: the letters of each of their axes, slowest first.
      ours: the letters of each of our axes.
      joined: the letter along which several of our leaves stand one after the other in their tensor, or "".
      fixed: sizes of letters that our shape does not tell (those in a group of ours), as (letter, size).
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    joined: str
    fixed: tuple[tuple[str, int], ...]

    def their_shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """Returns the shape of their tensor, for the shapes of our leaves."""
        sizes = self._total([self._sizes(shape) for shape in shapes])
        return tuple(math.prod(sizes[letter] for letter in group) for group in self.theirs)

    def split(self, theirs: np.ndarray, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
        """Returns our leaves, of the given shapes; views where that is possible.

        Raises:
          LayoutError: their tensor has another shape; the message says which two.
        """
        expected = self.their_shape(shapes)
        if theirs.shape != expected:
            raise LayoutError(f"has shape {list(theirs.shape)}, but the config asks for {list(expected)}")
        each = [self._sizes(shape) for shape in shapes]
        letters, total = "".join(self.theirs), self._total(each)
        wide = theirs.reshape([total[letter] for letter in letters])
        order = [letters.index(letter) for letter in "".join(self.ours)]
        pieces = [wide]
        if self.joined:
            ends = np.cumsum([sizes[self.joined] for sizes in each])[:-1]
            pieces = np.split(wide, ends, axis=letters.index(self.joined))
        return [piece.transpose(order).reshape(shape) for piece, shape in zip(pieces, shapes, strict=True)]

    def merge(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        """Returns their tensor, C-contiguous."""
        letters, own = "".join(self.theirs), "".join(self.ours)
        pieces = []
        for leaf in ours:
            sizes = self._sizes(leaf.shape)
            wide = leaf.reshape([sizes[letter] for letter in own])
            pieces.append(wide.transpose([own.index(letter) for letter in letters]))
        wide = np.concatenate(pieces, axis=letters.index(self.joined)) if self.joined else pieces[0]
        return np.ascontiguousarray(wide.reshape(self.their_shape([leaf.shape for leaf in ours])))

    def _sizes(self, shape: tuple[int, ...]) -> dict[str, int]:
        """Returns the size of every letter, for one leaf of ours."""
        if len(shape) != len(self.ours):
            raise LayoutError(f"is laid out as {self.ours}, which is not of the shape {list(shape)}")
        sizes = dict(self.fixed)
        for size, group in zip(shape, self.ours, strict=True):
            unknown = [letter for letter in group if letter not in sizes]
            known = math.prod(sizes[letter] for letter in group if letter in sizes)
            if len(unknown) > 1 or size % known:
                raise LayoutError(f"is laid out as {self.ours}, which does not divide the shape {list(shape)}")
            sizes.update(dict.fromkeys(unknown, size // known))
        return sizes

    def _total(self, each: list[dict[str, int]]) -> dict[str, int]:
        return each[0] | ({self.joined: sum(sizes[self.joined] for sizes in each)} if self.joined else {})


@functools.cache
def parse_layout(equation: str) -> Layout:
    """Reads an equation such as "D (*N H) -> D N H".

    Letters in parentheses share an axis, the slowest first. `*` marks the letter along which the leaves of
    a row are joined in their tensor. A size is written behind its letter (`B2`) where shapes do not tell.

    Raises:
      ValueError: not such an equation.
    """
    left, arrow, right = equation.partition("->")
    groups = [re.findall(r"\([^)]*\)|\*?[A-Z]\d*", side) for side in (left, right)]
    sides = [tuple("".join(re.findall("[A-Z]", group)) for group in side) for side in groups]
    if not arrow or sorted("".join(sides[0])) != sorted("".join(sides[1])):
        raise ValueError(f"{equation!r} does not have the same letters on both sides")
    fixed = {letter: int(size) for letter, size in re.findall(r"([A-Z])(\d+)", equation)}
    joined = re.findall(r"\*([A-Z])", left)
    return Layout(sides[0], sides[1], "".join(joined), tuple(sorted(fixed.items())))
