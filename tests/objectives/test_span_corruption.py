"""Known answers: T5's preprocessing, re-derived (sentinels from the top of the vocabulary downwards)."""

import numpy as np
import pytest

from lm.batch import Lengths, SpecialTokens
from lm.objectives import SpanCorruption, SpanNoise, TokenNoise
from lm.objectives.span_corruption import replace_spans
from tests.objectives.vocabulary import SPECIALS, make_context, make_distinct

T5_SENTINELS = tuple(range(32099, 31999, -1))


def corrupt(tokens, places, sentinels=T5_SENTINELS):
    tokens = np.array(tokens)
    mask = np.isin(np.arange(len(tokens)), places)
    source, target = replace_spans(tokens, mask, sentinels)
    return source.tolist(), target.tolist()


def test_the_worked_example():
    assert corrupt(range(10, 20), [2, 3, 8, 9], (99, 98)) == (
        [10, 11, 99, 14, 15, 16, 17, 98],
        [99, 12, 13, 98, 18, 19],
    )


def test_t5_sentinels():
    source, target = corrupt(range(10, 20), [2, 3, 8, 9])
    assert source == [10, 11, 32099, 14, 15, 16, 17, 32098]
    assert target == [32099, 12, 13, 32098, 18, 19]
    # A mask that ends with text has a closing sentinel, as in the paper's figure 2.
    assert corrupt(range(10, 20), [2, 3, 7])[1] == [32099, 12, 13, 32098, 17, 32097]
    # One that begins with noise has its leading sentinel in the target too.
    source, target = corrupt(range(10, 16), [0, 1, 4], tuple(range(999, 900, -1)))
    assert source == [999, 12, 13, 998, 15]
    assert target == [999, 10, 11, 998, 14, 997]


def test_full_rows_are_filled_exactly():
    specials = SPECIALS
    assert SpanCorruption().problems(specials, Lengths(114, 512)) == []
    first, rest = SpanCorruption().examples(make_distinct(700, offset=150), make_context(114, 512))
    assert (len(first.encoder_inputs), len(first.targets)) == (512, 114)
    assert np.isin(first.encoder_inputs, specials.sentinels).sum() == 28
    assert len(rest.encoder_inputs) < 512


def test_a_tail_of_one_token_joins_the_segment_before():
    examples = SpanCorruption().examples(make_distinct(569, offset=150), make_context(114, 512))
    assert len(examples) == 2
    assert SpanCorruption().examples(make_distinct(1), make_context(114, 512)) == []


@pytest.mark.parametrize(
    ("encoder", "density", "mean", "needed"),
    [(512, 0.5, 3, 128), (1024, 0.5, 3, 256), (1024, 0.5, 8, 114), (2048, 0.15, 3, 114), (2048, 0.5, 3, 512)],
)
def test_more_spans_than_sentinels_are_refused(encoder, density, mean, needed):
    noise = SpanNoise(noise_density=density, mean_span_length=mean)
    specials = SpecialTokens(pad=0, bos=1, eos=2, sentinels=T5_SENTINELS)
    problems = SpanCorruption(noise=noise).problems(specials, Lengths(encoder, encoder))
    assert len(problems) == 1
    assert f"up to {needed} sentinels" in problems[0]
    assert "100" in problems[0]
    enough = SpecialTokens(pad=0, bos=1, eos=2, sentinels=tuple(range(10000, 10000 + needed)))
    assert SpanCorruption(noise=noise).problems(enough, Lengths(encoder, encoder)) == []


def test_sentinels_never_run_into_the_vocabulary():
    with pytest.raises(ValueError, match="3 spans need as many sentinels; the tokenizer has 2"):
        corrupt(range(10, 16), [1, 3, 5], (99, 98))


def test_iid_noise_merges_neighbours():
    for index in range(30):
        context = make_context(64, 64, index=index)
        (example,) = SpanCorruption(noise=TokenNoise(noise_density=0.5)).examples(make_distinct(40), context)
        source = example.encoder_inputs
        is_sentinel = np.isin(source, SPECIALS.sentinels)
        assert not (is_sentinel[1:] & is_sentinel[:-1]).any()
        assert source[is_sentinel].tolist() == list(SPECIALS.sentinels[: is_sentinel.sum()])
