"""Fill in the middle: a text is cut in three and the middle moved to the end, for a causal model.

Owns the cuts and the two orders. Law: the parts of a transformed text, put back in order, are the
text; nothing is transformed at rate 0, which is causal language modelling.

"abcdefgh" with cuts at 2 and 5:

    PSM  PRE a b SUF f g h MID c d e eos
    SPM  PRE SUF f g h MID a b c d e eos
"""

import dataclasses
from typing import Literal

import numpy as np

from lm.batch import Document, Example, Lengths, SpecialTokens
from lm.objectives.base import CORRUPTION, Context, Frame, Traits, Vocabulary, cut, find_missing, special

# How texts are laid out whose middle is to be filled in.
PSM = Frame(before=("fim[0]",), between=("fim[1]",), after=("fim[2]",))
SPM = Frame(before=("fim[0]", "fim[1]"), between=("fim[2]",), suffix_first=True)
# The tokens that a transformed piece has beside its text: prefix, suffix and middle marks, and eos.
MARKS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class FillInTheMiddle:
    """Predicts every token of texts of which some have their middle moved to the end (Bavarian et al. 2022).

    Both orders are those of section 3, SPM in its second variant; `spm_rate` 0.5 trains them jointly.

    Attributes:
      rate: probability that a text is transformed.
      spm_rate: share of the transformed texts in the order suffix, prefix, middle; the rest is prefix, suffix, middle.
      level: "context" cuts a document into pieces that fit a row, then transforms them, each with its eos; "document"
        transforms the document, then cuts it, whereby long documents lose sight of their suffix.
      unit: where a text may be cut: between characters, each part then being encoded anew, or between tokens.
      loss_on_marks: whether the three marks are predicted as well; eos always is, it says that the middle is complete.
    """

    rate: float = 0.5
    spm_rate: float = 0.5
    level: Literal["context", "document"] = "context"
    unit: Literal["character", "token"] = "character"
    loss_on_marks: bool = True

    @property
    def traits(self) -> Traits:
        """One causal stack; prompts are as they come where such texts were trained on."""
        plain = [Frame()] if self.rate < 1 else []
        moved = [PSM if self.spm_rate < 1 else SPM] if self.rate > 0 else []
        frame, *others = plain + moved
        return Traits(layouts=frozenset({"decoder"}), frame=dataclasses.replace(frame, others=tuple(others)))

    def examples(self, document: Document, context: Context) -> list[Example]:
        """Returns the document's pieces; none for an empty document."""
        if len(document.tokens) == 0:
            return []
        rng = context.rng(CORRUPTION)
        if self.level == "document":
            return self.transform_document(document.tokens, context, rng)
        return self.transform_pieces(document.tokens, context, rng)

    def transform_document(self, tokens: np.ndarray, context: Context, rng: np.random.Generator) -> list[Example]:
        """Returns the rows of the document, transformed or not as a whole."""
        specials = context.vocabulary.specials
        bos, eos = special(specials, "bos"), special(specials, "eos")
        stream = np.append(tokens, eos)
        if rng.random() < self.rate:
            stream = self.rearrange(tokens, self.draw(rng), context.vocabulary)
        inputs = cut(np.concatenate([[bos], stream[:-1]]), context.lengths.tokens)
        targets = cut(stream, context.lengths.tokens)
        return [self.example(i, t, specials) for i, t in zip(inputs, targets, strict=True)]

    def transform_pieces(self, tokens: np.ndarray, context: Context, rng: np.random.Generator) -> list[Example]:
        """Returns the rows of the document, each a piece of it, transformed or not."""
        vocabulary, specials, limit = context.vocabulary, context.vocabulary.specials, context.lengths.tokens
        bos, eos = special(specials, "bos"), special(specials, "eos")
        plain = np.concatenate([[bos], tokens, [eos]])
        examples, start = [], 0
        while start <= len(tokens):
            if start < len(tokens) and rng.random() < self.rate:
                size, stream = self.fit(tokens[start:], self.draw(rng), limit, vocabulary)
                inputs = np.concatenate([[bos], stream[:-1]])
                start += size + (start + size == len(tokens))  # A transformed piece has its own eos.
            else:
                size = find_cut(plain[start + 1 :], limit, vocabulary)
                inputs, stream = plain[start : start + size], plain[start + 1 : start + size + 1]
                start += size
            examples.append(self.example(inputs, stream, specials))
        return examples

    def fit(self, tokens: np.ndarray, draw: np.ndarray, limit: int, vocabulary: Vocabulary) -> tuple[int, np.ndarray]:
        """Returns how many tokens the next piece takes, and the piece transformed: at most `limit` tokens.

        Parts that are encoded anew can have more tokens than before, so the piece shrinks until it fits: nothing
        is trimmed from a suffix or an eos.
        """
        size = find_cut(tokens, max(1, limit - MARKS), vocabulary)
        while True:
            stream = self.rearrange(tokens[:size], draw, vocabulary)
            if len(stream) <= limit:
                return size, stream
            if size == 1:
                raise ValueError(f"a single token, cut in three, does not fit a row of {limit}: raise lengths.tokens")
            size = find_cut(tokens, max(1, size - (len(stream) - limit)), vocabulary)

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Returns f64[3] in [0, 1): two places to cut at, and the choice of the order."""
        return rng.random(3)

    def rearrange(self, tokens: np.ndarray, draw: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
        """Returns the transformed tokens with their marks and eos, cut as `draw` says."""
        first, second = sorted(draw[:2])
        if self.unit == "token":
            a, b = (int(place * (len(tokens) + 1)) for place in (first, second))
            prefix, middle, suffix = tokens[:a], tokens[a:b], tokens[b:]
        else:
            text = vocabulary.decode(tokens)
            a, b = (int(place * (len(text) + 1)) for place in (first, second))
            prefix, middle, suffix = (vocabulary.encode(part) for part in (text[:a], text[a:b], text[b:]))
        specials = vocabulary.specials
        pre, suf, mid = specials.fim
        if draw[2] < self.spm_rate:
            parts = [[pre, suf], suffix, [mid], prefix, middle, [special(specials, "eos")]]
        else:
            parts = [[pre], prefix, [suf], suffix, [mid], middle, [special(specials, "eos")]]
        return np.concatenate(parts).astype(np.int32)

    def example(self, inputs: np.ndarray, targets: np.ndarray, specials: SpecialTokens) -> Example:
        """Returns the example of shifted inputs and their targets."""
        counts = np.ones(len(targets), bool) if self.loss_on_marks else ~np.isin(targets, specials.fim)
        return Example(inputs.astype(np.int32), targets.astype(np.int32), counts.astype(np.float32))

    def problems(self, specials: SpecialTokens, lengths: Lengths) -> list[str]:
        """Returns what cannot work in these settings."""
        problems = find_missing(specials, "bos", "eos")
        if len(specials.fim) != 3:
            problems.append("the tokenizer needs three fim tokens (prefix, suffix, middle) for filling in the middle")
        for name in ("rate", "spm_rate"):
            if not 0 <= getattr(self, name) <= 1:
                problems.append(f"{name} is a share between 0 and 1; it is {getattr(self, name)}")
        if lengths.tokens < 4 * MARKS:
            problems.append(f"rows of {lengths.tokens} tokens are too short to fill in: have at least {4 * MARKS}")
        return problems


def find_cut(tokens: np.ndarray, limit: int, vocabulary: Vocabulary) -> int:
    """Returns the largest number of tokens, at most `limit`, after which no character is torn apart.

    Bytes of one character can be several tokens; decoding them apart would lose the character. UTF-8 has at
    most four, so four tokens either side tell.
    """
    if len(tokens) <= limit:
        return len(tokens)
    for size in range(limit, max(limit - 4, 1), -1):
        left, right = tokens[max(size - 4, 0) : size], tokens[size : size + 4]
        apart, together = vocabulary.decode(left) + vocabulary.decode(right), vocabulary.decode(np.append(left, right))
        if apart.replace(" ", "") == together.replace(" ", ""):  # Some tokenizers drop a leading space.
            return size
    return limit
