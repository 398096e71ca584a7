"""Known answers: ELECTRA's cap of predictions (19 of 128, 79 of 512) and 85 / 15 replacement."""

import numpy as np
import pytest

from lm.objectives import ReplacedTokenDetection
from tests.objectives.vocabulary import SPECIALS, make_context, make_distinct


def test_the_worked_example():
    for index in range(100):
        context = make_context(index=index)
        (example,) = ReplacedTokenDetection(keep_rate=0.0).examples(make_distinct(4, 0), context)
        a, b, c, d = make_distinct(4, 0).tokens
        assert example.targets.tolist() == [5, a, b, c, d, 6]
        if example.weights[3]:
            assert example.inputs.tolist() == [5, a, b, 4, d, 6]
            assert example.weights.tolist() == [0, 0, 0, 1, 0, 0]
            return
    raise AssertionError("the third token was never chosen")


@pytest.mark.parametrize(
    ("length", "longest", "count"), [(128, 128, 19), (512, 512, 77), (3, 128, 1), (128, 64, 9), (30, 128, 4)]
)
def test_counts(length, longest, count):
    assert ReplacedTokenDetection().count(length, longest) == count


def test_caps():
    assert int(0.155 * 128) == 19
    assert int(0.155 * 512) == 79
    assert ReplacedTokenDetection(rate=0.25).count(512, 512) == 128


def test_positions_are_distinct_and_mostly_masked():
    masked = chosen = 0
    for index in range(100):
        (example,) = ReplacedTokenDetection().examples(make_distinct(126), make_context(128, index=index))
        assert example.weights.sum() == 19
        masked += (example.inputs == SPECIALS.mask).sum()
        chosen += 19
        differs = example.inputs != example.targets
        assert (example.weights[differs] == 1).all()
        assert (example.inputs[differs] == SPECIALS.mask).all()
    assert abs(masked / chosen - 0.85) < 0.03


def test_a_model_with_a_generator_is_asked_for():
    traits = ReplacedTokenDetection().traits
    assert traits.needs_generator
    assert traits.originals
    assert traits.layouts == {"encoder"}


def test_bad_settings_are_named():
    lengths = make_context().lengths
    assert "keep_rate" in ReplacedTokenDetection(keep_rate=1.0).problems(SPECIALS, lengths)[0]
    assert "rate" in ReplacedTokenDetection(rate=0.0).problems(SPECIALS, lengths)[0]
    assert np.isclose(ReplacedTokenDetection().rate, 0.15)
