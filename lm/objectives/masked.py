"""Masked language modelling for encoders: hidden tokens are predicted where they stand.

Owns how many tokens are hidden and when the choice changes; `pairs` puts the sequence together,
`masking` chooses and replaces. Law: `targets` is the whole original sequence, `inputs` differs from it
only where `weights` is 1, and kept or random tokens count like masked ones.

Tokens [20, 21, 22, 23] with CLS 5, SEP 6 and mask 4, hiding 21:

    inputs [5, 20, 4, 22, 23, 6]   targets [5, 20, 21, 22, 23, 6]   weights [0, 0, 1, 0, 0, 0]
"""

import dataclasses
import math
from typing import Literal

import numpy as np

from lm.batch import Document, Example, Lengths, SpecialTokens
from lm.objectives.base import CORRUPTION, Context, Traits, Vocabulary, find_missing, special
from lm.objectives.masking import NGrams, Replacement, Tokens
from lm.objectives.pairs import NextSentence, SentenceOrder, Sequence, SingleText


def find_text(tokens: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """Returns bool[T], false at the special tokens that an encoder's sequence was put together with."""
    return ~np.isin(tokens, [special(vocabulary.specials, "cls"), special(vocabulary.specials, "sep")])


def make_encoder_example(sequence: Sequence, shown: np.ndarray, chosen: np.ndarray) -> Example:
    """Returns the example of a sequence of which `shown` is read and `chosen` predicted; its label is at CLS."""
    length = len(sequence.tokens)
    label_targets = label_weights = None
    if sequence.label is not None:
        label_targets, label_weights = np.zeros(length, np.int32), np.zeros(length, np.float32)
        label_targets[0], label_weights[0] = sequence.label, 1
    return Example(
        inputs=shown,
        targets=sequence.tokens,
        weights=chosen.astype(np.float32),
        bidirectional=np.ones(length, bool),
        token_types=sequence.token_types,
        label_targets=label_targets,
        label_weights=label_weights,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedLM:
    """Predicts hidden tokens of a sequence that is seen both ways (BERT, section 3.1; RoBERTa, section 4.1).

    The defaults are RoBERTa's; `BERT`, `ROBERTA` and `ALBERT` are the published settings. A sequence too short
    for a whole word to be hidden is dropped unless it has a label.

    Attributes:
      texts: what a sequence is made of, and with it next-sentence prediction or sentence order.
      rate: share of the sequence that is hidden, its special tokens counted.
      unit: what is hidden at once.
      replacement: what stands in place of a hidden token.
      rounding: of rate times length: "nearest" (to even, at least 1), or "stochastic": up or down with the mean exact.
      max_predictions: most tokens hidden in a sequence; None for no limit.
      num_duplicates: how many different corruptions a document has, used in turn (static masking); None for a
        new one in every epoch (dynamic masking).
    """

    texts: SingleText | NextSentence | SentenceOrder = SingleText()
    rate: float = 0.15
    unit: Tokens | NGrams = Tokens()
    replacement: Replacement = Replacement()
    rounding: Literal["nearest", "stochastic"] = "stochastic"
    max_predictions: int | None = None
    num_duplicates: int | None = None

    @property
    def traits(self) -> Traits:
        """One stack that sees both ways, with token types and a label for pairs."""
        fields = frozenset({"token_types", "label_targets", "label_weights"}) if self.texts.num_labels else frozenset()
        return Traits(
            layouts=frozenset({"encoder", "decoder"}),
            bidirectional=True,
            autoregressive=False,
            originals=True,
            fields=fields,
            num_labels=self.texts.num_labels,
            label_rule=type(self.texts).__name__ if self.texts.num_labels else "",
        )

    def count(self, length: int, rng: np.random.Generator) -> int:
        """Returns how many tokens of a sequence of `length`, special ones included, are hidden: at least 1."""
        if self.rounding == "stochastic":
            count = math.floor(self.rate * length + rng.random())
        else:
            count = round(self.rate * length)
        return min(max(count, 1), length if self.max_predictions is None else self.max_predictions)

    def examples(self, document: Document, context: Context) -> list[Example]:
        """Returns one example for each sequence of the document."""
        vocabulary = context.vocabulary
        if self.num_duplicates is None:
            rng = context.rng(CORRUPTION)
        else:
            rng = context.static_rng(document, self.num_duplicates, CORRUPTION)
        examples = []
        for sequence in self.texts.sequences(document, context, rng):
            tokens = sequence.tokens
            count = self.count(len(tokens), rng)
            chosen = self.unit.choose(find_text(tokens, vocabulary), vocabulary.starts_word[tokens], count, rng)
            shown = self.replacement.apply(tokens, chosen, vocabulary, rng)
            if chosen.any() or sequence.label is not None:
                examples.append(make_encoder_example(sequence, shown, chosen))
        return examples

    def problems(self, specials: SpecialTokens, lengths: Lengths) -> list[str]:
        """Returns what cannot work in these settings."""
        problems = find_missing(specials, "mask", "cls", "sep")
        if not 0 < self.rate <= 1:
            problems.append(f"rate is a share above 0 and up to 1; it is {self.rate}")
        for name in ("max_predictions", "num_duplicates"):
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"{name} must be at least 1, or None; it is {value}")
        return problems + self.unit.problems() + self.replacement.problems() + self.texts.problems(lengths)


BERT = MaskedLM(
    texts=NextSentence(),
    replacement=Replacement(random_specials=True),
    rounding="nearest",
    max_predictions=20,
    num_duplicates=10,
)
ROBERTA = MaskedLM()
ALBERT = MaskedLM(
    texts=SentenceOrder(), unit=NGrams(longest=3), rounding="nearest", max_predictions=20, num_duplicates=40
)
