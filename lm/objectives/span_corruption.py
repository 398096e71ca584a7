"""T5's span corruption: runs of tokens are replaced by sentinels, the target spells them out.

Owns the two sequences; `noise` chooses the runs, `text_to_text` lays the example out. Law: putting
the target's spans back at the sentinels of the source gives the segment.

Tokens [10 ... 19] with the runs [12, 13] and [18, 19], sentinels 99, 98, ...:

    source [10, 11, 99, 14, 15, 16, 17, 98]   target [99, 12, 13, 98, 18, 19]
"""

import dataclasses

import numpy as np

from lm.batch import Document, Example, Lengths, SpecialTokens
from lm.objectives.base import Context, Traits, Vocabulary
from lm.objectives.noise import SpanNoise, SuffixNoise, TokenNoise, find_runs
from lm.objectives.text_to_text import Sizes, TextToText, find_problems, make_examples, plan_segment


def replace_spans(tokens: np.ndarray, mask: np.ndarray, sentinels: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the source and the target of a segment whose corrupted tokens are true in `mask`.

    A mask that ends with an uncorrupted token closes the target with one more sentinel (T5, figure 2).

    Raises:
      ValueError: if there are more spans than sentinels.
    """
    runs = find_runs(mask)
    closing = int(not mask[-1])
    if len(runs) + closing > len(sentinels):
        raise ValueError(f"{len(runs) + closing} spans need as many sentinels; the tokenizer has {len(sentinels)}")
    starts = runs[:, 0]
    marks = np.array(sentinels[: len(runs) + closing], np.int32)
    shown, is_shown = tokens.astype(np.int32), ~mask
    shown[starts] = marks[: len(runs)]
    is_shown[starts] = True
    # In the target each mark stands before its run, and the closing one at the end.
    hidden_before = np.cumsum(mask) - mask
    places = np.append(hidden_before[starts], np.full(closing, mask.sum()))
    return shown[is_shown], np.insert(tokens[mask].astype(np.int32), places, marks)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpanCorruption:
    """Predicts the runs of tokens that sentinels replace in the source (T5, sections 3.1.4 and 3.3.4).

    The defaults are T5's: rows of 512 and 114 tokens take segments of exactly 568. With `TokenNoise`, runs of
    single tokens merge: the paper's baseline "replace corrupted spans".

    Attributes:
      noise: which tokens are corrupted.
      format: how source and target are laid out.
    """

    noise: SpanNoise | TokenNoise | SuffixNoise = SpanNoise()
    format: TextToText = TextToText()

    @property
    def traits(self) -> Traits:
        """Those of the format; a prompt has one span, which the first sentinel marks and the second or eos ends."""
        traits, first, second = self.format.traits, "sentinels[0]", "sentinels[1]"
        frame = dataclasses.replace(traits.frame, between=(first,), answer=(first,), end=(second, "eos"))
        return dataclasses.replace(traits, frame=frame)

    def sizes(self, length: int) -> Sizes:
        """Returns the most tokens that a segment of `length` tokens becomes."""
        noise, kept, spans, open_end = self.noise.sizes(length)
        return Sizes(kept + spans, noise + spans + open_end, length + 2 * spans + open_end)

    def corrupt(
        self, tokens: np.ndarray, vocabulary: Vocabulary, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the source and the target of a segment, without eos."""
        return replace_spans(tokens, self.noise.sample(len(tokens), rng), vocabulary.specials.sentinels)

    def examples(self, document: Document, context: Context) -> list[Example]:
        """Returns one example for each segment of the document."""
        return make_examples(self, document, context)

    def problems(self, specials: SpecialTokens, lengths: Lengths) -> list[str]:
        """Returns what cannot work, the most spans of a segment against the tokenizer's sentinels included."""
        problems = self.noise.problems()
        return problems or find_problems(self, specials, lengths) + self.sentinel_problems(specials, lengths)

    def sentinel_problems(self, specials: SpecialTokens, lengths: Lengths, extra: int = 0) -> list[str]:
        """Returns a sentence if a segment can have more spans than there are sentinels."""
        length = plan_segment(self, lengths, extra)
        _, _, spans, open_end = self.noise.sizes(length)
        if spans + open_end <= len(specials.sentinels):
            return []
        return [
            f"segments of {length} tokens under {self.noise} need up to {spans + open_end} sentinels, the tokenizer "
            f"has {len(specials.sentinels)}: add sentinels, raise mean_span_length or shorten the rows"
        ]
