"""Prefix language modelling: a text is cut in two, the first part is seen, the second predicted.

Owns the cut; `noise` draws it, `text_to_text` lays the example out. Law: source and target in a row
are the segment.

Tokens [10, 11, 12, 13, 14] cut after the second (bos 0, eos 1; source without eos, one stack):

    inputs        [0, 10, 11, 12, 13, 14]   targets [10, 11, 12, 13, 14, 1]
    bidirectional [1,  1,  1,  0,  0,  0]   weights [ 0,  0,  1,  1,  1, 1]
"""

import dataclasses

import numpy as np

from lm.batch import Document, Example, Lengths, SpecialTokens
from lm.objectives.base import Context, Traits, Vocabulary
from lm.objectives.noise import SuffixNoise
from lm.objectives.text_to_text import Sizes, TextToText, find_problems, make_examples


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixLM:
    """Predicts the rest of a segment from a prefix of random length (T5's `prefix_lm`; UL2's S-denoiser).

    As in T5, each target ends with eos, also where a long document goes on in the next segment. About half of
    the tokens are predicted: compare objectives per loss token.

    Attributes:
      noise: how long the predicted suffix is.
      format: how source and target are laid out.
    """

    noise: SuffixNoise = SuffixNoise()
    format: TextToText = TextToText()

    @property
    def traits(self) -> Traits:
        """Those of the format."""
        return self.format.traits

    def sizes(self, length: int) -> Sizes:
        """Returns the most tokens that a segment of `length` tokens becomes."""
        noise, kept, _, _ = self.noise.sizes(length)
        return Sizes(kept, noise, length)

    def corrupt(
        self, tokens: np.ndarray, vocabulary: Vocabulary, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the prefix and the suffix of a segment, without eos."""
        del vocabulary  # Corrupts nothing.
        mask = self.noise.sample(len(tokens), rng)
        return tokens[~mask], tokens[mask]

    def examples(self, document: Document, context: Context) -> list[Example]:
        """Returns one example for each segment of the document."""
        return make_examples(self, document, context)

    def problems(self, specials: SpecialTokens, lengths: Lengths) -> list[str]:
        """Returns what cannot work in these settings."""
        return self.noise.problems() or find_problems(self, specials, lengths)
