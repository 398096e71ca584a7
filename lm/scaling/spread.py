"""How arrays lie on a mesh as a traced program computes with them: sharding propagation, one operation at a time.

Knows shapes, mesh axes and the operations of jax; no model. A `Spec` says for each dimension which mesh axes divide
it. Laws: an axis divides one dimension of an array only; what is not known is taken as whole, never as divided.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Spec = tuple[tuple[str, ...], ...]
Sizes = Mapping[str, int]


class Value(NamedTuple):
    """An array of a traced program.

    Attributes:
      shape: the whole array's (a shard's, inside `shard_map`).
      itemsize: bytes of an element.
      spec: how it is divided.
      repeats: bytes of what it repeats, if it is a broadcast, which nobody writes out; None otherwise.
    """

    shape: tuple[int, ...]
    itemsize: int
    spec: Spec
    repeats: int | None = None

    def local_shape(self, sizes: Sizes) -> tuple[int, ...]:
        """Returns the shape of one device's shard."""
        divided = zip(self.shape, self.spec, strict=True)
        return tuple(-(-size // math.prod(sizes[axis] for axis in axes)) for size, axes in divided)

    def local_bytes(self, sizes: Sizes) -> int:
        """Returns the bytes of one device's shard."""
        return math.prod(self.local_shape(sizes)) * self.itemsize

    def stored_bytes(self, sizes: Sizes) -> int:
        """Returns the bytes that one device has of it in memory."""
        return self.local_bytes(sizes) if self.repeats is None else self.repeats

    def without(self, axes: Sequence[str]) -> "Value":
        """Returns the array whole along the given mesh axes."""
        return self._replace(spec=tuple(tuple(a for a in entry if a not in axes) for entry in self.spec))

    @property
    def axes(self) -> tuple[str, ...]:
        """All mesh axes that divide it."""
        return tuple(axis for entry in self.spec for axis in entry)


def whole(rank: int) -> Spec:
    """Returns the spec of an array that every device has all of."""
    return ((),) * rank


def join(specs: Sequence[Spec]) -> Spec:
    """Returns for each dimension the first division found, each mesh axis once."""
    used: set[str] = set()
    found = []
    for entries in zip(*specs, strict=True):
        entry = next((e for e in entries if e and not used.intersection(e)), ())
        used.update(entry)
        found.append(entry)
    return tuple(found)


def reshape(spec: Spec, old: Sequence[int], new: Sequence[int], sizes: Sizes) -> Spec:
    """Follows a division through a reshape: it stays with the leading dimension of those that merge or split."""
    out: list[tuple[str, ...]] = [()] * len(new)
    i = j = 0
    while i < len(old) and j < len(new):
        first_old, first_new, a, b = i, j, old[i], new[j]
        while a != b:
            if a < b and i + 1 < len(old):
                i, a = i + 1, a * old[i + 1]
            elif b < a and j + 1 < len(new):
                j, b = j + 1, b * new[j + 1]
            else:
                return tuple(out)
        leading = next((n for n in range(first_old, i + 1) if old[n] > 1), first_old)
        target = next((n for n in range(first_new, j + 1) if new[n] > 1), first_new)
        if spec[leading] and new[target] % math.prod(sizes[axis] for axis in spec[leading]) == 0:
            out[target] = spec[leading]
        i, j = i + 1, j + 1
    return tuple(out)


def _like(operand: Value, shape: tuple[int, ...]) -> Spec | None:
    """Keeps the division of dimensions whose size does not change, between arrays of one rank."""
    if len(operand.shape) != len(shape):
        return None
    return tuple(entry if a == b else () for entry, a, b in zip(operand.spec, operand.shape, shape, strict=True))


def _broadcast(operand: Value, shape: tuple[int, ...], params: Mapping[str, Any]) -> Spec:
    out = list(whole(len(shape)))
    for source, target in enumerate(params["broadcast_dimensions"]):
        if operand.shape[source] == shape[target]:
            out[target] = operand.spec[source]
    return tuple(out)


def _looked_up(table: Value, ids: Value, shape: tuple[int, ...], params: Mapping[str, Any]) -> Spec:
    """Follows rows that are looked up: the ids' division first, then that of the table's other dimensions."""
    numbers = params["dimension_numbers"]
    kept = [n for n in range(len(table.shape)) if n not in numbers.collapsed_slice_dims + numbers.operand_batching_dims]
    rows = iter(ids.spec[:-1])
    out: list[tuple[str, ...]] = []
    for n in range(len(shape)):
        if n in numbers.offset_dims:
            source = kept[numbers.offset_dims.index(n)]
            out.append(table.spec[source] if table.shape[source] == shape[n] else ())
        else:
            out.append(next(rows, ()))
    return join([tuple(out)])


def _updated(table: Value, update: Value, windows: Sequence[int], shape: tuple[int, ...]) -> Spec:
    """Follows an array of which parts are replaced: what begins whole, such as zeros, is divided as the parts are.

    Args:
      table: the array.
      update: the parts.
      windows: for each dimension of the array that the parts have too, in order, which of theirs it is; -1 for others.
      shape: of the array.
    """
    parts = tuple(update.spec[n] if n >= 0 and update.shape[n] == shape[d] else () for d, n in enumerate(windows))
    return join([table.spec, parts])


def _windows(numbers: Any, rank: int) -> list[int]:
    """Returns which dimension of a scatter's updates each dimension of its operand is; -1 where it is none."""
    outside = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    inside = iter(numbers.update_window_dims)
    return [-1 if n in outside else next(inside) for n in range(rank)]


def propagate(
    name: str, params: Mapping[str, Any], operands: Sequence[Value], shape: tuple[int, ...], sizes: Sizes
) -> Spec:
    """Returns how the result of an operation that sums over nothing is divided.

    Args:
      name: of the primitive.
      params: its parameters.
      operands: what it reads.
      shape: of the result.
      sizes: of the mesh axes.
    """
    if not operands:
        return whole(len(shape))
    first = operands[0]
    if name == "broadcast_in_dim":
        return _broadcast(first, shape, params)
    if name == "reshape":
        return reshape(first.spec, first.shape, shape, sizes)
    if name == "transpose":
        return tuple(first.spec[n] for n in params["permutation"])
    if name == "squeeze":
        return tuple(entry for n, entry in enumerate(first.spec) if n not in params["dimensions"])
    if name.startswith(("reduce_", "arg")) and "axes" in params:
        return tuple(entry for n, entry in enumerate(first.spec) if n not in params["axes"])
    if name == "gather":
        return _looked_up(first, operands[1], shape, params)
    if name == "dynamic_update_slice":
        return _updated(first, operands[1], range(len(shape)), shape)
    if name.startswith("scatter"):
        return _updated(first, operands[2], _windows(params["dimension_numbers"], len(shape)), shape)
    alike = [operand.spec for operand in operands if operand.shape == shape]
    if alike:
        return join(alike)
    return _like(first, shape) or whole(len(shape))


class Product(NamedTuple):
    """How a matrix product is computed on a mesh.

    Attributes:
      left: the first operand as it is used, whole along the axes that it had to be gathered over.
      right: the second one.
      spec: how the result is divided.
      partial: mesh axes over which the devices' results are to be summed.
      summed: elements of one device's sum.
    """

    left: Value
    right: Value
    spec: Spec
    partial: tuple[str, ...]
    summed: int


def multiply(
    left: Value, right: Value, numbers: Any, sizes: Sizes, gathered: str = "smaller", kept: Sequence[str] = ()
) -> Product:
    """Places a `dot_general`; where both operands use a mesh axis for different dimensions, one of them is gathered.

    Args:
      left: the first operand.
      right: the second one.
      numbers: which dimensions are summed over and which are paired, as jax has them.
      sizes: of the mesh axes.
      gathered: which one: "left" or "right" where that is a parameter, or the smaller.
      kept: mesh axes over which a parameter is not gathered: the other operand is (the stream of tensor parallelism,
        between branches divided by its length).
    """
    (left_summed, right_summed), (left_batch, right_batch) = numbers
    paired = dict(zip((*left_summed, *left_batch), (*right_summed, *right_batch), strict=True))
    place_left = {axis: n for n, entry in enumerate(left.spec) for axis in entry}
    place_right = {axis: n for n, entry in enumerate(right.spec) for axis in entry}
    clashing = [a for a in place_left if a in place_right and paired.get(place_left[a]) != place_right[a]]
    if gathered == "smaller":
        gathered, kept = "left" if left.local_bytes(sizes) < right.local_bytes(sizes) else "right", ()
    ours, theirs = [axis for axis in clashing if axis not in kept], [axis for axis in clashing if axis in kept]
    if gathered == "left":
        left, right = left.without(ours), right.without(theirs)
    else:
        left, right = left.without(theirs), right.without(ours)
    partial: list[str] = []
    summed = 1
    for a, b in zip(left_summed, right_summed, strict=True):
        axes = tuple(dict.fromkeys((*left.spec[a], *right.spec[b])))
        partial += axes
        summed *= -(-left.shape[a] // math.prod(sizes[axis] for axis in axes))
    batch = [
        tuple(dict.fromkeys((*left.spec[a], *right.spec[b]))) for a, b in zip(left_batch, right_batch, strict=True)
    ]
    free_left = [entry for n, entry in enumerate(left.spec) if n not in (*left_summed, *left_batch)]
    free_right = [entry for n, entry in enumerate(right.spec) if n not in (*right_summed, *right_batch)]
    spec = join([tuple(batch + free_left + free_right)])
    return Product(left, right, spec, tuple(dict.fromkeys(partial)), summed)
