import collections

import numpy as np

from lm.batch import SpecialTokens
from lm.objectives import PrefixLM, SuffixNoise, TextToText
from tests.objectives.vocabulary import Characters, make_context, make_distinct

SEQIO = Characters(specials=SpecialTokens(pad=0, bos=0, eos=1))


class Fixed:
    """A generator that always draws the same prefix."""

    def __init__(self, value):
        self.value = value

    def integers(self, low, high):
        assert low <= self.value < high
        return self.value


def test_the_worked_example():
    form = TextToText(source_eos=False)
    source, target = PrefixLM(format=form).corrupt(np.arange(10, 15), SEQIO, Fixed(2))
    example = form.join(source, target, SEQIO.specials, make_context().lengths)
    assert example.inputs.tolist() == [0, 10, 11, 12, 13, 14]
    assert example.targets.tolist() == [10, 11, 12, 13, 14, 1]
    assert example.bidirectional.astype(int).tolist() == [1, 1, 1, 0, 0, 0]
    assert example.weights.tolist() == [0, 0, 1, 1, 1, 1]


def test_about_the_density_is_predicted():
    shares = collections.defaultdict(list)
    for density in (0.25, 0.5, 0.75):
        for index in range(600):
            context = make_context(128, 128, index=index)
            (example,) = PrefixLM(noise=SuffixNoise(noise_density=density)).examples(make_distinct(100), context)
            shares[density].append((len(example.targets) - 1) / 100)
        assert abs(np.mean(shares[density]) - density) < 0.03


def test_every_segment_of_a_long_document_has_both_parts():
    examples = PrefixLM().examples(make_distinct(129), make_context(tokens=66))
    assert len(examples) == 3
    assert all(e.weights.sum() >= 2 and (e.weights == 0).sum() >= 2 for e in examples)
