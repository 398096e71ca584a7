"""The contract between a document and its training examples: `Vocabulary`, `Context`, `Objective`.

It stands on floor 0 because the rooms `data` and `objectives`, which may not import each other, both
speak it. It knows no tokenizer, no source and no objective, and imports no jax. Law: the examples are a
function of (document, settings, lengths, seed, epoch, index) only, never of worker, process or call order.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from lm.batch import Document, Example, Lengths, SpecialTokens


class Vocabulary(Protocol):
    """The part of a tokenizer that objectives use (`lm.data.tokenizers` has the real ones)."""

    @property
    def size(self) -> int:
        """Number of ids, special ones included."""
        ...

    @property
    def specials(self) -> SpecialTokens:
        """The ids that are not text."""
        ...

    @property
    def token_bytes(self) -> np.ndarray:
        """i32[V], UTF-8 bytes of text that each id stands for; 0 for the special ones."""
        ...

    @property
    def starts_word(self) -> np.ndarray:
        """bool[V], whether an id begins a new word (whole-word masking, BART's spans)."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """Returns i32[N], the ids of `text`, without special tokens."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of `ids`; special tokens are shown by their names."""
        ...


@dataclasses.dataclass(frozen=True)
class Context:
    """Everything besides the document that an example may depend on.

    Attributes:
      vocabulary: encodes, decodes and names the special tokens.
      lengths: the longest example that fits a row.
      seed: the run's data seed.
      epoch: how many times the corpus was passed before.
      index: the document's place in the epoch's global order.
      sample_document: draws another document of the corpus with the given generator (for pairs).
    """

    vocabulary: Vocabulary
    lengths: Lengths
    seed: int
    epoch: int
    index: int
    sample_document: Callable[[np.random.Generator], Document]

    def rng(self, purpose: int) -> np.random.Generator:
        """Returns a generator keyed by (seed, epoch, index, purpose), independent of call order."""
        key = np.random.SeedSequence([self.seed, self.epoch, self.index, purpose])
        return np.random.Generator(np.random.Philox(key))


class Objective(Protocol):
    """Turns documents into examples. Implementations are frozen dataclasses, one a file."""

    def examples(self, document: Document, context: Context) -> list[Example]:
        """Returns the document's examples, each no longer than `context.lengths`; may be empty."""
        ...

    def problems(self, specials: SpecialTokens, lengths: Lengths) -> list[str]:
        """Returns one plain sentence for each reason why these settings cannot work; empty if none."""
        ...
