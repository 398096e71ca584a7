"""Known answer: the example of MASS's figure 1 (x3 to x6 of eight tokens)."""

import collections

import numpy as np

from lm.objectives import MASS, TextToText
from tests.objectives.vocabulary import SPECIALS, VOCABULARY, make_context, make_distinct


def test_the_worked_example():
    objective = MASS(random_rate=0.0, keep_rate=0.0, format=TextToText(source_eos=False))
    M = SPECIALS.mask
    for index in range(100):
        context = make_context(64, 64, index=index)
        example = objective.example(np.arange(1, 9), context, context.rng(0))
        if example.targets[0] == 3:
            assert example.encoder_inputs.tolist() == [1, 2, M, M, M, M, 7, 8]
            assert example.inputs.tolist() == [2, 3, 4, 5]
            assert example.targets.tolist() == [3, 4, 5, 6]
            assert example.positions.tolist() == [2, 3, 4, 5]
            return
    raise AssertionError("the fragment x3 to x6 was never drawn")


def test_a_fragment_at_the_start_begins_with_bos():
    objective = MASS(fragment_rate=1.0)
    (example,) = objective.examples(make_distinct(10), make_context(64, 64))
    assert example.inputs.tolist() == [SPECIALS.bos, *make_distinct(10).tokens[:-1]]


def test_fragments_start_where_the_paper_says():
    tokens = make_distinct(40).tokens
    starts = collections.Counter()
    shown = collections.Counter()
    rng = make_context().rng(0)
    for _ in range(3000):
        source, mask = MASS().corrupt(tokens, VOCABULARY, rng)
        starts[int(np.flatnonzero(mask)[0])] += 1
        assert mask.sum() == 20
        np.testing.assert_array_equal(source[~mask], tokens[~mask])
        shown["mask"] += (source[mask] == SPECIALS.mask).sum()
        shown["kept"] += (source[mask] == tokens[mask]).sum()
    assert abs(starts[0] / 3000 - (0.2 + 0.6 / 21)) < 0.03
    assert abs(starts[20] / 3000 - (0.2 + 0.6 / 21)) < 0.03
    assert set(starts) == set(range(21))
    assert abs(shown["mask"] / 60000 - 0.8) < 0.01
    assert abs(shown["kept"] / 60000 - 0.1) < 0.01


def test_bad_settings_are_named():
    lengths = make_context().lengths
    assert "fragment_rate" in MASS(fragment_rate=0.0).problems(SPECIALS, lengths)[0]
    assert "keep_rate" in MASS(keep_rate=0.9, random_rate=0.2).problems(SPECIALS, lengths)[0]
