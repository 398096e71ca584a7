"""Which tokens of an encoder's sequence are predicted, and what stands in their place.

Owns the units of choice (tokens, words, n-grams) and the replacement; knows nothing of how the sequence
was put together. Law: exactly as many positions are chosen as asked for, or as few less as whole words
allow; special tokens never are.
"""

import dataclasses

import numpy as np

from lm.objectives.base import Vocabulary, special


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens:
    """Chooses single tokens, uniformly and without repetition."""

    def choose(
        self, is_candidate: np.ndarray, starts_word: np.ndarray, count: int, rng: np.random.Generator
    ) -> np.ndarray:
        """Returns bool[T] with `count` true, or all candidates if there are fewer."""
        del starts_word
        places = np.flatnonzero(is_candidate)
        chosen = np.zeros(len(is_candidate), bool)
        chosen[rng.permutation(places)[:count]] = True
        return chosen

    def problems(self) -> list[str]:
        """Returns nothing: there is nothing to set."""
        return []


@dataclasses.dataclass(frozen=True, kw_only=True)
class NGrams:
    """Chooses runs of one to `longest` words, the probability of n being proportional to 1 / n (ALBERT, section 3.2).

    With `longest` 1 this is BERT's whole-word masking. A run that would exceed the count is shortened
    by words, and skipped if its first word alone is too long; so is one whose words were chosen before.

    Attributes:
      longest: words in the longest run; 1 for whole words, 3 in ALBERT.
    """

    longest: int = 1

    @property
    def probabilities(self) -> np.ndarray:
        """f64[longest], the probability of each n from 1: 6/11, 3/11, 2/11 for 3."""
        odds = 1 / np.arange(1, self.longest + 1)
        return odds / odds.sum()

    def choose(
        self, is_candidate: np.ndarray, starts_word: np.ndarray, count: int, rng: np.random.Generator
    ) -> np.ndarray:
        """Returns bool[T] with at most `count` true, words whole."""
        # A special token bounds a word on both sides.
        begins = is_candidate & (starts_word | ~np.concatenate([[False], is_candidate[:-1]]))
        ends_at = np.append(np.flatnonzero(begins | ~is_candidate), len(is_candidate))
        starts = np.flatnonzero(begins)
        ends = ends_at[np.searchsorted(ends_at, starts, side="right")]
        chosen = np.zeros(len(is_candidate), bool)
        wanted = rng.choice(self.longest, size=len(starts), p=self.probabilities) + 1
        for word, size in zip(rng.permutation(len(starts)), wanted, strict=True):
            left = count - int(chosen.sum())
            if left == 0:
                break
            while size > 0:
                last = min(word + size, len(starts)) - 1
                run = slice(starts[word], ends[last])
                if run.stop - run.start <= left and is_candidate[run].all() and not chosen[run].any():
                    chosen[run] = True
                    break
                size -= 1
        return chosen

    def problems(self) -> list[str]:
        """Returns what cannot work in these settings."""
        return [] if self.longest >= 1 else [f"unit: longest must be at least 1 word; it is {self.longest}"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replacement:
    """What stands in place of a chosen token; each token draws for itself.

    Attributes:
      mask_rate: share that becomes the mask token.
      random_rate: share that becomes a random token; the rest stays as it is.
      random_specials: whether a random token may be a special one: BERT draws from the whole vocabulary.
    """

    mask_rate: float = 0.8
    random_rate: float = 0.1
    random_specials: bool = False

    def apply(
        self, tokens: np.ndarray, chosen: np.ndarray, vocabulary: Vocabulary, rng: np.random.Generator
    ) -> np.ndarray:
        """Returns i32[T], the tokens with the chosen ones replaced."""
        pool = np.arange(vocabulary.size) if self.random_specials else np.flatnonzero(vocabulary.token_bytes > 0)
        draw = rng.random(len(tokens))
        noise = rng.choice(pool, len(tokens))
        shown = np.where(draw < self.mask_rate, special(vocabulary.specials, "mask"), tokens)
        shown = np.where((draw >= self.mask_rate) & (draw < self.mask_rate + self.random_rate), noise, shown)
        return np.where(chosen, shown, tokens).astype(np.int32)

    def problems(self) -> list[str]:
        """Returns what cannot work in these settings."""
        if min(self.mask_rate, self.random_rate) >= 0 and self.mask_rate + self.random_rate <= 1:
            return []
        return ["replacement: mask_rate and random_rate are shares that sum to at most 1"]
