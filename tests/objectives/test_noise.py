"""Known answers: facts of T5's preprocessing, recomputed independently (half-even rounding in float64)."""

import collections
import itertools
import math

import numpy as np
import pytest

from lm.objectives.noise import SpanNoise, SuffixNoise, TokenNoise, find_runs, place_spans, split_randomly
from tests.objectives.vocabulary import make_context

RNG = make_context().rng


def test_compositions_are_uniform():
    rng = RNG(0)
    counts = collections.Counter(tuple(split_randomly(7, 3, rng)) for _ in range(6000))
    assert set(counts) == {c for c in itertools.product(range(1, 6), repeat=3) if sum(c) == 7}
    expected = 6000 / 15
    assert sum((n - expected) ** 2 / expected for n in counts.values()) < 36.1  # chi-square, 14 degrees, p = .001


@pytest.mark.parametrize("gap", [0, 1])
def test_placements_are_uniform_and_apart(gap):
    rng = RNG(1)
    counts = collections.Counter(tuple(place_spans(np.array([2, 1]), 7, gap, rng)) for _ in range(4000))
    expected = {(a, b) for a in range(6) for b in range(7) if a + 2 + gap <= b}
    assert set(counts) == expected
    mean = 4000 / len(expected)
    assert sum((n - mean) ** 2 / mean for n in counts.values()) < 37.7  # at most 15 classes


def test_spans_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        place_spans(np.array([3, 3]), 6, 1, RNG(0))


def test_marginals_of_ten_tokens_three_noisy_in_two_spans():
    # C(2,1) C(6,1) = 12 masks; per-position counts of their enumeration.
    noise = SpanNoise(noise_density=0.3, mean_span_length=1.5)
    assert noise.sizes(10) == (3, 7, 2, False)
    rng = RNG(0)
    masks = np.array([noise.sample(10, rng) for _ in range(12000)])
    assert len(np.unique(masks, axis=0)) == 12
    np.testing.assert_allclose(masks.mean(axis=0) * 12, [0, 2, 3, 3, 3, 3, 3, 1, 6, 12], atol=0.2)


def test_t5_mask_of_32_tokens():
    # T5's own test: density .25 and mean 2 give 8 noisy tokens in 4 spans, noise last.
    noise = SpanNoise(noise_density=0.25, mean_span_length=2.0)
    for seed in range(50):
        mask = noise.sample(32, make_context(seed=seed).rng(0))
        assert mask.sum() == 8
        assert len(find_runs(mask)) == 4
        assert not mask[0]
        assert mask[-1]


def test_edge_marginals_of_a_full_t5_segment():
    rng = RNG(0)
    noise = SpanNoise()
    masks = np.array([noise.sample(568, rng) for _ in range(4000)])
    assert masks[:, 0].sum() == 0
    assert masks[:, -1].all()
    for place, probability in ((1, 27 / 482), (566, 1 - 27 / 84)):
        error = math.sqrt(probability * (1 - probability) / 4000)
        assert abs(masks[:, place].mean() - probability) < 4 * error


@pytest.mark.parametrize(
    "noise",
    [SpanNoise(noise_density=r, mean_span_length=m, free_edges=f)
     for r, m, f in itertools.product((0.01, 0.15, 0.5, 0.9), (1.0, 3.0, 64.0), (False, True))]
    + [TokenNoise(noise_density=r) for r in (0.01, 0.15, 0.5, 0.9)]
    + [SuffixNoise(noise_density=r) for r in (0.01, 0.25, 0.5, 0.75)],
    ids=str,
)  # fmt: skip
def test_what_is_drawn_never_exceeds_what_is_planned(noise):
    rng = RNG(0)
    for length in [*range(40), 190, 350, 390, 670, 1310]:
        sizes = noise.sizes(length)
        mask = noise.sample(length, rng)
        assert len(mask) == length
        if length < 2:
            assert not mask.any()
            assert sizes.spans == 0
            continue
        assert 1 <= mask.sum() <= sizes.noise < length
        assert 1 <= (~mask).sum() <= sizes.kept
        assert 1 <= len(find_runs(mask)) <= sizes.spans
        assert mask[-1] or sizes.open_end
        if isinstance(noise, SpanNoise):
            assert mask.sum() == sizes.noise
            assert len(find_runs(mask)) == sizes.spans


@pytest.mark.parametrize("density", [0.15, 0.5])
@pytest.mark.parametrize("mean", [3.0, 8.0, 64.0])
def test_planned_sizes_are_drawn_sizes_for_every_length(density, mean):
    noise = SpanNoise(noise_density=density, mean_span_length=mean)
    rng = RNG(0)
    before = 0
    for length in range(2, 4097):
        sizes = noise.sizes(length)
        source = sizes.kept + sizes.spans
        assert length < 4 or 0 <= source - before <= 1, "the source's length grows by 0 or 1"
        before = source
        mask = noise.sample(length, rng)
        assert (mask.sum(), len(find_runs(mask))) == (sizes.noise, sizes.spans)


def test_rounding_is_half_even_in_float64():
    # 30 * .15 = 4.5 -> 4; in float32 the lengths 190, 350, 390 round otherwise.
    assert SpanNoise().sizes(30).noise == 4
    for length in (190, 350, 390, 670, 710, 750, 790, 830, 1310):
        assert SpanNoise().sizes(length).noise == round(length * 0.15)
        assert SpanNoise().sizes(length).noise != int(np.round(np.float32(length) * np.float32(0.15)))


def test_prefix_lengths_are_uniform_on_t5_ranges():
    assert SuffixNoise(noise_density=0.25).prefix_range(100) == (50, 99)
    assert SuffixNoise(noise_density=0.5).prefix_range(100) == (1, 99)
    assert SuffixNoise(noise_density=0.5).prefix_range(10) == (1, 9)
    assert SuffixNoise(noise_density=0.25).prefix_range(10) == (4, 9)
    assert SuffixNoise(noise_density=0.75).prefix_range(101) == (1, 50)
    rng = RNG(0)
    counts = collections.Counter(int((~SuffixNoise(noise_density=0.25).sample(10, rng)).sum()) for _ in range(6000))
    assert set(counts) == set(range(4, 10))
    assert max(abs(n - 1000) for n in counts.values()) < 120


def test_tokens_are_chosen_uniformly():
    rng = RNG(0)
    masks = np.array([TokenNoise(noise_density=0.3).sample(10, rng) for _ in range(4000)])
    assert (masks.sum(axis=1) == 3).all()
    np.testing.assert_allclose(masks.mean(axis=0), 0.3, atol=0.03)


def test_impossible_settings_are_named():
    assert "noise_density" in SpanNoise(noise_density=0.0).problems()[0]
    assert "mean_span_length" in SpanNoise(mean_span_length=0.5).problems()[0]
    assert "noise_density" in TokenNoise(noise_density=1.0).problems()[0]
    assert "noise_density" in SuffixNoise(noise_density=-1).problems()[0]
