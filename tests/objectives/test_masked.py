"""Known answers: numbers of predictions of BERT's code, and of RoBERTa's stochastic rounding."""

import numpy as np
import pytest

from lm.batch import Lengths
from lm.objectives import ALBERT, BERT, ROBERTA, MaskedLM, NextSentence, NGrams
from lm.objectives.masked import make_encoder_example
from lm.objectives.pairs import Sequence
from tests.objectives.vocabulary import SENTENCES, SPECIALS, make_context, make_distinct, make_document


def test_the_worked_example():
    tokens = np.array([5, 20, 21, 22, 23, 6])
    hidden = np.array([0, 0, 1, 0, 0, 0], bool)
    example = make_encoder_example(Sequence(tokens), np.where(hidden, 4, tokens), hidden)
    assert example.inputs.tolist() == [5, 20, 4, 22, 23, 6]
    assert example.targets.tolist() == tokens.tolist()
    assert example.weights.tolist() == [0, 0, 1, 0, 0, 0]
    assert example.bidirectional.all()


@pytest.mark.parametrize(("length", "count"), [(3, 1), (10, 2), (30, 4), (128, 19), (512, 77)])
def test_bert_counts_half_even_and_specials(length, count):
    objective = MaskedLM(rounding="nearest")
    assert objective.count(length, make_context().rng(0)) == count
    (example,) = objective.examples(make_distinct(length - 2), make_context(tokens=length))
    assert len(example.inputs) == length
    assert example.weights.sum() == min(count, length - 2)


def test_bert_caps_its_predictions():
    (example,) = MaskedLM(rounding="nearest", max_predictions=20).examples(make_distinct(400), make_context(512))
    assert example.weights.sum() == 20


def test_roberta_rounds_stochastically_to_the_exact_mean():
    rng = make_context().rng(0)
    counts = [ROBERTA.count(50, rng) for _ in range(4000)]  # 7.5
    assert set(counts) == {7, 8}
    assert abs(np.mean(counts) - 7.5) < 0.03


def shown(objective, epoch, index):
    (example,) = objective.examples(make_distinct(60), make_context(epoch=epoch, index=index))
    return example.inputs.tolist()


def test_static_masks_repeat_wherever_the_shuffle_puts_the_document():
    objective = MaskedLM(num_duplicates=3)
    first = [shown(objective, epoch, index=epoch * 11) for epoch in range(3)]
    assert len(set(map(tuple, first))) == 3
    assert [shown(objective, epoch, index=epoch + 5) for epoch in range(3, 6)] == first


def test_dynamic_masks_never_repeat():
    assert len({tuple(shown(ROBERTA, epoch, index)) for epoch in range(4) for index in range(4)}) == 16


def test_special_tokens_are_never_hidden():
    for index in range(50):
        for e in BERT.examples(make_document(SENTENCES), make_context(index=index)):
            hidden = e.targets[e.weights > 0]
            assert not np.isin(hidden, [SPECIALS.cls, SPECIALS.sep]).any()


def test_kept_and_random_tokens_count():
    # seqio's encoder converter gives weight only where the mask token stands.
    kept = 0
    for index in range(50):
        (example,) = ROBERTA.examples(make_distinct(60), make_context(index=index))
        kept += ((example.inputs == example.targets) & (example.weights > 0)).sum()
    assert kept > 10


def test_the_label_stands_at_cls():
    labels = set()
    for index in range(20):
        for e in BERT.examples(make_document(SENTENCES), make_context(index=index)):
            assert e.inputs[0] == SPECIALS.cls
            assert e.label_weights.tolist() == [1] + [0] * (len(e.inputs) - 1)
            labels.add(int(e.label_targets[0]))
    assert labels == {0, 1}


def test_a_text_without_a_word_short_enough_is_dropped_unless_labelled():
    # One word of 8 tokens: 15 % of 10 is 2.
    document = make_document("abcdefgh")
    assert MaskedLM(unit=NGrams()).examples(document, make_context()) == []
    labelled = MaskedLM(unit=NGrams(), texts=NextSentence())
    assert all(e.label_weights.sum() == 1 for e in labelled.examples(document, make_context()))


def test_presets():
    assert (BERT.max_predictions, BERT.num_duplicates, BERT.texts.num_labels) == (20, 10, 2)
    assert (ALBERT.unit.longest, ALBERT.num_duplicates) == (3, 40)
    assert ROBERTA.num_duplicates is None
    assert ROBERTA.traits.num_labels == 0


def test_bad_settings_are_named():
    lengths = Lengths(64)
    assert "rate" in MaskedLM(rate=0.0).problems(SPECIALS, lengths)[0]
    assert "max_predictions" in MaskedLM(max_predictions=0).problems(SPECIALS, lengths)[0]
    assert "num_duplicates" in MaskedLM(num_duplicates=0).problems(SPECIALS, lengths)[0]
