"""Known answers: BERT's and RoBERTa's replacement shares, ALBERT's n-gram odds, whole words."""

import numpy as np
import pytest

from lm.objectives.masking import NGrams, Replacement, Tokens
from tests.objectives.vocabulary import SPECIALS, VOCABULARY, make_context

# Critical value of chi-square with 2 degrees of freedom at p = .001.
CRITICAL = 13.8


@pytest.mark.parametrize("random_specials", [False, True])
def test_eighty_ten_ten(random_specials):
    tokens = np.full(20000, VOCABULARY.size - 1)
    chosen = np.arange(20000) % 2 == 0
    rng = make_context().rng(0)
    shown = Replacement(random_specials=random_specials).apply(tokens, chosen, VOCABULARY, rng)
    np.testing.assert_array_equal(shown[~chosen], tokens[~chosen])
    masked, kept = (shown[chosen] == SPECIALS.mask).sum(), (shown[chosen] == tokens[0]).sum()
    counts = np.array([masked, kept, 10000 - masked - kept])
    # A random token can be the mask or the original by chance; neither matters at this size.
    expected = np.array([8000, 1000, 1000])
    assert ((counts - expected) ** 2 / expected).sum() < CRITICAL
    randoms = shown[chosen & (shown != SPECIALS.mask) & (shown != tokens[0])]
    assert (VOCABULARY.token_bytes[randoms] == 0).any() == random_specials


def test_ngram_odds():
    np.testing.assert_allclose(NGrams(longest=3).probabilities, [6 / 11, 3 / 11, 2 / 11])
    assert NGrams(longest=1).probabilities.tolist() == [1]


WORDS = np.array([0, 1, 0, 0, 1, 0, 1, 1, 0, 0, 0, 1, 0], bool)
CANDIDATES = np.array([0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0], bool)


def words_of(mask):
    """Returns the words [1:4], [4:6], [6:7], [7:11], [11:12] that the mask holds, each whole or not at all."""
    bounds = [(1, 4), (4, 6), (6, 7), (7, 11), (11, 12)]
    assert not mask[[0, 12]].any()
    parts = [mask[a:b] for a, b in bounds]
    assert all(part.all() or not part.any() for part in parts)
    return tuple(bool(part.any()) for part in parts)


@pytest.mark.parametrize("longest", [1, 3])
def test_words_are_hidden_whole(longest):
    rng = make_context().rng(0)
    seen = set()
    for count in range(1, 12):
        for _ in range(60):
            mask = NGrams(longest=longest).choose(CANDIDATES, WORDS, count, rng)
            assert 1 <= mask.sum() <= count
            seen.add(words_of(mask))
    assert len(seen) > 15


def test_a_word_after_a_special_token_begins_one():
    starts = np.zeros(4, bool)
    mask = NGrams().choose(np.array([False, True, True, False]), starts, 2, make_context().rng(0))
    assert mask.tolist() == [False, True, True, False]


def test_a_word_that_is_too_long_is_skipped():
    mask = NGrams().choose(np.ones(4, bool), np.zeros(4, bool), 3, make_context().rng(0))
    assert not mask.any()


def test_tokens_are_exactly_as_many_as_asked():
    rng = make_context().rng(0)
    for count in range(1, 15):
        mask = Tokens().choose(CANDIDATES, WORDS, count, rng)
        assert mask.sum() == min(count, 11)
        assert not (mask & ~CANDIDATES).any()


def test_bad_settings_are_named():
    assert "longest" in NGrams(longest=0).problems()[0]
    assert "mask_rate" in Replacement(mask_rate=0.9, random_rate=0.2).problems()[0]
    assert Replacement().problems() == Tokens().problems() == []
