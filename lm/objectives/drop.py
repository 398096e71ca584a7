"""T5's "drop corrupted tokens": the source lacks some tokens, nothing marks where; the target is what lacks.

Owns the two sequences; `noise` chooses the tokens. Law: the segment is a merge of source and target,
each in its order.

Tokens [10, 11, 12, 13, 14] with noise at 11 and 14:

    source [10, 12, 13]   target [11, 14]
"""

import dataclasses

import numpy as np

from lm.batch import Document, Example, Lengths, SpecialTokens
from lm.objectives.base import Context, Traits, Vocabulary
from lm.objectives.noise import SpanNoise, TokenNoise
from lm.objectives.text_to_text import Sizes, TextToText, find_problems, make_examples


@dataclasses.dataclass(frozen=True, kw_only=True)
class DropTokens:
    """Predicts the tokens that were dropped from a text (T5, section 3.3.2 and table 5).

    Attributes:
      noise: which tokens are dropped.
      format: how source and target are laid out.
    """

    noise: TokenNoise | SpanNoise = TokenNoise()
    format: TextToText = TextToText()

    @property
    def traits(self) -> Traits:
        """Those of the format."""
        return self.format.traits

    def sizes(self, length: int) -> Sizes:
        """Returns the tokens that a segment of `length` tokens becomes."""
        noise, kept, _, _ = self.noise.sizes(length)
        return Sizes(kept, noise, length)

    def corrupt(
        self, tokens: np.ndarray, vocabulary: Vocabulary, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the tokens that stay and those that were dropped, without eos."""
        del vocabulary  # Nothing marks the gaps.
        mask = self.noise.sample(len(tokens), rng)
        return tokens[~mask], tokens[mask]

    def examples(self, document: Document, context: Context) -> list[Example]:
        """Returns one example for each segment of the document."""
        return make_examples(self, document, context)

    def problems(self, specials: SpecialTokens, lengths: Lengths) -> list[str]:
        """Returns what cannot work in these settings."""
        return self.noise.problems() or find_problems(self, specials, lengths)
