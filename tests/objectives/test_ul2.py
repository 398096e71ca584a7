"""Known answers: UL2's table 1 and its lengths, re-derived; U-PaLM's mixture."""

import collections

import numpy as np

from lm.batch import Lengths, SpecialTokens
from lm.objectives import UL2, UL2_DENOISERS, UL2R_DENOISERS, SuffixNoise, TextToText
from lm.objectives.span_corruption import replace_spans
from lm.objectives.ul2 import spans, suffix
from tests.objectives.vocabulary import SPECIALS, Characters, make_context, make_distinct

MANY = SpecialTokens(pad=0, bos=1, eos=2, modes=(7, 8, 9), sentinels=tuple(range(1000, 1600)))


def test_the_seven_denoisers():
    assert [d.name for d in UL2_DENOISERS] == [
        "R(3,0.15)", "R(8,0.15)", "S(0.25)", "X(3,0.5)", "X(8,0.5)", "X(64,0.15)", "X(64,0.5)",
    ]  # fmt: skip
    assert len({d.weight for d in UL2_DENOISERS}) == 1
    assert UL2().traits.component_names == tuple(d.name for d in UL2_DENOISERS)


def test_the_worked_example():
    source, target = replace_spans(np.arange(10, 20), np.isin(np.arange(10), [3, 4, 5, 8, 9]), (99, 98))
    assert [7, *source] == [7, 10, 11, 12, 99, 16, 17, 98]
    assert target.tolist() == [99, 13, 14, 15, 98, 18, 19]


def test_mode_tokens_name_the_mode():
    for stacks in (None, 64):
        modes = collections.defaultdict(set)
        for index in range(60):
            for e in UL2().examples(make_distinct(150), make_context(64, stacks, index=index)):
                first = e.encoder_inputs[0] if stacks else e.inputs[1]
                modes[UL2_DENOISERS[e.components[0]].mode].add(int(first))
        assert modes == {"R": {7}, "S": {8}, "X": {9}}


def test_rows_are_filled_exactly_with_the_mode_token():
    # R(3, .15) fills an encoder row of 513 with its mode token: 568 tokens of text, a target of 114.
    objective = UL2(denoisers=(spans("R", 3, 0.15),))
    (example,) = objective.examples(make_distinct(568, 200), make_context(114, 513))
    assert (len(example.encoder_inputs), len(example.targets)) == (513, 114)
    assert example.encoder_inputs[-1] == SPECIALS.eos
    assert example.targets[-1] == SPECIALS.eos
    extreme = UL2(denoisers=(spans("X", 3, 0.5),))
    (example,) = extreme.examples(make_distinct(766), make_context(512, 513, vocabulary=Characters(specials=MANY)))
    assert (len(example.encoder_inputs), len(example.targets)) == (513, 512)


def test_shares_follow_the_weights():
    objective = UL2(denoisers=UL2R_DENOISERS)
    counts = collections.Counter()
    for index in range(2000):
        for e in objective.examples(make_distinct(40), make_context(64, 64, index=index)):
            counts[int(e.components[0])] += 1
    shares = np.array([counts[k] for k in range(4)]) / sum(counts.values())
    np.testing.assert_allclose(shares, [0.5, 0.25, 0.125, 0.125], atol=0.03)


def test_a_long_document_has_segments_of_several_denoisers():
    examples = UL2().examples(make_distinct(700, 150), make_context(32, 32))
    assert len({int(e.components[0]) for e in examples}) > 3


def test_a_causal_single_stack():
    objective = UL2(format=TextToText(prefix="causal", source_eos=False))
    assert not objective.traits.bidirectional
    for e in objective.examples(make_distinct(100), make_context(64)):
        assert e.bidirectional is None
        assert e.weights[0] == 0  # The mode token is read, not predicted.
        assert SPECIALS.eos not in e.targets[:-1]


def test_problems_name_the_denoiser():
    lengths = Lengths(512, 512)
    (problem,) = UL2().problems(SPECIALS, lengths)
    assert problem.startswith("denoiser X(3,0.5): ")
    assert "sentinels" in problem
    assert UL2().problems(MANY, lengths) == []
    assert "mode" in UL2().problems(SpecialTokens(pad=0, bos=1, eos=2, sentinels=MANY.sentinels), lengths)[0]
    assert "weight" in UL2(denoisers=()).problems(MANY, lengths)[0]
    assert "weight" in UL2(denoisers=(suffix(0.25, weight=0.0),)).problems(MANY, lengths)[0]
    bad = UL2(denoisers=(spans("R", 3, 1.5),))
    assert "noise_density" in bad.problems(MANY, lengths)[0]
    assert isinstance(UL2_DENOISERS[2].noise, SuffixNoise)
