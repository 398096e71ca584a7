"""Rows made of examples, and batches made of rows.

Owns first-fit packing and the assembly of a `Batch`. Knows no source, no tokenizer and no objective.
Laws: every position of every example stands in exactly one row, with one segment id (from 1) and its own
positions; what is not an example has segment id 0 and weight 0; all features of an example share its row.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from lm.batch import DTYPES, ENCODER_FIELDS, Batch, Example, Lengths
from lm.data.formats import DataError

# Rows that wait for an example that fits. Beyond it the oldest is given out: time and memory stay bounded.
OPEN_ROWS = 64
# Examples put in order of length before they are placed, which halves the padding of plain first-fit.
LOOK_AHEAD = 64
_ALWAYS = ("inputs", "targets", "weights", "segment_ids", "positions", "bidirectional")
_OPTIONAL = ("encoder_inputs", "token_types", "label_targets", "label_weights", "block_positions", "components")


@dataclasses.dataclass(eq=False)
class Row:
    """Examples that share a row, in order.

    Attributes:
      examples: what the row holds; the first has segment id 1.
      ids: the document id of each example.
      free: positions left.
      encoder_free: encoder positions left.
    """

    examples: list[Example]
    ids: list[str]
    free: int
    encoder_free: int

    def add(self, document_id: str, example: Example, encoder_length: int) -> None:
        """Appends an example that fits."""
        self.examples.append(example)
        self.ids.append(document_id)
        self.free -= len(example.inputs)
        self.encoder_free -= encoder_length


Packer = Callable[[Iterable[tuple[str, Example]], Lengths], Iterator[Row]]


def _encoder_length(document_id: str, example: Example, lengths: Lengths) -> int:
    """Returns the example's encoder length, and refuses an example that no row can hold."""
    encoder = 0 if example.encoder_inputs is None else len(example.encoder_inputs)
    if not 1 <= len(example.inputs) <= lengths.tokens:
        raise ValueError(
            f"the objective made an example of {len(example.inputs)} positions from {document_id}: "
            f"it must have 1 to {lengths.tokens}"
        )
    if encoder > (lengths.encoder or 0):
        raise DataError(
            f"the objective made an example of {encoder} encoder positions from {document_id}: "
            f"data.encoder_length is {lengths.encoder}"
        )
    return encoder


def one_a_row(examples: Iterable[tuple[str, Example]], lengths: Lengths) -> Iterator[Row]:
    """Yields a row for each example."""
    for document_id, example in examples:
        row = Row([], [], lengths.tokens, lengths.encoder or 0)
        row.add(document_id, example, _encoder_length(document_id, example, lengths))
        yield row


def _longest_first(examples: Iterable[tuple[str, Example]], lengths: Lengths) -> Iterator[tuple[int, str, Example]]:
    """Yields (encoder length, document id, example), each block of `LOOK_AHEAD` from the longest to the shortest."""
    measured = ((_encoder_length(name, example, lengths), name, example) for name, example in examples)
    while block := list(itertools.islice(measured, LOOK_AHEAD)):
        yield from sorted(block, key=lambda one: -(len(one[2].inputs) + one[0]))


def first_fit(examples: Iterable[tuple[str, Example]], lengths: Lengths) -> Iterator[Row]:
    """Yields rows as they become full, and the others at the end; each example goes to the first that has room.

    First-fit decreasing (Johnson 1973) over short blocks of examples.

    Args:
      examples: document id and example, in order.
      lengths: of a row.
    """
    rows: list[Row] = []
    for encoder, document_id, example in _longest_first(examples, lengths):
        need = len(example.inputs)
        for row in rows:
            if row.free >= need and row.encoder_free >= encoder:
                break
        else:
            if len(rows) == OPEN_ROWS:
                yield rows.pop(0)
            row = Row([], [], lengths.tokens, lengths.encoder or 0)
            rows.append(row)
        row.add(document_id, example, encoder)
        if not row.free or (lengths.encoder and not row.encoder_free):
            rows.remove(row)
            yield row
    yield from rows


def shuffle(rows: Iterable[Row], buffer_size: int, rng: np.random.Generator) -> Iterator[Row]:
    """Yields rows in random order, each drawn among the next `buffer_size`: parts of a document come apart."""
    held: list[Row] = []
    for row in rows:
        if len(held) < buffer_size:
            held.append(row)
            continue
        place = int(rng.integers(buffer_size))
        held[place], drawn = row, held[place]
        yield drawn
    for place in rng.permutation(len(held)):
        yield held[place]


def _positions(lengths: np.ndarray) -> np.ndarray:
    """Returns 0, 1, 2, ... restarted for each of the lengths."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def _fill_field(row: np.ndarray, parts: Sequence[np.ndarray | None], lengths: np.ndarray) -> None:
    """Writes a field of all examples of a row; where an example does not set it, what is there stays."""
    found = [part for part in parts if part is not None]
    if len(found) == len(parts):
        np.concatenate(found, out=row[: int(lengths.sum())], casting="same_kind")
    elif found:
        for part, start, length in zip(parts, np.cumsum(lengths) - lengths, lengths, strict=True):
            if part is not None:
                row[start : start + length] = part


def _fill_row(batch: dict[str, np.ndarray], number: int, examples: Sequence[Example]) -> None:
    for prefix in ("", "encoder_") if "encoder_inputs" in batch else ("",):
        inputs = [getattr(example, f"{prefix}inputs") for example in examples]
        lengths = np.asarray([len(part) for part in inputs])
        stop = int(lengths.sum())
        batch[f"{prefix}segment_ids"][number, :stop] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        batch[f"{prefix}positions"][number, :stop] = _positions(lengths)
        for name, array in batch.items():
            if name != f"{prefix}segment_ids" and (name in ENCODER_FIELDS) == bool(prefix):
                _fill_field(array[number], [getattr(example, name) for example in examples], lengths)


def assemble(rows: Sequence[Row | None], lengths: Lengths, pad: int, like: Example) -> Batch:
    """Returns the batch of rows; None is a row of padding.

    Args:
      rows: B of them.
      lengths: T and S of the batch.
      pad: id that fills inputs and targets.
      like: any example of the same objective: it says which optional fields there are.
    """
    names = [*_ALWAYS, *(name for name in _OPTIONAL if getattr(like, name) is not None)]
    if like.encoder_inputs is not None:
        names += ["encoder_segment_ids", "encoder_positions"]
    batch: dict[str, np.ndarray] = {}
    for name in names:
        length = (lengths.encoder or 0) if name in ENCODER_FIELDS else lengths.tokens
        filler = pad if name in ("inputs", "targets", "encoder_inputs") else 0
        batch[name] = np.full((len(rows), length), filler, DTYPES[name])
    for number, row in enumerate(rows):
        if row is not None:
            _fill_row(batch, number, row.examples)
    return Batch(**batch)
