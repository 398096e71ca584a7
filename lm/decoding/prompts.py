"""Prompts of different lengths as one padded array, with few different shapes.

Host side, NumPy. Knows no tokenizer and no model. Law: what a row holds, and by which number its
randomness is keyed, does not depend on the other rows.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lm.batch import Array
from lm.config import UserError


class DecodingError(UserError):
    """Settings or prompts with which this model cannot generate."""


class Prompts(NamedTuple):
    """A batch of prompts, padded on the right. Lengths, not ids, say what is padding.

    Attributes:
      tokens: i32[B, T].
      lengths: i32[B], at least 1.
      rows: i32[B], the number that keys each row's randomness.
      encoder_tokens: i32[B, S], what an encoder reads, or None.
      encoder_lengths: i32[B] or None.
      sources: i32[B], how many of a prompt's tokens are source; the rest begins the answer. None is all of them.
      gaps: i32[B], place of the token that marks where the answer belongs. None is the last of the source.
    """

    tokens: Array
    lengths: Array
    rows: Array
    encoder_tokens: Array | None = None
    encoder_lengths: Array | None = None
    sources: Array | None = None
    gaps: Array | None = None


def bucket_length(length: int, smallest: int = 16) -> int:
    """Returns the least power of two that is at least `length` and `smallest`."""
    return max(smallest, 1 << (length - 1).bit_length())


def _pad(sequences: Sequence[Sequence[int] | np.ndarray], smallest: int) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.asarray([len(sequence) for sequence in sequences], np.int32)
    if not len(lengths) or lengths.min() < 1:
        raise DecodingError("a prompt has no token; begin it with the tokenizer's bos (or eos, if it has none)")
    tokens = np.zeros((len(lengths), bucket_length(int(lengths.max()), smallest)), np.int32)
    for row, sequence in zip(tokens, sequences, strict=True):
        row[: len(sequence)] = sequence
    return tokens, lengths


def pad_prompts(
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    encoder_prompts: Sequence[Sequence[int] | np.ndarray] | None = None,
    rows: Sequence[int] | None = None,
    num_answer: int = 0,
    smallest: int = 16,
) -> Prompts:
    """Pads prompts to a power of two, so that one compilation serves many.

    Args:
      prompts: token ids of each prompt; with an encoder, how the decoder begins (its start token).
      encoder_prompts: token ids that the encoder of an encoder-decoder reads, one list a prompt.
      rows: keys of the rows' randomness; None for 0, 1, 2, ...
      num_answer: how many tokens at the end of each prompt already begin the answer.
      smallest: least padded length.

    Raises:
      DecodingError: no prompts, a prompt without a token, or lists of different lengths.
    """
    if encoder_prompts is not None and len(encoder_prompts) != len(prompts):
        raise DecodingError(f"{len(prompts)} prompts, but {len(encoder_prompts)} encoder prompts")
    tokens, lengths = _pad(prompts, smallest)
    numbers = np.arange(len(prompts), dtype=np.int32) if rows is None else np.asarray(rows, np.int32)
    if len(numbers) != len(prompts):
        raise DecodingError(f"{len(prompts)} prompts, but {len(numbers)} row numbers")
    made = Prompts(tokens, lengths, numbers, sources=lengths - np.int32(num_answer))
    if encoder_prompts is None:
        return made
    encoder_tokens, encoder_lengths = _pad(encoder_prompts, smallest)
    return made._replace(encoder_tokens=encoder_tokens, encoder_lengths=encoder_lengths)
