import numpy as np

from lm.objectives import MaskedToText, SpanNoise, TokenNoise
from tests.objectives.vocabulary import SPECIALS, TEXT_START, VOCABULARY, make_context, make_distinct


def test_the_source_differs_only_where_noise_is():
    tokens = make_distinct(200).tokens
    masks = randoms = 0
    for index in range(60):
        source, target = MaskedToText().corrupt(tokens, VOCABULARY, make_context(index=index).rng(0))
        np.testing.assert_array_equal(target, tokens)
        changed = source != tokens
        assert changed.sum() <= 30
        masks += (source == SPECIALS.mask).sum()
        randoms += (changed & (source >= TEXT_START)).sum()
    assert abs(randoms / (masks + randoms) - 0.1) < 0.03


def test_mass_style_only_masks():
    tokens = make_distinct(100).tokens
    source, _ = MaskedToText(random_rate=0.0).corrupt(tokens, VOCABULARY, make_context().rng(0))
    assert (source == SPECIALS.mask).sum() == 15
    assert ((source == tokens) | (source == SPECIALS.mask)).all()


def test_the_worked_example():
    class Chosen(TokenNoise):
        def sample(self, length, rng):
            return np.isin(np.arange(length), [1, 4])

    objective = MaskedToText(noise=Chosen(), random_rate=0.0)
    source, target = objective.corrupt(np.arange(10, 15), VOCABULARY, make_context().rng(0))
    assert source.tolist() == [10, 4, 12, 13, 4]
    assert target.tolist() == [10, 11, 12, 13, 14]


def test_bad_settings_are_named():
    lengths = make_context().lengths
    assert "random_rate" in MaskedToText(random_rate=2.0).problems(SPECIALS, lengths)[0]
    assert "noise_density" in MaskedToText(noise=SpanNoise(noise_density=0)).problems(SPECIALS, lengths)[0]
