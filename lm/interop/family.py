"""What a family of checkpoints is: a table of tensors, and a config.json to and from a config of ours.

A family's file holds its `ROWS` and two functions; everything that is done with them is in
`lm.interop.checkpoint`. Law: `read(write(config))` means the same model as `config`, or `write` is not
of this family.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm.interop.layouts import Layout, parse_layout
from lm.interop.tensors import InteropError
from lm.models.transformer import Layer, Transformer


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of tensor of theirs, and the leaves of ours that hold the same numbers.

    Attributes:
      theirs: its name; {layer} counts the layers of a tower, {expert} the experts of a layer.
      ours: path of each leaf; {layer} is the layer's place. Several are joined in their tensor.
      equation: how axes correspond (`lm.interop.layouts`); empty where they are the same.
    """

    theirs: str
    ours: tuple[str, ...]
    equation: str = ""


def row(theirs: str, *ours: str, equation: str = "") -> Row:
    """Writes a row; see `Row`. With several leaves the equation says along which letter they are joined."""
    return Row(theirs, ours, equation)


# How a checkpoint's special tokens are called in config.json -> the name in `lm.batch.SpecialTokens`.
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
    """

    model_type: str
    architecture: str
    rows: tuple[Row, ...]
    read: Callable[["Config"], Transformer]
    write: Callable[[Any], Fields | None]
    prefix: str = ""
    ignored: tuple[str, ...] = ()


class Config(Mapping[str, Any]):
    """A config.json, whose every unexpected value is an error that names it."""

    def __init__(self, fields: Fields, source: str) -> None:
        """Takes the fields and the name of the file, for errors."""
        self._fields, self._source = fields, source

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
    """

    name: str
    parts: tuple[tuple[str, tuple[int, ...]], ...]
    shapes: tuple[tuple[int, ...], ...]
    layout: Layout


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
    if "{layer}" not in each.theirs:
        return _expand_experts(each.theirs, each.ours, (), each.equation, shapes)
    depth = config.encoder_depth if each.ours[0].startswith("encoder/") else config.decoder_depth
    entries = []
    for layer, (run, block, repeat) in enumerate(config.layer_places(depth)):
        ours = tuple(path.replace("{layer}", f"{run}/{block}") for path in each.ours)
        theirs = each.theirs.replace("{layer}", str(layer))
        entries += _expand_experts(theirs, ours, (repeat,), each.equation, shapes)
    return entries


def _expand_experts(
    theirs: str,
    ours: tuple[str, ...],
    index: tuple[int, ...],
    equation: str,
    shapes: Mapping[str, tuple[int, ...]],
) -> list[Entry]:
    if any(path not in shapes for path in ours):
        return []
    if "{expert}" not in theirs:
        return [_entry(theirs, ours, index, equation, shapes)]
    return [
        _entry(theirs.replace("{expert}", str(expert)), ours, (*index, expert), equation, shapes)
        for expert in range(shapes[ours[0]][len(index)])
    ]


def _entry(
    theirs: str,
    ours: tuple[str, ...],
    index: tuple[int, ...],
    equation: str,
    shapes: Mapping[str, tuple[int, ...]],
) -> Entry:
    inner = tuple(shapes[path][len(index) :] for path in ours)
    letters = " ".join("ABCDEFGH"[: len(inner[0])])
    layout = parse_layout(equation or f"{letters} -> {letters}")
    return Entry(theirs, tuple((path, index) for path in ours), inner, layout)


def fold_layers(layers: Sequence[Layer]) -> dict[str, tuple[Layer, ...]]:
    """Returns the fields `first_layers` and `layers` of the shortest description of a list of layers."""
    count = len(layers)
    for length in range(1, count + 1):
        for first in range(length):
            period = length - first
            if all(layers[i] == layers[i - period] for i in range(length, count)):
                return {"first_layers": tuple(layers[:first]), "layers": tuple(layers[first:length])}
    return {"first_layers": (), "layers": (Layer(),)}

