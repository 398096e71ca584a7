"""What a parameter is for an optimizer, read off its logical axes: a matrix, a table or a vector.

Owns the one place where weight decay, Muon and Adafactor learn which axes of a leaf are stacked
copies (scanned layers, experts), which are rows (fan-in) and which are columns (fan-out). Knows no
model and no values. Law: what an optimizer does to a stack of layers is what it does to each alone.
"""

import dataclasses
from typing import Any, Literal

import jax

# A leaf with one of these is looked up or is the last layer: embeddings, positions, heads.
TABLE_AXES = frozenset({"vocab", "positions", "buckets", "classes"})
# Leading axes that hold independent copies of one parameter.
STACKED_AXES = frozenset({"layers", "experts"})


@dataclasses.dataclass(frozen=True)
class Role:
    """How an optimizer sees one leaf. Every axis is in exactly one of the three tuples.

    Attributes:
      kind: "matrix" maps one space to another; "table" is a matrix that is an embedding or a head;
        "vector" is all else (norms, biases, scalars).
      stacked: axes over independent copies.
      rows: axes of the input of a matrix or table; all the axes that are not stacked of a vector.
      columns: axes of the output; empty for a vector.
    """

    kind: Literal["matrix", "table", "vector"]
    stacked: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @property
    def own(self) -> tuple[int, ...]:
        """The axes of one copy."""
        return tuple(sorted(self.rows + self.columns))


def role_of(axes: tuple[str | None, ...]) -> Role:
    """Reads the role of a leaf off the logical names of its axes.

    Leading `layers` and `experts` are stacked, and so is an unnamed axis (gate and value side by
    side). Heads and head_dim together are one side of a matrix. The first side is the input, as in
    `Einsum("BTD,DNH->BTNH")`.

    Raises:
      ValueError: more than two sides are left.
    """
    stacked: list[int] = []
    sides: list[list[int]] = []
    for i, name in enumerate(axes):
        if name is None or (name in STACKED_AXES and not sides):
            stacked.append(i)
        elif name == "head_dim" and sides and axes[sides[-1][-1]] in ("heads", "kv_heads"):
            sides[-1].append(i)
        else:
            sides.append([i])
    if len(sides) > 2:
        raise ValueError(f"a parameter with axes {axes} is no matrix: give the axes of one side a common name, or None")
    if len(sides) < 2 or "norm" in axes:
        return Role("vector", tuple(stacked), tuple(i for side in sides for i in side), ())
    kind = "table" if TABLE_AXES.intersection(axes) else "matrix"
    return Role(kind, tuple(stacked), tuple(sides[0]), tuple(sides[1]))


def roles_of(params: Any, axes: Any) -> Any:
    """Returns the tree of `params` (arrays or shapes) with a `Role` at each leaf.

    Args:
      params: nested dict of arrays or ShapeDtypeStructs.
      axes: the same tree with a tuple of logical names at each leaf (`Model.axes()`).

    Raises:
      ValueError: a leaf's rank and its number of names differ.
    """

    def role(path: tuple, leaf: Any, names: tuple[str | None, ...]) -> Role:
        if len(names) != len(leaf.shape):
            where = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(f"parameter {where} of shape {leaf.shape} has {len(names)} axis names {names}")
        return role_of(names)

    return jax.tree_util.tree_map_with_path(role, params, axes)
