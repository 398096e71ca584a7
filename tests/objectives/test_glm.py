"""Known answer: Du et al. 2022, figure 2 (x1 to x6, spans [x3] and [x5 x6], the second predicted first)."""

import numpy as np
import pytest

from lm.batch import Lengths, SpecialTokens
from lm.objectives import GLM, SentenceBlanks, ShortBlanks, SuffixBlank
from lm.objectives.glm import arrange_blanks
from lm.objectives.noise import find_runs
from tests.objectives.vocabulary import (
    SENTENCES,
    SPECIALS,
    VOCABULARY,
    make_context,
    make_distinct,
    make_document,
)


def test_the_worked_example():
    specials = SpecialTokens(pad=0, mask=90, sop=91, eop=92)
    e = arrange_blanks(np.arange(1, 7), np.array([[2, 3], [4, 6]]), np.array([1, 0]), specials)
    assert e.inputs.tolist() == [1, 2, 90, 4, 90, 91, 5, 6, 91, 3]
    assert e.targets.tolist() == [0, 0, 0, 0, 0, 5, 6, 92, 3, 92]
    assert e.weights.tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]
    # The facts count from 1: 1 2 3 4 5 5 5 5 3 3.
    assert (e.positions + 1).tolist() == [1, 2, 3, 4, 5, 5, 5, 5, 3, 3]
    assert e.block_positions.tolist() == [0, 0, 0, 0, 0, 1, 2, 3, 1, 2]
    assert e.bidirectional.tolist() == [True] * 5 + [False] * 5


def test_a_row_holds_the_text_and_two_tokens_per_blank():
    for index in range(30):
        for e in GLM().examples(make_distinct(200), make_context(index=index)):
            blanks = (e.inputs == SPECIALS.mask).sum()
            text = (~np.isin(e.inputs, [SPECIALS.mask, SPECIALS.sop])).sum()
            assert len(e.inputs) == text + 2 * blanks <= 64
            assert e.weights.sum() == (e.inputs[~e.bidirectional] != SPECIALS.sop).sum() + blanks


def test_short_blanks_are_apart_and_reach_the_rate():
    rng = make_context().rng(0)
    for length in (2, 3, 5, 20, 100):
        for _ in range(100):
            mask = ShortBlanks().choose(np.zeros(length), VOCABULARY, rng)
            assert 1 <= mask.sum() < length
            assert mask.sum() >= 0.15 * length
    lengths = [b - a for _ in range(500) for a, b in find_runs(ShortBlanks().choose(np.zeros(400), VOCABULARY, rng))]
    assert abs(np.mean(lengths) - 3 / (1 - np.exp(-3))) < 0.15  # Poisson(3) without zeros.


def test_sentence_blanks_are_whole_sentences():
    tokens = make_document(SENTENCES).tokens
    for index in range(20):
        mask = SentenceBlanks().choose(tokens, VOCABULARY, make_context(index=index).rng(0))
        assert mask.sum() >= 0.15 * len(tokens)
        for start, end in find_runs(mask):
            assert start == 0 or SENTENCES[start - 1] in ".!?"
            assert SENTENCES[end - 1] in ".!?"


def test_suffix_blanks_are_half_to_all():
    rng = make_context().rng(0)
    shares = [SuffixBlank().choose(np.zeros(100), VOCABULARY, rng).mean() for _ in range(1000)]
    assert min(shares) == pytest.approx(0.5, abs=0.02)
    assert max(shares) == pytest.approx(1.0, abs=0.02)
    assert abs(np.mean(shares) - 0.75) < 0.02


def test_bad_settings_are_named():
    lengths = Lengths(64)
    assert "mask_rate" in GLM(blanks=ShortBlanks(mask_rate=0.0)).problems(SPECIALS, lengths)[0]
    assert "mask_rate" in GLM(blanks=SentenceBlanks(mask_rate=2.0)).problems(SPECIALS, lengths)[0]
    assert "min_rate" in GLM(blanks=SuffixBlank(min_rate=0.9, max_rate=0.5)).problems(SPECIALS, lengths)[0]
    missing = GLM().problems(SpecialTokens(pad=0, mask=4), lengths)
    assert ["sop" in missing[0], "eop" in missing[1]] == [True, True]
    assert "too short" in GLM().problems(SPECIALS, Lengths(4))[0]
