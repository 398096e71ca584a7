"""Known answers: fairseq's length table and trimming, recomputed; the paper's section 2.2."""

import collections
import math
import re

import numpy as np
import pytest

from lm.batch import Lengths
from lm.objectives import BART
from lm.objectives.bart import count_noise, trim_lengths
from lm.objectives.sentences import split_sentences
from tests.objectives.vocabulary import (
    SENTENCES,
    SPECIALS,
    VOCABULARY,
    make_context,
    make_distinct,
    make_document,
)

QUIET = BART(permute_rate=0.0, random_rate=0.0)


@pytest.mark.parametrize(
    ("lengths", "budget", "kept", "zeros"),
    [([2, 3, 5], 3, [2, 1], 0), ([0, 4, 1], 3, [3], 1), ([3, 9], 3, [3], 0), ([1, 0, 0, 5, 0], 2, [1, 1], 2)],
)
def test_lengths_are_trimmed_to_the_budget(lengths, budget, kept, zeros):
    trimmed, num_zeros = trim_lengths(np.array(lengths), budget)
    assert trimmed.tolist() == kept
    assert num_zeros == zeros


def test_lengths_that_are_too_few_are_refused():
    with pytest.raises(ValueError, match="budget"):
        trim_lengths(np.array([1, 1]), 3)


def test_counts_have_no_binary_surprises():
    assert count_noise(0.3, 10) == 3
    assert count_noise(0.07, 100) == 7  # 0.07 * 100 = 7.000000000000001
    assert count_noise(0.3, 11) == 4
    assert count_noise(0.0, 11) == 0
    assert all(count_noise(0.15, 100 * k) == 15 * k for k in range(1, 200))


def test_zero_lengths_have_their_poisson_share():
    assert math.isclose(math.exp(-3), 0.0498, abs_tol=1e-4)
    for mean in (3.0, 3.5):
        rng = make_context().rng(0)
        zeros = positives = 0
        for _ in range(300):
            kept, inserted = BART(mean_span_length=mean).draw_lengths(100, rng)
            assert kept.sum() == 100
            zeros, positives = zeros + inserted, positives + len(kept)
        assert abs(zeros / (zeros + positives) - math.exp(-mean)) < 0.006


def test_the_worked_example():
    class Drawn(BART):
        def draw_lengths(self, budget, rng):
            return np.array([2, 1]), 1

    tokens = VOCABULARY.encode("abcdefghij")
    objective = Drawn(random_rate=0.0, whole_words=False)
    sources = {
        VOCABULARY.decode(objective.infill(tokens, VOCABULARY, make_context(index=index).rng(0)))
        for index in range(2000)
    }
    assert "ab<4><4>efg<4>ij" in sources
    assert {len(source.replace("<4>", "M")) for source in sources} == {10}


def matches(source, text):
    """Tells whether `text` is the source with each mask replaced by some tokens, or by none."""
    pattern = "".join(".*" if t == SPECIALS.mask else re.escape(chr(t)) for t in source)
    return re.fullmatch(pattern, "".join(map(chr, text)), re.DOTALL) is not None


@pytest.mark.parametrize("index", range(40))
def test_filling_the_masks_in_gives_the_text(index):
    tokens = make_document(SENTENCES).tokens
    source = QUIET.infill(tokens, VOCABULARY, make_context(index=index).rng(0))
    assert SPECIALS.mask in source
    assert len(source) <= len(tokens)
    assert matches(source.tolist(), tokens.tolist())


def test_exactly_the_share_of_words_vanishes():
    tokens = make_document(SENTENCES).tokens
    num_words = 1 + VOCABULARY.starts_word[tokens[1:]].sum()
    for index in range(40):
        source = BART(random_rate=0.0, replace="delete").infill(tokens, VOCABULARY, make_context(index=index).rng(0))
        words = VOCABULARY.starts_word[source].sum() + (not VOCABULARY.starts_word[source[0]])
        assert num_words - words in (count_noise(0.3, num_words), count_noise(0.3, num_words) - 1)  # First word glued.
        by_token = BART(random_rate=0.0, replace="token").infill(tokens, VOCABULARY, make_context(index=index).rng(0))
        assert len(by_token) == len(tokens)
        assert (by_token != tokens).sum() == len(tokens) - len(source)


def test_token_masking_and_deletion():
    tokens = make_distinct(100).tokens
    rng = make_context().rng(0)
    masking = BART(mean_span_length=None, whole_words=False, replace="token", random_rate=0.0)
    masked = masking.infill(tokens, VOCABULARY, rng)
    assert (masked == SPECIALS.mask).sum() == 30
    deleted = BART(mean_span_length=None, whole_words=False, replace="delete").infill(tokens, VOCABULARY, rng)
    assert len(deleted) == 70
    assert np.isin(deleted, tokens).all()
    assert (np.diff(deleted) > 0).all()


def test_sentences_are_permuted():
    document = make_document(SENTENCES)
    whole = BART(mask_rate=0.0)
    sentences = {tuple(s) for s in split_sentences(document.tokens, VOCABULARY)}
    orders = collections.Counter()
    for index in range(20):
        (example,) = whole.examples(document, make_context(256, 256, index=index))
        source = example.encoder_inputs[1:-1]
        assert sorted(source) == sorted(document.tokens)
        orders[tuple(source)] += 1
        rest = "".join(map(chr, source))
        for sentence in sentences:
            assert "".join(map(chr, sentence)) in rest
    assert len(orders) > 15


def test_rotation_wraps_round():
    objective = BART(mask_rate=0.0, permute_rate=0.0, rotate_rate=1.0)
    tokens = make_distinct(50).tokens
    starts = set()
    for index in range(30):
        (example,) = objective.examples(make_distinct(50), make_context(64, 64, index=index))
        source = example.encoder_inputs[1:-1]
        starts.add(int(source[0]))
        np.testing.assert_array_equal(np.roll(source, np.argmin(source) * -1), tokens)
    assert len(starts) > 10


def test_the_decoder_starts_with_eos_and_predicts_bos():
    # The released model: target <s> ... </s>, decoder input the same with </s> moved to the front.
    document = make_distinct(20)
    (example,) = BART().examples(document, make_context(64, 64))
    assert example.targets.tolist() == [SPECIALS.bos, *document.tokens, SPECIALS.eos]
    assert example.inputs.tolist() == [SPECIALS.eos, SPECIALS.bos, *document.tokens]
    assert example.encoder_inputs[[0, -1]].tolist() == [SPECIALS.bos, SPECIALS.eos]
    assert example.weights.all()


def test_random_tokens_stand_for_a_tenth_of_the_masks():
    rng = make_context().rng(0)
    masks = BART().draw_masks(5000, VOCABULARY, rng)
    assert abs((masks != SPECIALS.mask).mean() - 0.1) < 0.015
    assert VOCABULARY.token_bytes[masks[masks != SPECIALS.mask]].all()


def test_bad_settings_are_named():
    problems = BART(mask_rate=1.5, mean_span_length=0.0).problems(SPECIALS, Lengths(64, 64))
    assert [p.split()[0] for p in problems] == ["mask_rate", "mean_span_length"]
    assert "raise the lengths" in BART().problems(SPECIALS, Lengths(5))[0]
