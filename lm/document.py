"""The contract between a document and its training examples: `Vocabulary`, `Context`, `Objective`.

It stands on floor 0 because the rooms `data` and `objectives`, which may not import each other, both
speak it. It knows no tokenizer, no source and no objective, and imports no jax. Law: the examples are a
function of (document, settings, lengths, seed, epoch, index) only, never of worker, process or call order.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import numpy as np

from lm.batch import Document, Example, Lengths, SpecialTokens

Layout = Literal["decoder", "encoder", "encoder_decoder"]


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

    def static_rng(self, document: Document, num_duplicates: int, purpose: int) -> np.random.Generator:
        """Returns a generator that repeats every `num_duplicates` epochs, wherever the shuffle puts the document.

        It is keyed by the document's id instead of its index, so that a corpus has a fixed number of
        corruptions of each document, as if they had been written to files once (BERT).
        """
        digest = int.from_bytes(hashlib.blake2b(document.id.encode(), digest_size=16).digest(), "little")
        key = np.random.SeedSequence([self.seed, self.epoch % num_duplicates, digest, purpose])
        return np.random.Generator(np.random.Philox(key))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frame:
    """The special tokens around what a trained model is asked to continue or to fill in, and where its answer stands.

    The source is `before`, the text, `between`, the suffix (empty if the text is to be continued), `after`. One stack
    reads `start`, the source, `answer`. With two, the encoder reads the source, and the decoder begins with `start`,
    `answer`. Tokens have the names that `SpecialTokens.find` knows.

    Attributes:
      start: the decoder's first input, where that is not the source's first token.
      before: at the beginning of a source.
      between: mark the gap between the text and the suffix; None where sources have no gap to fill in.
      after: at the end of a source.
      answer: at the beginning of a target.
      end: each of them ends a target.
      suffix_first: whether text and suffix change places.
      bidirectional: whether a single stack sees the source both ways.
      strides: how far (position, second position) of each token of the answer are from those of the token before it:
        along the text, or inside the blank that the gap is (GLM).
      mode: which of `lm.batch.MODES` announces the source, by the first token of `before`; None if there is none.
      others: further frames of the same objective's examples, in order of preference.
    """

    start: tuple[str, ...] = ("bos",)
    before: tuple[str, ...] = ()
    between: tuple[str, ...] | None = None
    after: tuple[str, ...] = ()
    answer: tuple[str, ...] = ()
    end: tuple[str, ...] = ("eos",)
    suffix_first: bool = False
    bidirectional: bool = False
    strides: tuple[int, int] = (1, 0)
    mode: str | None = None
    others: "tuple[Frame, ...]" = ()


# Text alone, as a causal model reads it.
PLAIN = Frame()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traits:
    """What an objective's examples hold, as data, so that a model is checked against them without naming either.

    Attributes:
      layouts: the stacks that can read the examples. "decoder": one stack that obeys the causal order and the
        `bidirectional` flags; "encoder": one stack that sees both ways everywhere; "encoder_decoder": two stacks,
        in use when `Lengths.encoder` is set.
      bidirectional: whether positions of the decoder layout may see ahead (a kernel that is causal only cannot).
      autoregressive: whether each target follows its input, so that the trained model generates left to right;
        false where a position predicts its own hidden token.
      originals: whether `targets` holds the original token at every position, whatever the weights (a model that
        judges replaced tokens reads them).
      needs_generator: whether the objective is meant for such a model only.
      fields: optional fields of `Batch` that every example sets, the encoder's apart.
      num_labels: classes in `label_targets`; 0 where no label is set.
      label_rule: what the label says; those of different rules cannot be learnt by one head. Empty without labels.
      frame: how examples begin and where their source ends, so that prompts are laid out as training was; of a
        mixture, that of the first component that generates.
      frames: of a mixture, the names and frames of the components that generate.
      component_names: what the ids in `components` stand for, for logs; empty where the field is not set.
    """

    layouts: frozenset[Layout]
    bidirectional: bool = False
    autoregressive: bool = True
    originals: bool = False
    needs_generator: bool = False
    fields: frozenset[str] = frozenset()
    num_labels: int = 0
    label_rule: str = ""
    frame: Frame = PLAIN
    frames: tuple[tuple[str, Frame], ...] = ()
    component_names: tuple[str, ...] = ()


class Objective(Protocol):
    """Turns documents into examples. Implementations are frozen dataclasses, one a file."""

    @property
    def traits(self) -> Traits:
        """What the examples hold, given these settings."""
        ...

    def examples(self, document: Document, context: Context) -> list[Example]:
        """Returns the document's examples, each no longer than `context.lengths`; may be empty."""
        ...

    def problems(self, specials: SpecialTokens, lengths: Lengths) -> list[str]:
        """Returns one plain sentence for each reason why these settings cannot work; empty if none."""
        ...
