"""MASS: the encoder reads a text without one long fragment, the decoder predicts the fragment alone.

Owns the fragment and its replacement. Law: no token of the fragment that is to be predicted can be seen,
except where noise leaves it in place on purpose.

Text [1 ... 8] with the fragment [3 ... 6] all masked by M (format without source eos, two stacks):

    encoder_inputs [1, 2, M, M, M, M, 7, 8]
    inputs [2, 3, 4, 5]   targets [3, 4, 5, 6]   positions [2, 3, 4, 5]
"""

import dataclasses

import numpy as np

from lm.batch import Document, Example, Lengths, SpecialTokens
from lm.objectives.base import CORRUPTION, Context, Traits, Vocabulary, special
from lm.objectives.text_to_text import Sizes, TextToText, cut_segments, find_problems, join, plan_segment


@dataclasses.dataclass(frozen=True, kw_only=True)
class MASS:
    """Predicts a contiguous fragment of a text (Song et al. 2019, sections 3.2 and 4.1).

    In two stacks the decoder keeps the fragment's positions in the text, so segments are no longer than the
    decoder's row either. In one stack the fragment follows the source and positions run on. No eos ends a fragment.

    Attributes:
      fragment_rate: length of the fragment as a share of the segment.
      random_rate: share of the fragment's tokens that the source shows as a random token of text.
      keep_rate: share of the fragment's tokens that the source shows as they are.
      format: how source and target are laid out.
    """

    fragment_rate: float = 0.5
    random_rate: float = 0.1
    keep_rate: float = 0.1
    format: TextToText = TextToText()

    @property
    def traits(self) -> Traits:
        """Those of the format."""
        return self.format.traits

    def fragment_length(self, length: int) -> int:
        """Returns how many of a segment's `length` tokens are predicted."""
        return min(max(round(length * self.fragment_rate), 1), length)

    def sizes(self, length: int) -> Sizes:
        """Returns the tokens that a segment becomes; the whole segment as target, for its positions' sake."""
        return Sizes(length, length, length + self.fragment_length(length))

    def corrupt(
        self, tokens: np.ndarray, vocabulary: Vocabulary, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the source, and bool[N], true in the fragment: 20 % at the start, 20 % at the end, else anywhere."""
        size = self.fragment_length(len(tokens))
        last = len(tokens) - size
        start = int(rng.choice(np.array([0, last, rng.integers(last + 1)]), p=[0.2, 0.2, 0.6]))
        places = np.arange(len(tokens))
        mask = (places >= start) & (places < start + size)
        text_ids = np.flatnonzero(vocabulary.token_bytes > 0)
        draw = rng.random(len(tokens))
        shown = np.where(
            draw < self.random_rate, rng.choice(text_ids, len(tokens)), special(vocabulary.specials, "mask")
        )
        shown = np.where(draw >= 1 - self.keep_rate, tokens, shown)
        return np.where(mask, shown, tokens), mask

    def examples(self, document: Document, context: Context) -> list[Example]:
        """Returns one example for each segment of the document."""
        rng = context.rng(CORRUPTION)
        limit = plan_segment(self, context.lengths)
        return [self.example(tokens, context, rng) for tokens in cut_segments(document.tokens, limit)]

    def example(self, tokens: np.ndarray, context: Context, rng: np.random.Generator) -> Example:
        """Returns the example of one segment."""
        specials, lengths = context.vocabulary.specials, context.lengths
        bos = special(specials, "bos")
        source, mask = self.corrupt(tokens, context.vocabulary, rng)
        if self.format.source_eos:
            source = np.append(source, special(specials, "eos"))
        example = join(source, tokens[mask], bos, lengths, self.format.prefix)
        if lengths.encoder is None:
            return example
        positions = np.flatnonzero(mask).astype(np.int32)
        inputs = np.concatenate([[bos], tokens[:-1]])[positions].astype(np.int32)
        return dataclasses.replace(example, inputs=inputs, positions=positions)

    def problems(self, specials: SpecialTokens, lengths: Lengths) -> list[str]:
        """Returns what cannot work in these settings."""
        problems = []
        if not 0 < self.fragment_rate <= 1:
            problems.append(f"fragment_rate is a share above 0 and up to 1; it is {self.fragment_rate}")
        if min(self.random_rate, self.keep_rate) < 0 or self.random_rate + self.keep_rate > 1:
            problems.append("random_rate and keep_rate are shares that sum to at most 1")
        return problems or find_problems(self, specials, lengths, ("mask",))
