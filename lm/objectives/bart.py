"""BART's denoising: sentences permuted, spans of words infilled, the text rotated; the target is the text.

Owns the noise functions and their order. Law: putting the masked spans back into the source gives
the permuted, rotated text; the source is never longer than the text.

Words a ... j with the spans [c d] and [h], and one of length zero before e (mask M):

    source  <s> a b M M e f g M i j </s>      target  <s> a b c d e f g h i j </s>
    inputs  </s> <s> a b c d e f g h i j      (the decoder starts with </s>, as the released model does)
"""

import dataclasses
import fractions
import math
from typing import Literal

import numpy as np

from lm.batch import Document, Example, Lengths, SpecialTokens
from lm.objectives.base import CORRUPTION, Context, Traits, Vocabulary, cut, find_missing, special
from lm.objectives.noise import cover_spans, place_spans
from lm.objectives.sentences import split_sentences
from lm.objectives.text_to_text import TextToText, join


def count_noise(rate: float, total: int) -> int:
    """Returns ceil(rate * total) of the decimal fraction that `rate` shows, without binary surprises."""
    return math.ceil(fractions.Fraction(repr(rate)) * total)


def trim_lengths(lengths: np.ndarray, budget: int) -> tuple[np.ndarray, int]:
    """Returns the positive lengths, cut to sum to `budget` exactly, and the number of zeros before the cut.

    Raises:
      ValueError: if the lengths sum to less than `budget`.
    """
    sums = np.cumsum(lengths)
    if budget > 0 and (len(sums) == 0 or sums[-1] < budget):
        raise ValueError(f"lengths that sum to {sums[-1] if len(sums) else 0} cannot spend a budget of {budget}")
    last = int(np.searchsorted(sums, budget))
    trimmed = np.append(lengths[:last], budget - (sums[last - 1] if last else 0))
    return trimmed[trimmed > 0], int((trimmed == 0).sum()) if budget else 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class BART:
    """Reconstructs a text from its noised form (Lewis et al. 2020, section 2.2; defaults as in the released model).

    Token masking is `mean_span_length=None`; token deletion is the same with `replace="delete"`.

    Attributes:
      mask_rate: share of the words that is masked; 0 for no infilling.
      mean_span_length: mean of the Poisson-distributed span lengths, in words; None for single words.
      replace: what becomes of a span: one mask for it all, one per token, or nothing.
      random_rate: share of the masks that are a random token of text instead.
      permute_rate: share of the sentences that change places.
      rotate_rate: probability that the text begins at a random token and wraps round.
      whole_words: whether spans are counted in words, or in tokens.
      prefix: how a single stack sees the source; two stacks do not read it.
    """

    mask_rate: float = 0.3
    mean_span_length: float | None = 3.5
    replace: Literal["span", "token", "delete"] = "span"
    random_rate: float = 0.1
    permute_rate: float = 1.0
    rotate_rate: float = 0.0
    whole_words: bool = True
    prefix: Literal["bidirectional", "causal"] = "bidirectional"

    @property
    def traits(self) -> Traits:
        """Those of a text-to-text objective whose source and target have a bos and whose decoder starts with eos."""
        traits = TextToText(prefix=self.prefix).traits
        frame = dataclasses.replace(traits.frame, start=("eos",), before=("bos",), answer=("bos",))
        return dataclasses.replace(traits, frame=frame)

    def examples(self, document: Document, context: Context) -> list[Example]:
        """Returns one example for each segment of the document."""
        rng = context.rng(CORRUPTION)
        lengths, vocabulary = context.lengths, context.vocabulary
        bos, eos = special(vocabulary.specials, "bos"), special(vocabulary.specials, "eos")
        examples = []
        for tokens in cut(document.tokens, self.segment_length(lengths)):
            noised = self.permute(tokens, vocabulary, rng)
            noised = self.infill(noised, vocabulary, rng)
            if rng.random() < self.rotate_rate and len(noised):
                noised = np.roll(noised, -rng.integers(len(noised)))
            source, target = ([bos, *part, eos] for part in (noised, tokens))
            examples.append(join(np.array(source), np.array(target), eos, lengths, self.prefix))
        return examples

    def segment_length(self, lengths: Lengths) -> int:
        """Returns the longest segment that fits with its bos and eos, in source and target."""
        if lengths.encoder is None:
            return lengths.tokens // 2 - 2
        return min(lengths.encoder, lengths.tokens) - 2

    def permute(self, tokens: np.ndarray, vocabulary: Vocabulary, rng: np.random.Generator) -> np.ndarray:
        """Returns the tokens with `permute_rate` of the sentences in each other's places."""
        sentences = split_sentences(tokens, vocabulary)
        moved = rng.choice(len(sentences), size=count_noise(self.permute_rate, len(sentences)), replace=False)
        order = np.arange(len(sentences))
        order[np.sort(moved)] = moved
        return np.concatenate([sentences[k] for k in order])

    def draw_lengths(self, budget: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
        """Returns span lengths that sum to `budget`, and the number of spans of length zero."""
        if self.mean_span_length is None:
            return np.ones(budget, np.int64), 0
        lengths = np.zeros(0, np.int64)
        while lengths.sum() < budget:
            lengths = np.append(lengths, rng.poisson(self.mean_span_length, size=budget))
        return trim_lengths(lengths, budget)

    def infill(self, tokens: np.ndarray, vocabulary: Vocabulary, rng: np.random.Generator) -> np.ndarray:
        """Returns the tokens with disjoint spans of words replaced.

        Spans lie apart where they can, so that exactly `mask_rate` of the words vanishes (fairseq's may overlap);
        spans of length zero insert at most as many masks as the others saved tokens.
        """
        begins = vocabulary.starts_word[tokens] if self.whole_words else np.ones(len(tokens), bool)
        begins[0] = True
        words = np.append(np.flatnonzero(begins), len(tokens))
        num_words = len(words) - 1
        budget = count_noise(self.mask_rate, num_words)
        if budget == 0:
            return tokens
        lengths, num_inserted = self.draw_lengths(budget, rng)
        starts = place_spans(lengths, num_words, int(num_words - budget >= len(lengths) - 1), rng)
        begins_at, ends_at = words[starts], words[starts + lengths]
        is_hidden = cover_spans(begins_at, ends_at - begins_at, len(tokens))
        if self.replace == "delete":
            return tokens[~is_hidden]
        is_mask = is_hidden if self.replace == "token" else np.isin(np.arange(len(tokens)), begins_at)
        source = np.where(is_mask, self.draw_masks(len(tokens), vocabulary, rng), tokens)[is_mask | ~is_hidden]
        num_inserted = min(num_inserted, len(tokens) - len(source))
        places = rng.integers(len(source) + 1, size=num_inserted)
        return np.insert(source, places, self.draw_masks(num_inserted, vocabulary, rng))

    def draw_masks(self, count: int, vocabulary: Vocabulary, rng: np.random.Generator) -> np.ndarray:
        """Returns i64[count] masks, `random_rate` of them random tokens of text."""
        text_ids = np.flatnonzero(vocabulary.token_bytes > 0)
        is_random = rng.random(count) < self.random_rate
        return np.where(is_random, rng.choice(text_ids, count), special(vocabulary.specials, "mask"))

    def problems(self, specials: SpecialTokens, lengths: Lengths) -> list[str]:
        """Returns what cannot work in these settings."""
        problems = find_missing(specials, "bos", "eos", "mask")
        for name in ("mask_rate", "random_rate", "permute_rate", "rotate_rate"):
            if not 0 <= getattr(self, name) <= 1:
                problems.append(f"{name} is a share between 0 and 1; it is {getattr(self, name)}")
        if self.mean_span_length is not None and self.mean_span_length <= 0:
            problems.append(
                f"mean_span_length must be above 0, or None for single words; it is {self.mean_span_length}"
            )
        if self.segment_length(lengths) < 1:
            problems.append(f"rows of {lengths} hold no text beside bos and eos: raise the lengths")
        return problems
