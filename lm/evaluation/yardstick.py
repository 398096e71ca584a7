"""Bits per byte for every architecture: how held-out text is scored so that runs can be laid side by side.

Owns objectives that only evaluate: host-side and pure like those that train. Knows no model. Law: every token
of a document is scored exactly once, so that a model to which all V ids are alike needs log2(V) bits for each.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from lm.batch import Document, Example, Lengths, SpecialTokens
from lm.document import PLAIN, Context, Frame, Layout, Objective, Traits
from lm.objectives import Causal
from lm.objectives.base import cut, find_missing, special
from lm.objectives.glm import arrange_blanks


class Yardstick(NamedTuple):
    """How held-out text is scored.

    Attributes:
      objective: makes the examples.
      words: the same for a reader.
    """

    objective: Objective
    words: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Continuation:
    """Scores each token after those before it, by the chain rule: two stacks.

    A document is cut into decoder rows. The encoder reads what comes right before the piece, as much as fits, a mode
    token before it, if any, the mark of the gap behind it, if any, and eos; before the first piece there is nothing.
    The document's eos is scored too.

    Attributes:
      frame: the special tokens in sources and before targets in training.
    """

    frame: Frame = PLAIN

    @property
    def traits(self) -> Traits:
        """Two stacks."""
        return Traits(layouts=frozenset({"encoder_decoder"}))

    @property
    def after(self) -> tuple[str, ...]:
        """The special tokens at the end of a source; eos always, so that none is empty."""
        return (*(self.frame.between or ()), "eos")

    def examples(self, document: Document, context: Context) -> list[Example]:
        """Returns one example for each piece of the document; none for an empty document."""
        if len(document.tokens) == 0:
            return []
        specials = context.vocabulary.specials
        named = (self.frame.start, self.frame.before, self.after, self.frame.answer)
        start, before, after, answer = ([special(specials, name) for name in names] for names in named)
        room = (context.lengths.encoder or 1) - len(before) - len(after)
        stream = np.append(document.tokens, special(specials, "eos")).astype(np.int32)
        examples, done = [], 0
        for piece in cut(stream, context.lengths.tokens - len(answer)):
            source = np.concatenate([before, stream[max(0, done - room) : done], after]).astype(np.int32)
            target = np.concatenate([answer, piece]).astype(np.int32)
            inputs = np.concatenate([start, target[:-1]]).astype(np.int32)
            weights = (np.arange(len(target)) >= len(answer)).astype(np.float32)
            examples.append(Example(inputs, target, weights, encoder_inputs=source))
            done += len(piece)
        return examples

    def problems(self, specials: SpecialTokens, lengths: Lengths) -> list[str]:
        """Returns what cannot work in these settings."""
        needed = {*self.frame.start, *self.frame.before, *self.after, *self.frame.answer}
        return find_missing(specials, *sorted(needed)) + ([] if lengths.encoder else ["lengths.encoder must be set"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class PseudoLikelihood:
    """Scores each token hidden among the others, both sides seen (Salazar et al. 2020): masked language models.

    Each text is read `stride` times; the k-th time every token whose place is k modulo `stride` is masked, so that
    each is hidden once. No product of conditionals is a likelihood here: the figure is no code length, and lower than
    a left-to-right model's of equal quality. Compare it among masked models, and with care beyond.

    Attributes:
      stride: tokens from one hidden token to the next; 7 hides as many at a time as training at a rate of 15 %. None
        hides one at a time.
      block_positions: whether second positions are set, all 0, for a model that reads them.
    """

    stride: int | None = 7
    block_positions: bool = False

    @property
    def traits(self) -> Traits:
        """One stack that sees both ways."""
        fields = frozenset({"block_positions"}) if self.block_positions else frozenset()
        return Traits(
            layouts=frozenset({"encoder", "decoder"}),
            bidirectional=True,
            autoregressive=False,
            originals=True,
            fields=fields,
        )

    def examples(self, document: Document, context: Context) -> list[Example]:
        """Returns `stride` examples for each piece of the document, or as many as it has tokens if those are less."""
        specials = context.vocabulary.specials
        cls, sep, mask = (special(specials, name) for name in ("cls", "sep", "mask"))
        examples = []
        for piece in cut(document.tokens, context.lengths.tokens - 2) if len(document.tokens) else []:
            sequence = np.concatenate([[cls], piece, [sep]]).astype(np.int32)
            stride = min(self.stride or len(piece), len(piece))
            # -1 for cls, so that the first token has place 0; sep comes after the last.
            places = np.arange(-1, len(piece) + 1)
            is_text = (places >= 0) & (places < len(piece))
            for turn in range(stride):
                is_hidden = is_text & (places % stride == turn)
                example = Example(
                    inputs=np.where(is_hidden, mask, sequence).astype(np.int32),
                    targets=sequence,
                    weights=is_hidden.astype(np.float32),
                    bidirectional=np.ones(len(sequence), bool),
                    block_positions=np.zeros(len(sequence), np.int32) if self.block_positions else None,
                )
                examples.append(example)
        return examples

    def problems(self, specials: SpecialTokens, lengths: Lengths) -> list[str]:
        """Returns what cannot work in these settings."""
        short = [f"rows of {lengths.tokens} tokens hold no text beside cls and sep"] if lengths.tokens < 3 else []
        return find_missing(specials, "mask", "cls", "sep") + short


@dataclasses.dataclass(frozen=True, kw_only=True)
class WholeBlank:
    """Scores each token after those before it, each piece of a document being one blank: models of GLM's kind.

    Part A is a single mask, Part B the text; the end of the blank is scored too.
    """

    @property
    def traits(self) -> Traits:
        """One stack with a second position."""
        return Traits(layouts=frozenset({"decoder"}), bidirectional=True, fields=frozenset({"block_positions"}))

    def examples(self, document: Document, context: Context) -> list[Example]:
        """Returns one example for each piece of the document; none for an empty document."""
        if len(document.tokens) == 0:
            return []
        pieces = cut(document.tokens, context.lengths.tokens - 2)
        specials, only = context.vocabulary.specials, np.zeros(1, np.int64)
        return [arrange_blanks(piece, np.array([[0, len(piece)]]), only, specials) for piece in pieces]

    def problems(self, specials: SpecialTokens, lengths: Lengths) -> list[str]:
        """Returns what cannot work in these settings."""
        short = [f"rows of {lengths.tokens} tokens hold no text in a blank"] if lengths.tokens < 3 else []
        return find_missing(specials, "mask", "sop", "eop") + short


def choose_yardstick(objective: Objective, layout: Layout) -> Yardstick:
    """Returns how a model of this layout, trained by this objective, is scored; decided by what its examples hold.

    A mixture with a masked part is scored by that part: all of its texts can be. A single stack that was trained with
    a prefix reads bos alone as its prefix: nothing that is predicted is seen both ways.
    """
    traits = objective.traits
    blanks = "block_positions" in traits.fields
    if not traits.autoregressive:
        words = "each token hidden once, both sides seen: a pseudo-likelihood, no code length"
        return Yardstick(PseudoLikelihood(block_positions=blanks), words)
    if layout == "encoder_decoder":
        words = "each token after those before it, the encoder reading what comes before the decoder's row"
        return Yardstick(Continuation(frame=traits.frame), words)
    if blanks:
        return Yardstick(WholeBlank(), "each token after those before it, each row being one blank")
    return Yardstick(Causal(), "each token after those before it in its row")
