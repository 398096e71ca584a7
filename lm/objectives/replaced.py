"""ELECTRA's replaced-token detection, the host's part: masked tokens, and the originals everywhere.

Owns the choice of positions. The model draws the replacements from its generator, and judges every
position against `targets`: label = replaced and different. Law: `targets` is the whole original sequence, and
`weights` is 1 exactly at the positions that the generator may replace.

Tokens [20, 21, 22, 23] with CLS 5, SEP 6 and mask 4, choosing 22:

    inputs [5, 20, 21, 4, 23, 6]   targets [5, 20, 21, 22, 23, 6]   weights [0, 0, 0, 1, 0, 0]
"""

import dataclasses

from lm.batch import Document, Example, Lengths, SpecialTokens
from lm.objectives.base import CORRUPTION, Context, Traits, find_missing
from lm.objectives.masked import find_text, make_encoder_example
from lm.objectives.masking import Replacement, Tokens
from lm.objectives.pairs import SingleText


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplacedTokenDetection:
    """Hides tokens for a generator to replace and a discriminator to find (Clark et al. 2020, section 2).

    Positions are drawn without repetition (the original draws 19 of which about 17.7 differ).

    Attributes:
      rate: share of the sequence that is hidden, special tokens counted; 0.25 in the large model.
      keep_rate: share of the hidden tokens that the generator sees as they are.
    """

    rate: float = 0.15
    keep_rate: float = 0.15

    @property
    def traits(self) -> Traits:
        """An encoder that has a generator."""
        return Traits(
            layouts=frozenset({"encoder"}),
            bidirectional=True,
            autoregressive=False,
            originals=True,
            needs_generator=True,
        )

    def count(self, length: int, longest: int) -> int:
        """Returns how many tokens of a sequence are hidden, given the longest sequence."""
        return max(1, min(int((self.rate + 0.005) * longest), round(self.rate * length)))

    def examples(self, document: Document, context: Context) -> list[Example]:
        """Returns one example for each piece of the document that fits a row."""
        rng = context.rng(CORRUPTION)
        vocabulary = context.vocabulary
        replacement = Replacement(mask_rate=1 - self.keep_rate, random_rate=0.0)
        examples = []
        for sequence in SingleText().sequences(document, context, rng):
            tokens = sequence.tokens
            count = self.count(len(tokens), context.lengths.tokens)
            chosen = Tokens().choose(find_text(tokens, vocabulary), vocabulary.starts_word[tokens], count, rng)
            shown = replacement.apply(tokens, chosen, vocabulary, rng)
            examples.append(make_encoder_example(sequence, shown, chosen))
        return examples

    def problems(self, specials: SpecialTokens, lengths: Lengths) -> list[str]:
        """Returns what cannot work in these settings."""
        problems = find_missing(specials, "mask", "cls", "sep")
        if not 0 < self.rate <= 1:
            problems.append(f"rate is a share above 0 and up to 1; it is {self.rate}")
        if not 0 <= self.keep_rate < 1:
            problems.append(f"keep_rate is a share of at least 0 and below 1; it is {self.keep_rate}")
        return problems + SingleText().problems(lengths)
