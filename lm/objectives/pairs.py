"""How an encoder's sequence is put together: one text, or two that follow each other or do not.

Owns the special tokens around texts, token types and the label of a pair. Knows no masking. Law: a
sequence fits its row, and a label of 0 means that the second text follows the first in its document.

With CLS 5 and SEP 6, the texts A = [20, 21] and B = [30]:

    tokens [5, 20, 21, 6, 30, 6]   token_types [0, 0, 0, 0, 1, 1]   label at position 0
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from lm.batch import Document, Lengths, SpecialTokens
from lm.objectives.base import Context, Vocabulary, cut, special
from lm.objectives.sentences import split_sentences


class Sequence(NamedTuple):
    """One sequence for an encoder.

    Attributes:
      tokens: i32[T], special tokens included.
      token_types: i32[T], 0 for the first text and 1 for the second; None for a single text.
      label: class of the pair, or None.
    """

    tokens: np.ndarray
    token_types: np.ndarray | None = None
    label: int | None = None


def join_pair(first: np.ndarray, second: np.ndarray, label: int, specials: SpecialTokens) -> Sequence:
    """Returns CLS first SEP second SEP with its token types and label."""
    cls, sep = special(specials, "cls"), special(specials, "sep")
    tokens = np.concatenate([[cls], first, [sep], second, [sep]]).astype(np.int32)
    return Sequence(tokens, (np.arange(len(tokens)) >= len(first) + 2).astype(np.int32), label)


def trim_pair(
    first: np.ndarray, second: np.ndarray, limit: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Drops tokens from the longer text, at its front or back by a coin each, until both have `limit` together."""
    bounds = [[0, len(first)], [0, len(second)]]
    while (sizes := [end - start for start, end in bounds]) and sum(sizes) > limit:
        longer = bounds[0] if sizes[0] > sizes[1] else bounds[1]
        if rng.random() < 0.5:
            longer[0] += 1
        else:
            longer[1] -= 1
    return first[slice(*bounds[0])], second[slice(*bounds[1])]


def gather_chunk(
    sentences: list[np.ndarray], start: int, limit: int, short_rate: float, rng: np.random.Generator
) -> list[np.ndarray]:
    """Returns the sentences from `start` on that reach the target length: `limit`, or a shorter one by chance."""
    target = limit if rng.random() >= short_rate else int(rng.integers(2, limit + 1))
    # No sentence is empty, so that no more than `target` of them are needed.
    sums = np.cumsum([len(sentence) for sentence in sentences[start : start + target]])
    return sentences[start : start + int(np.searchsorted(sums, target)) + 1]


def split_pieces(tokens: np.ndarray, limit: int, vocabulary: Vocabulary) -> list[np.ndarray]:
    """Returns the sentences of `tokens`, those longer than `limit` cut, lest a pair drops the rest of them."""
    return [piece for sentence in split_sentences(tokens, vocabulary) for piece in cut(sentence, limit)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SingleText:
    """One text, CLS before and SEP behind it; a long document is cut into consecutive texts (RoBERTa)."""

    def sequences(self, document: Document, context: Context, rng: np.random.Generator) -> list[Sequence]:
        """Returns the document's sequences."""
        del rng  # Nothing is drawn.
        cls, sep = special(context.vocabulary.specials, "cls"), special(context.vocabulary.specials, "sep")
        pieces = cut(document.tokens, context.lengths.tokens - 2)
        return [Sequence(np.concatenate([[cls], p, [sep]]).astype(np.int32)) for p in pieces]

    @property
    def num_labels(self) -> int:
        """No label."""
        return 0

    def problems(self, lengths: Lengths) -> list[str]:
        """Returns what cannot work with these lengths."""
        return _length_problems(lengths, 3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextSentence:
    """Two texts, of which the second follows the first (label 0) or is from another document (label 1) (BERT).

    As in BERT, a chunk of a single sentence is always paired with another document, so that more than half
    of the pairs are random; unlike there, a pair labelled random never is from the same document: if ten
    draws find no other one, the chunk becomes a true pair, or nothing if it has one sentence.

    Attributes:
      short_rate: probability that a pair aims at a random shorter length.
      random_rate: probability that the second text of a longer chunk is from another document.
    """

    short_rate: float = 0.1
    random_rate: float = 0.5

    @property
    def num_labels(self) -> int:
        """Follows, or is random."""
        return 2

    def sequences(self, document: Document, context: Context, rng: np.random.Generator) -> list[Sequence]:
        """Returns the document's sequences."""
        limit = context.lengths.tokens - 3
        sentences = split_pieces(document.tokens, limit, context.vocabulary)
        sequences, start = [], 0
        while start < len(sentences):
            chunk = gather_chunk(sentences, start, limit, self.short_rate, rng)
            middle = int(rng.integers(1, len(chunk))) if len(chunk) > 1 else 1
            first, rest = np.concatenate(chunk[:middle]), chunk[middle:]
            second = None
            if not rest or rng.random() < self.random_rate:
                second = self.draw_other(document, max(1, limit - len(first)), context, rng)
            label = int(second is not None)
            start += middle if label else len(chunk)  # What a random text displaced is used again.
            if second is None and rest:
                second = np.concatenate(rest)
            if second is not None:
                pair = trim_pair(first, second, limit, rng)
                sequences.append(join_pair(*pair, label, context.vocabulary.specials))
        return sequences

    def draw_other(
        self, document: Document, room: int, context: Context, rng: np.random.Generator
    ) -> np.ndarray | None:
        """Returns sentences of another document from a random one on, until `room` tokens; None if none is found."""
        for _ in range(10):
            other = context.sample_document(rng)
            if other.id == document.id or len(other.tokens) == 0:
                continue
            sentences = split_sentences(other.tokens, context.vocabulary)
            return np.concatenate(gather_chunk(sentences, int(rng.integers(len(sentences))), room, 0.0, rng))
        return None

    def problems(self, lengths: Lengths) -> list[str]:
        """Returns what cannot work in these settings."""
        return _rate_problems(self) + _length_problems(lengths, 5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SentenceOrder:
    """Two consecutive texts, in order (label 0) or swapped (label 1) (ALBERT, section 3.1).

    A chunk of a single sentence is cut inside it; ALBERT's code pairs it with another document, which gives
    the topic away.

    Attributes:
      short_rate: probability that a pair aims at a random shorter length.
      random_rate: probability that the two texts are swapped.
    """

    short_rate: float = 0.1
    random_rate: float = 0.5

    @property
    def num_labels(self) -> int:
        """In order, or swapped."""
        return 2

    def sequences(self, document: Document, context: Context, rng: np.random.Generator) -> list[Sequence]:
        """Returns the document's sequences."""
        limit = context.lengths.tokens - 3
        sentences = split_pieces(document.tokens, limit, context.vocabulary)
        sequences, start = [], 0
        while start < len(sentences):
            chunk = gather_chunk(sentences, start, limit, self.short_rate, rng)
            start += len(chunk)
            if len(chunk) == 1:
                if len(chunk[0]) == 1:
                    continue
                chunk = np.split(chunk[0], [rng.integers(1, len(chunk[0]))])
            middle = int(rng.integers(1, len(chunk)))
            pair = trim_pair(np.concatenate(chunk[:middle]), np.concatenate(chunk[middle:]), limit, rng)
            swapped = bool(rng.random() < self.random_rate)
            first, second = pair[::-1] if swapped else pair
            sequences.append(join_pair(first, second, int(swapped), context.vocabulary.specials))
        return sequences

    def problems(self, lengths: Lengths) -> list[str]:
        """Returns what cannot work in these settings."""
        return _rate_problems(self) + _length_problems(lengths, 5)


def _rate_problems(pairs: NextSentence | SentenceOrder) -> list[str]:
    rates = {name: getattr(pairs, name) for name in ("short_rate", "random_rate")}
    return [f"{name} is a share between 0 and 1; it is {rate}" for name, rate in rates.items() if not 0 <= rate <= 1]


def _length_problems(lengths: Lengths, least: int) -> list[str]:
    if lengths.tokens >= least:
        return []
    return [f"rows of {lengths.tokens} tokens hold no text beside cls and sep: have at least {least}"]
