"""T5's BERT-style and MASS-style objectives: a source of the same length with masks, the whole text as target.

Owns the replacement; `noise` chooses the tokens. Law: the target is the segment, and the source
differs from it only where the noise is.

Tokens [10, 11, 12, 13, 14] with noise at 11 and 14, mask 4:

    source [10, 4, 12, 13, 4]   target [10, 11, 12, 13, 14]
"""

import dataclasses

import numpy as np

from lm.batch import Document, Example, Lengths, SpecialTokens
from lm.objectives.base import Context, Traits, Vocabulary, special
from lm.objectives.noise import SpanNoise, TokenNoise
from lm.objectives.text_to_text import Sizes, TextToText, find_problems, make_examples


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedToText:
    """Predicts a whole text from its masked form (T5, table 3: "BERT-style"; "MASS-style" with random_rate 0).

    Attributes:
      noise: which tokens are corrupted.
      random_rate: share of the corrupted tokens that become a random token of text instead of the mask.
      format: how source and target are laid out.
    """

    noise: TokenNoise | SpanNoise = TokenNoise()
    random_rate: float = 0.1
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
        """Returns the masked and the whole segment, without eos."""
        mask = self.noise.sample(len(tokens), rng)
        text_ids = np.flatnonzero(vocabulary.token_bytes > 0)
        replaced = np.where(rng.random(len(tokens)) < self.random_rate, rng.choice(text_ids, len(tokens)), -1)
        replaced = np.where(replaced >= 0, replaced, special(vocabulary.specials, "mask"))
        return np.where(mask, replaced, tokens), tokens

    def examples(self, document: Document, context: Context) -> list[Example]:
        """Returns one example for each segment of the document."""
        return make_examples(self, document, context)

    def problems(self, specials: SpecialTokens, lengths: Lengths) -> list[str]:
        """Returns what cannot work in these settings."""
        problems = self.noise.problems()
        if not 0 <= self.random_rate <= 1:
            problems.append(f"random_rate is a share between 0 and 1; it is {self.random_rate}")
        return problems or find_problems(self, specials, lengths, ("mask",))
