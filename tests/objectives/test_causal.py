import numpy as np
import pytest

from lm.batch import Document, Lengths, SpecialTokens
from lm.objectives import Causal
from tests.objectives.vocabulary import make_context, make_distinct


def test_the_worked_example():
    first, second = Causal().examples(Document("a", None, np.array([5, 6, 7], np.int32)), make_context(tokens=2))
    assert first.inputs.tolist() == [1, 5]
    assert first.targets.tolist() == [5, 6]
    assert second.inputs.tolist() == [6, 7]
    assert second.targets.tolist() == [7, 2]


@pytest.mark.parametrize("length", [1, 7, 8, 9, 63, 64, 65])
def test_each_token_and_eos_is_a_target_once(length):
    document = make_distinct(length)
    examples = Causal().examples(document, make_context(tokens=8))
    targets = np.concatenate([e.targets for e in examples])
    np.testing.assert_array_equal(targets, [*document.tokens, 2])
    np.testing.assert_array_equal(np.concatenate([e.inputs for e in examples]), [1, *document.tokens])
    assert all(len(e.inputs) <= 8 and (e.weights == 1).all() for e in examples)


def test_an_empty_document_gives_nothing():
    assert Causal().examples(make_distinct(0), make_context()) == []


def test_missing_special_tokens_are_named():
    problems = Causal().problems(SpecialTokens(pad=0, bos=1), Lengths(8))
    assert len(problems) == 1
    assert "'eos'" in problems[0]
