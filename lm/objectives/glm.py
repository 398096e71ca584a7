"""GLM's blank infilling: spans become blanks, and are predicted after the text, in random order.

Owns the choice of blanks and the two-part layout with two positions. Law: Part A with its blanks filled
from Part B is the text; Part A sees itself only, Part B sees Part A and what precedes.

Text x1 ... x6 with the spans [x3] and [x5 x6], the second first (mask M, start S, end E):

    inputs          x1 x2 M  x4 M  S  x5 x6 S  x3
    targets          0  0 0   0 0  x5 x6 E  x3 E    (0 where nothing is predicted)
    positions        0  1 2   3 4  4  4  4  2  2
    block_positions  0  0 0   0 0  1  2  3  1  2
"""

import dataclasses

import numpy as np

from lm.batch import Document, Example, Lengths, SpecialTokens
from lm.objectives.base import CORRUPTION, Context, Frame, Traits, Vocabulary, find_missing, special, take
from lm.objectives.noise import cover_spans, find_runs, place_spans
from lm.objectives.sentences import split_sentences


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShortBlanks:
    """Blanks short spans, apart from each other (section 2.1).

    Attributes:
      mask_rate: spans are drawn until at least this share of the tokens is in blanks.
      mean_span_length: mean of the Poisson-distributed lengths; zeros are drawn again.
    """

    mask_rate: float = 0.15
    mean_span_length: float = 3.0

    def choose(self, tokens: np.ndarray, vocabulary: Vocabulary, rng: np.random.Generator) -> np.ndarray:
        """Returns bool[N], true in blanks."""
        del vocabulary  # Spans ignore the text.
        total, lengths = len(tokens), []
        while sum(lengths) < self.mask_rate * total:
            room = total - sum(lengths) - max(len(lengths), 1)  # One token between two blanks, one at least to see.
            if room < 1:
                break
            length = int(rng.poisson(self.mean_span_length))
            if length:
                lengths.append(min(length, room))
        sizes = np.array(lengths)
        return cover_spans(place_spans(sizes, total, 1, rng), sizes, total)

    def problems(self) -> list[str]:
        """Returns what cannot work in these settings."""
        problems = _share_problems("mask_rate", self.mask_rate)
        if self.mean_span_length <= 0:
            problems.append(f"mean_span_length must be above 0; it is {self.mean_span_length}")
        return problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class SentenceBlanks:
    """Blanks whole sentences; neighbours make one blank (section 2.2, "sentence-level").

    Attributes:
      mask_rate: sentences are drawn until at least this share of the tokens is in blanks.
    """

    mask_rate: float = 0.15

    def choose(self, tokens: np.ndarray, vocabulary: Vocabulary, rng: np.random.Generator) -> np.ndarray:
        """Returns bool[N], true in blanks."""
        sentences = split_sentences(tokens, vocabulary)
        sizes = np.array([len(sentence) for sentence in sentences])
        order = rng.permutation(len(sentences))
        before = np.cumsum(sizes[order]) - sizes[order]
        chosen = np.zeros(len(sentences), bool)
        chosen[order[before < self.mask_rate * len(tokens)]] = True
        return np.repeat(chosen, sizes)

    def problems(self) -> list[str]:
        """Returns what cannot work in these settings."""
        return _share_problems("mask_rate", self.mask_rate)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SuffixBlank:
    """Blanks one span at the end, for long generation (section 2.2, "document-level").

    Attributes:
      min_rate: smallest share of the tokens in the blank.
      max_rate: largest share; the length is uniform between the two.
    """

    min_rate: float = 0.5
    max_rate: float = 1.0

    def choose(self, tokens: np.ndarray, vocabulary: Vocabulary, rng: np.random.Generator) -> np.ndarray:
        """Returns bool[N], true in the blank."""
        del vocabulary  # The blank ignores the text.
        shortest = max(1, round(self.min_rate * len(tokens)))
        length = rng.integers(shortest, max(shortest, round(self.max_rate * len(tokens))) + 1)
        return np.arange(len(tokens)) >= len(tokens) - length

    def problems(self) -> list[str]:
        """Returns what cannot work in these settings."""
        problems = _share_problems("min_rate", self.min_rate) + _share_problems("max_rate", self.max_rate)
        if self.min_rate > self.max_rate:
            problems.append(f"min_rate {self.min_rate} is above max_rate {self.max_rate}")
        return problems


def _share_problems(name: str, value: float) -> list[str]:
    return [] if 0 < value <= 1 else [f"{name} is a share above 0 and up to 1; it is {value}"]


def arrange_blanks(tokens: np.ndarray, blanks: np.ndarray, order: np.ndarray, specials: SpecialTokens) -> Example:
    """Returns the example of a text, its blanks i64[blanks, 2] (start, end) and the order of their prediction."""
    starts, sizes = blanks[:, 0], blanks[:, 1] - blanks[:, 0]
    # Each blank is one position in Part A, so later tokens move up by what the blanks before them hide.
    marks = starts - (np.cumsum(sizes - 1) - (sizes - 1))
    is_visible = ~cover_spans(starts, sizes, len(tokens))
    is_visible[starts] = True
    part_a = tokens.copy()
    part_a[starts] = special(specials, "mask")
    part_a = part_a[is_visible]
    filled = [tokens[slice(*blanks[k])] for k in order.tolist()]
    inputs = [part_a, *(part for span in filled for part in ([special(specials, "sop")], span))]
    targets = [
        np.full(len(part_a), specials.pad),
        *(part for span in filled for part in (span, [special(specials, "eop")])),
    ]
    length = len(part_a) + int(sizes.sum()) + len(sizes)
    in_text = np.arange(length) < len(part_a)
    steps = [np.arange(1, int(sizes[k]) + 2) for k in order.tolist()]
    return Example(
        inputs=np.concatenate(inputs).astype(np.int32),
        targets=np.concatenate(targets).astype(np.int32),
        weights=(~in_text).astype(np.float32),
        positions=np.concatenate([np.arange(len(part_a)), np.repeat(marks[order], sizes[order] + 1)]).astype(np.int32),
        bidirectional=in_text,
        block_positions=np.concatenate([np.zeros(len(part_a)), *steps]).astype(np.int32),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GLM:
    """Predicts blanked spans one after the other, each token by token (Du et al. 2022, section 2).

    The released models mix several: a `Mixture` of three GLMs says so.

    Attributes:
      blanks: what is blanked.
    """

    blanks: ShortBlanks | SentenceBlanks | SuffixBlank = ShortBlanks()

    @property
    def traits(self) -> Traits:
        """One stack with a bidirectional part and a second position; prompts are texts with one blank."""
        marks = Frame(start=(), between=("mask",), answer=("sop",), end=("eop",))
        frame = dataclasses.replace(marks, bidirectional=True, strides=(0, 1))
        fields = frozenset({"block_positions"})
        return Traits(layouts=frozenset({"decoder"}), bidirectional=True, fields=fields, frame=frame)

    def examples(self, document: Document, context: Context) -> list[Example]:
        """Returns one example for each segment of the document: text and two tokens for each blank fit a row."""
        rng = context.rng(CORRUPTION)
        if problems := self.length_problems(context.lengths):
            raise ValueError(problems[0])
        vocabulary, limit = context.vocabulary, context.lengths.tokens
        examples, rest = [], document.tokens
        while len(rest) >= 2:
            size = take(limit - 2, len(rest), minimum=2)
            blanks = find_runs(self.blanks.choose(rest[:size], vocabulary, rng))
            while (overflow := size + 2 * len(blanks) - limit) > 0 and size > 2:
                size = max(2, take(size - overflow, len(rest), minimum=2))
                blanks = find_runs(self.blanks.choose(rest[:size], vocabulary, rng))
            examples.append(arrange_blanks(rest[:size], blanks, rng.permutation(len(blanks)), vocabulary.specials))
            rest = rest[size:]
        return examples

    def problems(self, specials: SpecialTokens, lengths: Lengths) -> list[str]:
        """Returns what cannot work in these settings."""
        problems = self.blanks.problems() + find_missing(specials, "mask", "sop", "eop")
        return problems + self.length_problems(lengths)

    def length_problems(self, lengths: Lengths) -> list[str]:
        """Returns a sentence if the rows are too short for any text with its blanks."""
        if lengths.tokens >= 8:
            return []
        return [f"rows of {lengths.tokens} tokens are too short for text and blanks: have at least 8"]
