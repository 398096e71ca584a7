"""Which tokens of a segment are corrupted: T5's three noise masks, their sizes, and the geometry of spans.

Knows only lengths and random generators: no token, no objective. Law: the sizes that a planner asks
for and the masks that are drawn come from one function, so a planned length is never exceeded.
Rounding is to the nearest even number in float64 everywhere (Python's `round`).
"""

import dataclasses
from typing import NamedTuple

import numpy as np


class NoiseSize(NamedTuple):
    """The most that a mask over a segment can hold.

    Attributes:
      noise: corrupted tokens, at most.
      kept: uncorrupted tokens, at most.
      spans: runs of corrupted tokens, at most.
      open_end: whether the mask may end with an uncorrupted token.
    """

    noise: int
    kept: int
    spans: int
    open_end: bool


def split_randomly(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """Returns i64[parts], positive numbers that sum to `total`, each such composition equally likely."""
    cuts = np.sort(rng.choice(total - 1, size=parts - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=total)


def place_spans(lengths: np.ndarray, total: int, gap: int, rng: np.random.Generator) -> np.ndarray:
    """Returns i64[spans], the starts of spans of these lengths, in this order, among `total` places.

    At least `gap` (0 or 1) free places lie between two spans; each such placement is equally likely.

    Raises:
      ValueError: if the spans do not fit.
    """
    free = total - int(lengths.sum())
    if free < gap * (len(lengths) - 1):
        raise ValueError(f"{len(lengths)} spans of {lengths.sum()} tokens do not fit into {total} with gaps of {gap}")
    pads = np.full(len(lengths) + 1, 1 - gap)
    pads[[0, -1]] = 1
    gaps = split_randomly(free + int(pads.sum()), len(pads), rng) - pads
    return np.cumsum(gaps[:-1]) + np.cumsum(lengths) - lengths


def cover_spans(starts: np.ndarray, lengths: np.ndarray, total: int) -> np.ndarray:
    """Returns bool[total], true in the disjoint spans."""
    begins = np.bincount(starts, minlength=total + 1)
    ends = np.bincount(starts + lengths, minlength=total + 1)
    return np.cumsum(begins - ends)[:total] > 0


def find_runs(mask: np.ndarray) -> np.ndarray:
    """Returns i64[runs, 2], the start and the end of each run of True in `mask`, in order."""
    edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0))
    return edges.reshape(-1, 2)


def _density_problems(noise_density: float) -> list[str]:
    if 0 < noise_density < 1:
        return []
    return [f"noise_density must lie between 0 and 1, exclusive; it is {noise_density}"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpanNoise:
    """Corrupts a fixed number of tokens in a fixed number of runs (T5, section 3.3.4, `random_spans_noise_mask`).

    A segment of L tokens has n = round(L * noise_density) corrupted ones in round(n / mean_span_length)
    runs, both at least 1. Their lengths, and those of the runs between, are uniform compositions.

    Attributes:
      noise_density: share of the tokens that is corrupted.
      mean_span_length: mean length of a corrupted run, in tokens.
      free_edges: whether a run may lie anywhere. As in T5, false: a segment begins with an uncorrupted token and ends
        with a corrupted one, so that its first token is never predicted and its last always is.
    """

    noise_density: float = 0.15
    mean_span_length: float = 3.0
    free_edges: bool = False

    def sizes(self, length: int) -> NoiseSize:
        """Returns the exact numbers for a segment of `length` tokens; nothing is corrupted below 2 tokens."""
        if length < 2:
            return NoiseSize(0, length, 0, True)
        noise = min(max(round(length * self.noise_density), 1), length - 1)
        most = min(noise, length - noise + self.free_edges)
        return NoiseSize(
            noise, length - noise, min(max(round(noise / self.mean_span_length), 1), most), self.free_edges
        )

    def sample(self, length: int, rng: np.random.Generator) -> np.ndarray:
        """Returns bool[length], true where corrupted."""
        noise, kept, spans, _ = self.sizes(length)
        if spans == 0:
            return np.zeros(length, bool)
        lengths = split_randomly(noise, spans, rng)
        if self.free_edges:
            starts = place_spans(lengths, length, 1, rng)
        else:
            starts = np.cumsum(split_randomly(kept, spans, rng)) + np.cumsum(lengths) - lengths
        return cover_spans(starts, lengths, length)

    def problems(self) -> list[str]:
        """Returns what cannot work in these settings."""
        problems = _density_problems(self.noise_density)
        if self.mean_span_length < 1:
            problems.append(f"mean_span_length must be at least 1 token; it is {self.mean_span_length}")
        return problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenNoise:
    """Corrupts single tokens, chosen uniformly (T5's baseline, "i.i.d. denoising", section 3.1.4).

    The number of corrupted tokens is round(L * noise_density), at least 1, where T5 draws each token
    by a coin of that probability: same mean, but the lengths can be planned.

    Attributes:
      noise_density: share of the tokens that is corrupted.
    """

    noise_density: float = 0.15

    def sizes(self, length: int) -> NoiseSize:
        """Returns the most that a segment of `length` tokens can hold; nothing is corrupted below 2 tokens."""
        if length < 2:
            return NoiseSize(0, length, 0, True)
        noise = min(max(round(length * self.noise_density), 1), length - 1)
        return NoiseSize(noise, length - noise, min(noise, length - noise + 1), True)

    def sample(self, length: int, rng: np.random.Generator) -> np.ndarray:
        """Returns bool[length], true where corrupted."""
        mask = np.zeros(length, bool)
        mask[rng.choice(length, size=self.sizes(length).noise, replace=False)] = True
        return mask

    def problems(self) -> list[str]:
        """Returns what cannot work in these settings."""
        return _density_problems(self.noise_density)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SuffixNoise:
    """Corrupts one run at the end of the segment, of random length (T5's `random_prefix_noise_mask`).

    Up to a density r of 0.5 the prefix length is uniform on [max(1, round((1 - 2r)(L - 1))), L - 1]; above, which
    T5 does not define, on [1, max(1, round(2(1 - r)(L - 1)))]. The mean share of the suffix is about r.

    Attributes:
      noise_density: mean share of the tokens that is corrupted.
    """

    noise_density: float = 0.5

    def prefix_range(self, length: int) -> tuple[int, int]:
        """Returns the shortest and the longest prefix of a segment of `length` >= 2 tokens."""
        if self.noise_density <= 0.5:
            return max(1, round((1 - 2 * self.noise_density) * (length - 1))), length - 1
        return 1, max(1, round(2 * (1 - self.noise_density) * (length - 1)))

    def sizes(self, length: int) -> NoiseSize:
        """Returns the most that a segment of `length` tokens can hold; nothing is corrupted below 2 tokens."""
        if length < 2:
            return NoiseSize(0, length, 0, True)
        shortest, longest = self.prefix_range(length)
        return NoiseSize(length - shortest, longest, 1, False)

    def sample(self, length: int, rng: np.random.Generator) -> np.ndarray:
        """Returns bool[length], true where corrupted."""
        if length < 2:
            return np.zeros(length, bool)
        shortest, longest = self.prefix_range(length)
        return np.arange(length) >= int(rng.integers(shortest, longest + 1))

    def problems(self) -> list[str]:
        """Returns what cannot work in these settings."""
        return _density_problems(self.noise_density)


Noise = SpanNoise | TokenNoise | SuffixNoise
