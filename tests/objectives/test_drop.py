import numpy as np

from lm.objectives import DropTokens, SpanNoise, TokenNoise
from tests.objectives.vocabulary import VOCABULARY, make_context, make_distinct


def test_the_worked_example():
    class Chosen(TokenNoise):
        def sample(self, length, rng):
            return np.isin(np.arange(length), [1, 4])

    source, target = DropTokens(noise=Chosen()).corrupt(np.arange(10, 15), VOCABULARY, make_context().rng(0))
    assert source.tolist() == [10, 12, 13]
    assert target.tolist() == [11, 14]


def test_sizes_are_exact():
    (example,) = DropTokens(noise=SpanNoise()).examples(make_distinct(100), make_context(128, 128))
    assert (len(example.encoder_inputs), len(example.targets)) == (86, 16)
