"""T5's deshuffling: the source is the text with its tokens in random order, the target the text.

Owns the permutation. Law: source and target hold the same tokens.

Tokens [10, 11, 12, 13]:

    source [12, 10, 13, 11]   target [10, 11, 12, 13]
"""

import dataclasses

import numpy as np

from lm.batch import Document, Example, Lengths, SpecialTokens
from lm.objectives.base import Context, Traits, Vocabulary
from lm.objectives.text_to_text import Sizes, TextToText, find_problems, make_examples


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deshuffle:
    """Predicts a text from its tokens in random order (T5, table 3, after Liu et al. 2019).

    Attributes:
      format: how source and target are laid out.
    """

    format: TextToText = TextToText()

    @property
    def traits(self) -> Traits:
        """Those of the format."""
        return self.format.traits

    def sizes(self, length: int) -> Sizes:
        """Returns the tokens that a segment of `length` tokens becomes."""
        return Sizes(length, length, 2 * length)

    def corrupt(
        self, tokens: np.ndarray, vocabulary: Vocabulary, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the permuted and the original segment, without eos."""
        del vocabulary  # Only the order changes.
        return rng.permutation(tokens), tokens

    def examples(self, document: Document, context: Context) -> list[Example]:
        """Returns one example for each segment of the document."""
        return make_examples(self, document, context)

    def problems(self, specials: SpecialTokens, lengths: Lengths) -> list[str]:
        """Returns what cannot work in these settings."""
        return find_problems(self, specials, lengths)
