"""From a source and a target to an example: for two stacks, or for one that reads both in a row.

Owns the shift, the weights, the flags and the longest segment that fits. Knows no corruption: those
say their sizes and turn a segment into (source, target). Law: the loss is on targets only, and a
planned segment always fits, whatever is drawn.

Source [7, 8, 5], target [3, 9], with bos 0 and eos 1, for two stacks and for one:

    encoder_inputs [7, 8, 5, 1]   inputs [0, 3, 9]   targets [3, 9, 1]   weights [1, 1, 1]
    inputs        [0, 7, 8, 5, 1, 3, 9]   targets [7, 8, 5, 1, 3, 9, 1]
    bidirectional [1, 1, 1, 1, 1, 0, 0]   weights [0, 0, 0, 0, 1, 1, 1]
"""

import dataclasses
import functools
from typing import Literal, NamedTuple, Protocol

import numpy as np

from lm.batch import Document, Example, Lengths, SpecialTokens
from lm.objectives.base import CORRUPTION, Context, Frame, Traits, Vocabulary, cut, find_missing, special, take


class Sizes(NamedTuple):
    """The most tokens that a corrupted segment can have, eos not counted.

    Attributes:
      source: tokens of the source.
      target: tokens of the target.
      total: tokens of both together, which can be less than the sum of the two bounds.
    """

    source: int
    target: int
    total: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextToText:
    """How a model reads a source and predicts a target; the stacks follow from `Lengths.encoder`.

    Attributes:
      prefix: how a single stack sees the source: "bidirectional" (prefix LM) or "causal". Two stacks do not read it.
      source_eos: whether the source ends with eos, as in T5. The target always does.
    """

    prefix: Literal["bidirectional", "causal"] = "bidirectional"
    source_eos: bool = True

    @property
    def traits(self) -> Traits:
        """Two stacks, or one with or without a bidirectional prefix."""
        bidirectional = self.prefix == "bidirectional"
        return Traits(
            layouts=frozenset({"decoder", "encoder_decoder"}),
            bidirectional=bidirectional,
            frame=Frame(after=("eos",) if self.source_eos else (), bidirectional=bidirectional),
        )

    def fits(self, sizes: Sizes, lengths: Lengths) -> bool:
        """Tells whether a segment of these sizes fits a row, with its eos."""
        source, target, total = sizes.source + self.source_eos, sizes.target + 1, sizes.total + self.source_eos + 1
        if lengths.encoder is None:
            return total <= lengths.tokens
        return source <= lengths.encoder and target <= lengths.tokens

    def join(self, source: np.ndarray, target: np.ndarray, specials: SpecialTokens, lengths: Lengths) -> Example:
        """Appends eos and returns the example of a source and a target (seqio's enc-dec and prefix-LM converters)."""
        bos, eos = special(specials, "bos"), special(specials, "eos")
        if self.source_eos:
            source = np.append(source, eos)
        return join(source, np.append(target, eos), bos, lengths, self.prefix)


def join(
    source: np.ndarray,
    target: np.ndarray,
    start: int,
    lengths: Lengths,
    prefix: Literal["bidirectional", "causal"],
) -> Example:
    """Returns the example of a finished source and target: i32[N] and i32[M], their eos included.

    In one stack position N reads the last token of the source and predicts the first of the target, so the
    bidirectional prefix has N + 1 positions (seqio, `PrefixLMFeatureConverter`).
    """
    source, target = source.astype(np.int32), target.astype(np.int32)
    if lengths.encoder is not None:
        weights = np.ones(len(target), np.float32)
        return Example(_shift(target, start), target, weights, encoder_inputs=source)
    targets = np.concatenate([source, target])
    places = np.arange(len(targets))
    return Example(
        inputs=_shift(targets, start),
        targets=targets,
        weights=(places >= len(source)).astype(np.float32),
        bidirectional=places <= len(source) if prefix == "bidirectional" else None,
    )


def _shift(targets: np.ndarray, start: int) -> np.ndarray:
    return np.concatenate([[start], targets[:-1]]).astype(np.int32)


class Corruption(Protocol):
    """A text-to-text objective's own part: hashable, so that its plan is made once."""

    @property
    def format(self) -> TextToText:
        """How source and target become an example."""
        ...

    def sizes(self, length: int) -> Sizes:
        """Returns the most tokens that a segment of `length` tokens becomes."""
        ...

    def corrupt(
        self, tokens: np.ndarray, vocabulary: Vocabulary, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the source and the target of a segment of at least two tokens, without eos."""
        ...


@functools.lru_cache(maxsize=1024)
def plan_segment(corruption: Corruption, lengths: Lengths, extra: int = 0) -> int:
    """Returns the longest segment that surely fits once corrupted, with `extra` tokens before the source.

    As T5's `random_spans_helper`, from which it differs where that one is wrong: it asks the sampler for
    the real sizes, and reads the target's length as well as the source's. 0 if not even two tokens fit.
    """
    length = 1
    while True:
        sizes = corruption.sizes(length + 1)
        if not corruption.format.fits(Sizes(sizes.source + extra, sizes.target, sizes.total + extra), lengths):
            return length if length > 1 else 0
        length += 1


def make_examples(corruption: Corruption, document: Document, context: Context) -> list[Example]:
    """Returns one example for each segment of the document; none for a document of a single token."""
    limit = plan_segment(corruption, context.lengths)
    rng = context.rng(CORRUPTION)
    vocabulary = context.vocabulary
    pairs = [corruption.corrupt(tokens, vocabulary, rng) for tokens in cut_segments(document.tokens, limit)]
    return [corruption.format.join(s, t, vocabulary.specials, context.lengths) for s, t in pairs]


def cut_segments(tokens: np.ndarray, limit: int) -> list[np.ndarray]:
    """Cuts a document into segments of at most `limit` tokens and at least 2, one to see and one to predict."""
    return cut(tokens, limit, minimum=2)


def take_segment(corruption: Corruption, remaining: int, lengths: Lengths, extra: int) -> int:
    """Returns how many of a document's `remaining` tokens its next segment takes, `extra` as in `plan_segment`.

    Raises:
      ValueError: if the rows are too short, where `find_problems` was not asked before.
    """
    if problems := length_problems(corruption, lengths, extra):
        raise ValueError(problems[0])
    return take(plan_segment(corruption, lengths, extra), remaining, minimum=2)


def length_problems(corruption: Corruption, lengths: Lengths, extra: int = 0) -> list[str]:
    """Returns a sentence if the rows hold no segment of three tokens, the least that can always be cut in two."""
    if plan_segment(corruption, lengths, extra) >= 3:
        return []
    rows = f"rows of {lengths.tokens} tokens"
    if lengths.encoder is not None:
        rows = f"an encoder row of {lengths.encoder} and a decoder row of {lengths.tokens} tokens"
    return [f"{rows} cannot hold a corrupted segment of three tokens: raise the lengths"]


def find_problems(
    corruption: Corruption, specials: SpecialTokens, lengths: Lengths, names: tuple[str, ...] = (), extra: int = 0
) -> list[str]:
    """Returns missing special tokens (bos, eos and `names`) and lengths that are too short."""
    return find_missing(specials, "bos", "eos", *names) + length_problems(corruption, lengths, extra)
