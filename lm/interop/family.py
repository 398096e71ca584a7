"""What a family of checkpoints is: a table of tensors, and a config.json to and from a config of ours.

A family's file holds its `ROWS` and two functions; everything that is done with them is in
`lm.interop.checkpoint`. Law: `read(write(config))` means the same model as `config`, or `write` is not
of this family.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from lm.interop.layouts import Layout, parse_layout
from lm.interop.tensors import InteropError
from lm.models import Layer
from lm.models.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of tensor of theirs, and the leaves of ours that hold the same numbers.

    Attributes:
      theirs: its name; {layer} counts the layers of a tower, {expert} the experts of a layer.
      ours: path of each leaf; {layer} is the layer's place. Several are joined in their tensor.
      equation: how axes correspond (`lm.interop.layouts`); empty where they are the same.
      unless: path of a leaf with which the row does not apply (their tensor has another name then), or "".
      beside: path of a leaf without which it does not, or "".
      rotated: path of the leaf whose last axis ends in rotated channels, which they keep as pairs side by side, or "".
    """

    theirs: str
    ours: tuple[str, ...]
    equation: str = ""
    unless: str = ""
    beside: str = ""
    rotated: str = ""

    def at(self, place: str, layer: int) -> "Row":
        """Returns the row of one layer, whose leaves are below `place`."""

        def put(path: str) -> str:
            return path.replace("{layer}", place)

        theirs = self.theirs.replace("{layer}", str(layer))
        conditions = map(put, (self.unless, self.beside, self.rotated))
        return Row(theirs, tuple(map(put, self.ours)), self.equation, *conditions)

    def applies(self, leaves: Collection[str]) -> bool:
        """Returns whether a model with these leaves has the tensor."""
        there = all(path in leaves for path in self.ours)
        return there and self.unless not in leaves and (not self.beside or self.beside in leaves)


def row(theirs: str, *ours: str, equation: str = "", unless: str = "", beside: str = "", rotated: str = "") -> Row:
    """Writes a row; see `Row`. With several leaves the equation says along which letter they are joined."""
    return Row(theirs, ours, equation, unless, beside, rotated)


def linear(theirs: str, ours: str, kernel: str = "Y X -> X Y", bias: str = "") -> tuple[Row, Row]:
    """Writes the rows of a linear layer of torch, whose weight holds outputs first."""
    return row(f"{theirs}.weight", f"{ours}/kernel", equation=kernel), row(
        f"{theirs}.bias", f"{ours}/bias", equation=bias
    )


def norm(theirs: str, ours: str) -> tuple[Row, Row]:
    """Writes the rows of a norm."""
    return row(f"{theirs}.weight", f"{ours}/scale"), row(f"{theirs}.bias", f"{ours}/bias")


# Layouts of a head's projections: their linear layers have all heads in one axis.
TO_HEADS, TO_HEADS_BIAS, FROM_HEADS = "(N H) D -> D N H", "(N H) -> N H", "D (N H) -> N H D"


def attention(theirs: str, ours: str, query: str, key: str, value: str, out: str) -> tuple[Row, ...]:
    """Writes the rows of attention, whose four linear layers have the given names below `theirs`."""
    names = {"query": query, "key": key, "value": value}
    rows = [linear(f"{theirs}.{name}", f"{ours}/{part}", TO_HEADS, TO_HEADS_BIAS) for part, name in names.items()]
    return (*(each for pair in rows for each in pair), *linear(f"{theirs}.{out}", f"{ours}/out", FROM_HEADS))


Fields = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """Checkpoints of one architecture.

    Attributes:
      model_type: `model_type` of config.json.
      architecture: class of `transformers` that a written checkpoint opens in.
      rows: the table; rows whose leaves the model does not have are left out.
      read: makes our config of a config.json.
      write: makes a config.json of our config; None where the family certainly cannot express it.
      prefix: of tensors of the whole model, which checkpoints of its body alone leave out.
      ignored: regular expressions of tensors that carry nothing: buffers, and copies of tied weights.
      legacy: (ending, ending) pairs: how old files call tensors, and how the table does.
    """

    model_type: str
    architecture: str
    rows: tuple[Row, ...]
    read: Callable[["Config"], Transformer]
    write: Callable[[Any], Fields | None]
    prefix: str = ""
    ignored: tuple[str, ...] = ()
    legacy: tuple[tuple[str, str], ...] = ()


class Config(Mapping[str, Any]):
    """A config.json, whose every unexpected value is an error that names it."""

    def __init__(self, fields: Fields, source: str, tensors: Collection[str] | None = None) -> None:
        """Takes the fields, the name of the file for errors, and the names of the tensors beside it, if known."""
        self._fields, self._source, self._tensors = fields, source, tensors

    def __getitem__(self, name: str) -> Any:
        if name not in self._fields:
            raise InteropError(f"{self._source} has no field {name}")
        return self._fields[name]

    def __iter__(self) -> Any:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def __contains__(self, name: object) -> bool:
        return name in self._fields

    def get(self, name: str, default: Any = None) -> Any:
        """Returns a field, or the default where it is absent or null."""
        value = self._fields.get(name)
        return default if value is None else value

    def holds(self, tensor: str, default: bool) -> bool:
        """Returns whether the checkpoint has a tensor whose name ends so; the default where there are no tensors."""
        return default if self._tensors is None else any(name.endswith(tensor) for name in self._tensors)

    @property
    def architecture(self) -> str:
        """The class of `transformers` that wrote the checkpoint, or ""."""
        return (self.get("architectures") or [""])[0]

    def expect(self, name: str, *values: Any) -> None:
        """Checks that a field is absent, null or one of `values`.

        Raises:
          InteropError: it is something else, which no field of ours expresses.
        """
        if self.get(name) is not None and self.get(name) not in values:
            raise self.refuse(name, f"it can only be {' or '.join(map(repr, values))}")

    def choose(self, name: str, values: Mapping[Any, Any], default: Any = None) -> Any:
        """Returns what a field's value stands for in `values`.

        Raises:
          InteropError: it stands for nothing.
        """
        value = self.get(name, default)
        if value not in values:
            raise self.refuse(name, f"known are {', '.join(map(repr, values))}")
        return values[value]

    def refuse(self, name: str, why: str) -> InteropError:
        """Returns the error that a field cannot be taken over."""
        return InteropError(f"{self._source}: {name} is {self.get(name)!r}; {why}")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of theirs and the parts of our leaves that it fills.

    Attributes:
      name: of their tensor.
      parts: (path of the leaf, index into its leading axes) of each part.
      shapes: shape of each part.
      layout: how axes correspond.
      rotated: for each part, how many channels at the end of its last axis are pairs side by side in their tensor,
        and half of them apart in ours.
    """

    name: str
    parts: tuple[tuple[str, tuple[int, ...]], ...]
    shapes: tuple[tuple[int, ...], ...]
    layout: Layout
    rotated: tuple[int, ...]

    def their_shape(self) -> tuple[int, ...]:
        """Returns the shape of their tensor."""
        return self.layout.their_shape(self.shapes)

    def split(self, theirs: np.ndarray) -> list[np.ndarray]:
        """Returns each part of their tensor, as we hold it; raises LayoutError."""
        parts = self.layout.split(theirs, self.shapes)
        return [part_pairs(part, count) for part, count in zip(parts, self.rotated, strict=True)]

    def merge(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Returns their tensor; undoes `split`."""
        return self.layout.merge([join_pairs(part, count) for part, count in zip(parts, self.rotated, strict=True)])


def part_pairs(x: np.ndarray, count: int) -> np.ndarray:
    """Moves the last `count` channels from pairs side by side (0, 1), (2, 3), ... to pairs half of them apart."""
    if not count:
        return x
    kept, rotated = np.split(x, [x.shape[-1] - count], axis=-1)
    return np.concatenate([kept, rotated[..., 0::2], rotated[..., 1::2]], axis=-1)


def join_pairs(x: np.ndarray, count: int) -> np.ndarray:
    """Undoes `part_pairs`."""
    if not count:
        return x
    kept, first, second = np.split(x, [x.shape[-1] - count, x.shape[-1] - count // 2], axis=-1)
    return np.concatenate([kept, np.stack([first, second], axis=-1).reshape(*x.shape[:-1], count)], axis=-1)


def expand(rows: Sequence[Row], config: Transformer, shapes: Mapping[str, tuple[int, ...]]) -> list[Entry]:
    """Lists every tensor that a model has, in the order of the table; rows without leaves are left out.

    Args:
      rows: of the family.
      config: of the model.
      shapes: shape of each leaf of ours, by its path.

    Raises:
      InteropError: a leaf is not in the table, so the family has no place for it.
    """
    entries = [entry for each in rows for entry in _expand_row(each, config, shapes)]
    filled = {path for entry in entries for path, _ in entry.parts}
    for path in shapes:
        if path not in filled:
            raise InteropError(f"the parameter {path} has no tensor in checkpoints of this family")
    return entries


def _expand_row(each: Row, config: Transformer, shapes: Mapping[str, tuple[int, ...]]) -> list[Entry]:
    width = config.attention.rotated_width(config) if each.rotated else 0
    if "{layer}" not in each.ours[0]:
        return _expand_experts(each, (), shapes, width)
    depth = config.encoder_depth if each.ours[0].startswith("encoder/") else config.decoder_depth
    return [
        entry
        for layer, (run, block, repeat) in enumerate(config.layer_places(depth))
        for entry in _expand_experts(each.at(f"{run}/{block}", layer), (repeat,), shapes, width)
    ]


def _expand_experts(
    each: Row, index: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]], width: int
) -> list[Entry]:
    if not each.applies(shapes):
        return []
    if "{expert}" not in each.theirs:
        return [_entry(each.theirs, each, index, shapes, width)]
    return [
        _entry(each.theirs.replace("{expert}", str(expert)), each, (*index, expert), shapes, width)
        for expert in range(shapes[each.ours[0]][len(index)])
    ]


def _entry(name: str, each: Row, index: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]], width: int) -> Entry:
    inner = tuple(shapes[path][len(index) :] for path in each.ours)
    letters = " ".join("ABCDEFGH"[: len(inner[0])])
    layout = parse_layout(each.equation or f"{letters} -> {letters}")
    rotated = tuple(width if path == each.rotated else 0 for path in each.ours)
    return Entry(name, tuple((path, index) for path in each.ours), inner, layout, rotated)


def fold_layers(layers: Sequence[Layer]) -> dict[str, Any]:
    """Returns the fields `first_layers` and `layers` of the shortest description of a list of layers."""
    if not layers:
        return {"first_layers": (), "layers": (Layer(),)}
    numbers: dict[Layer, int] = {}
    kinds = np.asarray([numbers.setdefault(layer, len(numbers)) for layer in layers])
    best = (len(layers), 0)
    for period in range(1, len(layers)):
        if period > best[0]:
            break
        unlike = np.flatnonzero(kinds[period:] != kinds[:-period])
        first = int(unlike[-1]) + 1 if unlike.size else 0
        best = min(best, (first + period, first))
    length, first = best
    return {"first_layers": tuple(layers[:first]), "layers": tuple(layers[first:length])}
