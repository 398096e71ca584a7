"""The one batch schema of the house, and what a batch is made of on the host.

Text becomes a `Document`, an objective turns it into `Example`s, packing lays examples into rows and
rows into a `Batch`. This module knows no tokenizer, no objective, no model and no device; it imports
neither jax nor anything of `lm`. Law: whether a position counts is said by `weights` and
`segment_ids`, never inferred from a token id.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

# NumPy on the host, jax.Array after placement, ShapeDtypeStruct when planning.
Array = Any


class Batch(NamedTuple):
    """What one train, evaluation or prefill step reads. Fields that an objective does not use are None.

    With query position i and key position j, attention is allowed where
    `segment_ids[i] == segment_ids[j] != 0` and (`j <= i` or both positions are `bidirectional`).
    An encoder-only batch is one whose every position is bidirectional.

    Attributes:
      inputs: i32[B, T], the tokens the model reads (already shifted for autoregressive objectives).
      targets: i32[B, T], the token to predict at each position.
      weights: f32[B, T], loss weight of each position; 0 where nothing is to be predicted.
      segment_ids: i32[B, T], 1, 2, ... for the examples packed into a row; 0 is padding.
      positions: i32[B, T], position within the example; restarts at 0 for each segment.
      bidirectional: bool[B, T], positions that see each other in both directions (a prefix).
      encoder_inputs: i32[B, S] or None, the twin for a model that has an encoder.
      encoder_segment_ids: i32[B, S] or None; cross attention joins equal, non-zero segment ids.
      encoder_positions: i32[B, S] or None.
      token_types: i32[B, T] or None, sentence A or B (BERT's segment embedding).
      label_targets: i32[B, T] or None, class of the example, at the position whose state is pooled.
      label_weights: f32[B, T] or None, 1 at that position, 0 elsewhere.
      block_positions: i32[B, T] or None, second position inside a blank (GLM).
      components: i32[B, T] or None, which component of a mixture of objectives made the position.
    """

    inputs: Array
    targets: Array
    weights: Array
    segment_ids: Array
    positions: Array
    bidirectional: Array
    encoder_inputs: Array | None = None
    encoder_segment_ids: Array | None = None
    encoder_positions: Array | None = None
    token_types: Array | None = None
    label_targets: Array | None = None
    label_weights: Array | None = None
    block_positions: Array | None = None
    components: Array | None = None


class WeightedSum(NamedTuple):
    """A sum of weighted values with the sum of the weights; the mean is taken once, at the very end.

    Adding the pairs of microbatches, devices or batches and dividing afterwards is exact; averaging
    means is not.

    Attributes:
      sum: f32[], sum of weight times value; f32[N] where N values share a weight.
      weight: f32[], sum of the weights.
    """

    sum: Array
    weight: Array


# The dtype of each field of a Batch, on the host and on the device.
DTYPES = {name: np.dtype(np.int32) for name in Batch._fields} | {
    "weights": np.dtype(np.float32),
    "label_weights": np.dtype(np.float32),
    "bidirectional": np.dtype(np.bool_),
}
# Fields whose second axis is the encoder's length S; all the others have the length T.
ENCODER_FIELDS = ("encoder_inputs", "encoder_segment_ids", "encoder_positions")


@dataclasses.dataclass(frozen=True)
class Document:
    """One document of a corpus.

    Attributes:
      id: stable, unique within the corpus (source, file and position in it), the same in every run.
      text: the text, or None for a corpus that was tokenised ahead.
      tokens: i32[N], the token ids without any special token.
    """

    id: str
    text: str | None
    tokens: np.ndarray


@dataclasses.dataclass(frozen=True)
class Lengths:
    """How long an example may be: `tokens` is T of the batch, `encoder` is S, None without an encoder."""

    tokens: int
    encoder: int | None = None


@dataclasses.dataclass(frozen=True)
class Example:
    """One unpadded segment, made by an objective, to be packed into a row.

    `inputs`, `targets` and `weights` have one length, at most `Lengths.tokens` and at least 1.
    `positions` None means 0, 1, 2, ...; `bidirectional` None means nowhere. The rest as in `Batch`;
    an objective either always sets an optional field or never does.
    """

    inputs: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    positions: np.ndarray | None = None
    bidirectional: np.ndarray | None = None
    encoder_inputs: np.ndarray | None = None
    encoder_positions: np.ndarray | None = None
    token_types: np.ndarray | None = None
    label_targets: np.ndarray | None = None
    label_weights: np.ndarray | None = None
    block_positions: np.ndarray | None = None
    components: np.ndarray | None = None


# UL2's modes in the order of their tokens: regular, sequential and extreme denoising ([NLU], [S2S] and [NLG]).
MODES = ("R", "S", "X")


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """Ids that are not text. None (or empty) where a tokenizer has no such token.

    Attributes:
      pad: fills what is not a segment. Never used to infer validity.
      bos: first input of an autoregressive example; also the decoder's start token.
      eos: end of a document or of a target.
      unk: what the tokenizer could not represent.
      mask: stands for hidden tokens (MLM, BART).
      cls: first token of an encoder example; its state is pooled.
      sep: separates the two texts of a pair.
      sentinels: ids that mark corrupted spans, in the order of use (span k uses sentinels[k]).
      modes: UL2's mode tokens, in the order of `MODES`.
      fim: fill-in-the-middle's prefix, suffix and middle tokens, in this order.
      sop: GLM's start of a blank.
      eop: GLM's end of a blank.
    """

    pad: int
    bos: int | None = None
    eos: int | None = None
    unk: int | None = None
    mask: int | None = None
    cls: int | None = None
    sep: int | None = None
    sentinels: tuple[int, ...] = ()
    modes: tuple[int, ...] = ()
    fim: tuple[int, ...] = ()
    sop: int | None = None
    eop: int | None = None

    def find(self, name: str) -> int | None:
        """Returns the id of a token by its name, "eos", or, where a field holds several, "sentinels[0]"; or None."""
        field, _, place = name.rstrip("]").partition("[")
        found = getattr(self, field)
        if not place:
            return found
        return found[int(place)] if int(place) < len(found) else None
