"""BERT's pair creation as its code does it, with the deviations that the docstrings name."""

import dataclasses

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.batch import Lengths
from lm.objectives import NextSentence, SentenceOrder, SingleText
from lm.objectives.pairs import gather_chunk, join_pair, trim_pair
from tests.objectives.vocabulary import (
    OTHER,
    SENTENCES,
    SPECIALS,
    VOCABULARY,
    make_context,
    make_distinct,
    make_document,
)


def test_the_worked_example():
    pair = join_pair(np.array([20, 21]), np.array([30]), 1, SPECIALS)
    assert pair.tokens.tolist() == [5, 20, 21, 6, 30, 6]
    assert pair.token_types.tolist() == [0, 0, 0, 0, 1, 1]
    assert pair.label == 1


@given(st.integers(1, 30), st.integers(1, 30), st.integers(2, 40), st.integers(0, 99))
def test_trimming_keeps_stretches_of_both(a, b, limit, seed):
    first, second = trim_pair(np.arange(a), 100 + np.arange(b), limit, make_context(seed=seed).rng(0))
    assert len(first) >= 1
    assert len(second) >= 1
    assert len(first) + len(second) == min(limit, a + b)
    assert (np.diff(first) == 1).all()
    assert (np.diff(second) == 1).all()
    if a + b > limit:
        assert abs(len(first) - len(second)) <= 1 or min(len(first), len(second)) == min(a, b)


def test_chunks_reach_their_target():
    sentences = [np.zeros(n) for n in (5, 5, 5, 5)]
    rng = make_context().rng(0)
    assert [len(gather_chunk(sentences, s, 10, 0.0, rng)) for s in (0, 1, 3)] == [2, 2, 1]
    sizes = {len(gather_chunk(sentences, 0, 20, 1.0, rng)) for _ in range(50)}
    assert sizes == {1, 2, 3, 4}


def parts(sequence):
    """Returns the two texts."""
    is_text = ~np.isin(sequence.tokens, [SPECIALS.cls, SPECIALS.sep])
    return tuple(VOCABULARY.decode(sequence.tokens[is_text & (sequence.token_types == k)]) for k in (0, 1))


def sequences(texts, document, tokens=48, **kwargs):
    context = make_context(tokens=tokens, **kwargs)
    return texts.sequences(document, context, context.rng(0))


@settings(deadline=None)
@given(st.integers(5, 80), st.integers(0, 2**20), st.booleans())
def test_sequences_fit_and_are_framed(tokens, index, order):
    texts = SentenceOrder() if order else NextSentence()
    for s in sequences(texts, make_document(SENTENCES), tokens=tokens, index=index):
        assert 5 <= len(s.tokens) <= tokens
        assert s.tokens[0] == SPECIALS.cls
        assert s.tokens[-1] == SPECIALS.sep
        assert np.isin(s.tokens, [SPECIALS.sep]).sum() == 2
        assert np.flatnonzero(s.tokens == SPECIALS.sep)[0] == (s.token_types == 0).sum() - 1


def test_labels_say_what_follows_what():
    pool = OTHER + make_distinct(300, 300).text
    labels = []
    for index in range(300):
        for s in sequences(NextSentence(), make_document(SENTENCES), index=index):
            first, second = parts(s)
            assert first in SENTENCES
            if s.label == 0:
                assert second in SENTENCES
                assert SENTENCES.index(first) < SENTENCES.rindex(second)
            else:
                assert second in pool
                assert second not in SENTENCES
            labels.append(s.label)
    assert 0.5 < np.mean(labels) < 0.75  # More than half: single sentences are always paired at random.


def test_sentences_that_a_random_text_displaced_are_used_again():
    texts = NextSentence(short_rate=0.0, random_rate=1.0)
    for index in range(20):
        made = sequences(texts, make_document(SENTENCES), tokens=2000, index=index)
        assert "".join(parts(s)[0] for s in made) == SENTENCES


def test_swaps_are_a_coin():
    labels = []
    for index in range(300):
        for s in sequences(SentenceOrder(), make_document(SENTENCES), index=index):
            first, second = parts(s)
            if s.label:
                first, second = second, first
            assert SENTENCES.find(first) <= SENTENCES.rfind(second)
            assert first in SENTENCES
            assert second in SENTENCES
            labels.append(s.label)
    assert abs(np.mean(labels) - 0.5) < 0.04


def test_a_corpus_of_one_document_has_no_random_pairs():
    document = make_document(SENTENCES)
    context = dataclasses.replace(make_context(tokens=64), sample_document=lambda rng: document)
    made = NextSentence().sequences(document, context, context.rng(0))
    assert made
    assert {s.label for s in made} == {0}


def test_a_long_text_without_sentences_is_not_dropped():
    document = make_distinct(200)
    made = sequences(SentenceOrder(short_rate=0.0), document, tokens=33)
    kept = np.concatenate([s.tokens for s in made])
    assert np.isin(document.tokens, kept).mean() > 0.95


def test_single_texts_hold_the_document():
    made = sequences(SingleText(), make_distinct(100), tokens=32)
    assert [len(s.tokens) for s in made] == [32, 32, 32, 12]
    np.testing.assert_array_equal(np.concatenate([s.tokens[1:-1] for s in made]), make_distinct(100).tokens)
    assert all(s.token_types is None and s.label is None for s in made)


def test_bad_settings_are_named():
    assert "short_rate" in NextSentence(short_rate=2).problems(Lengths(64))[0]
    assert "random_rate" in SentenceOrder(random_rate=-1).problems(Lengths(64))[0]
    assert "at least 5" in SentenceOrder().problems(Lengths(4))[0]
    assert "at least 3" in SingleText().problems(Lengths(2))[0]
