"""Causal language modelling: every token of a document is predicted from the ones before it.

Owns the shift by one and the cut of long documents. Knows no other objective. Law: over the examples
of a document each token, and the eos that ends it, is a target exactly once.

A document [5, 6, 7] in rows of two tokens (bos 1, eos 2):

    inputs  [1, 5]  targets [5, 6]
    inputs  [6, 7]  targets [7, 2]
"""

import dataclasses

import numpy as np

from lm.batch import Document, Example, Lengths, SpecialTokens
from lm.objectives.base import Context, Traits, cut, find_missing, special


@dataclasses.dataclass(frozen=True, kw_only=True)
class Causal:
    """Predicts each token of a document from those before it, and eos at its end.

    The first input of a document is bos. A document longer than a row is cut into consecutive
    segments, whose positions restart at 0; the first input of a continuation is the token before it.
    """

    @property
    def traits(self) -> Traits:
        """One causal stack."""
        return Traits(layouts=frozenset({"decoder"}))

    def examples(self, document: Document, context: Context) -> list[Example]:
        """Returns the document's segments; none for an empty document."""
        if len(document.tokens) == 0:
            return []
        specials = context.vocabulary.specials
        bos, eos = special(specials, "bos"), special(specials, "eos")
        stream = np.concatenate([[bos], document.tokens, [eos]]).astype(np.int32)
        inputs = cut(stream[:-1], context.lengths.tokens)
        targets = cut(stream[1:], context.lengths.tokens)
        return [Example(i, t, np.ones(len(t), np.float32)) for i, t in zip(inputs, targets, strict=True)]

    def problems(self, specials: SpecialTokens, lengths: Lengths) -> list[str]:
        """Returns the special tokens that are missing."""
        return find_missing(specials, "bos", "eos")
