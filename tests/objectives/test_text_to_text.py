"""Known answers: seqio's converters (the encoder-decoder and prefix-LM examples of their own tests)."""

import numpy as np
import pytest

from lm.batch import Lengths, SpecialTokens
from lm.objectives import UL2_DENOISERS, Deshuffle, PrefixLM, SpanCorruption, SpanNoise, TextToText
from lm.objectives.text_to_text import Sizes, plan_segment

# As in seqio: pad doubles as the start token.
SEQIO = SpecialTokens(pad=0, bos=0, eos=1)
PAIRS = [([7, 8, 5], [3, 9]), ([8, 4, 9, 3], [4])]


def lists(example):
    return {k: np.asarray(v).astype(int).tolist() for k, v in vars(example).items() if v is not None}


def join(source, target, lengths, form=None):
    return lists((form or TextToText()).join(np.array(source), np.array(target), SEQIO, lengths))


def test_two_stacks():
    first, second = (join(*pair, Lengths(7, 10)) for pair in PAIRS)
    assert first == {
        "encoder_inputs": [7, 8, 5, 1],
        "inputs": [0, 3, 9],
        "targets": [3, 9, 1],
        "weights": [1, 1, 1],
    }
    assert second["encoder_inputs"] == [8, 4, 9, 3, 1]
    assert second["inputs"] == [0, 4]
    assert second["targets"] == [4, 1]


def test_one_stack_packed_as_seqio_packs_it():
    rows = [join(*pair, Lengths(15)) for pair in PAIRS]
    packed = {name: rows[0][name] + rows[1][name] for name in rows[0]}
    assert packed["targets"] == [7, 8, 5, 1, 3, 9, 1, 8, 4, 9, 3, 1, 4, 1]
    assert packed["inputs"] == [0, 7, 8, 5, 1, 3, 9, 0, 8, 4, 9, 3, 1, 4]
    assert packed["weights"] == [0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1]
    assert packed["bidirectional"] == [1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 0]


def test_a_causal_prefix_has_no_flags():
    example = join(*PAIRS[0], Lengths(15), TextToText(prefix="causal", source_eos=False))
    assert example["targets"] == [7, 8, 5, 3, 9, 1]
    assert example["weights"] == [0, 0, 0, 1, 1, 1]
    assert "bidirectional" not in example
    assert not TextToText(prefix="causal").traits.bidirectional


def test_an_id_of_zero_in_the_text_is_a_token_like_any_other():
    # seqio derives weights and lengths from non-zero tests.
    example = join([7, 0, 5], [0, 9], Lengths(15))
    assert example["weights"] == [0, 0, 0, 0, 1, 1, 1]


def target_length(noise, length):
    sizes = noise.sizes(length)
    return sizes.noise + sizes.spans + 1


@pytest.mark.parametrize(
    ("inputs", "density", "mean", "length", "targets"),
    [
        # Upstream tests of T5's random_spans_helper, and ByT5's setting.
        (64, 0.2, 2, 70, 22),
        (64, 0.2, 1, 63, 27),
        (128, 0.15, 3, 141, 29),
        (256, 0.15, 3, 284, 58),
        (512, 0.15, 3, 568, 114),
        (1024, 0.15, 3, 1137, 229),
        (2048, 0.15, 3, 2274, 456),
        (1024, 0.15, 20, 1193, 189),
        # UL2's denoisers.
        (512, 0.15, 8, 588, 100),
        (512, 0.5, 3, 766, 512),
        (512, 0.5, 8, 908, 512),
        (512, 0.15, 64, 600, 92),
        (512, 0.5, 64, 1006, 512),
        (1024, 0.15, 8, 1178, 200),
        (1024, 0.5, 3, 1534, 1024),
        (1024, 0.5, 8, 1818, 1024),
        (1024, 0.15, 64, 1200, 184),
        (1024, 0.5, 64, 2014, 1024),
        # With the clamp to one span, which T5's planner lacks (it says 74, whose source has 65).
        (64, 0.15, 64, 73, 13),
    ],
)
def test_planner(inputs, density, mean, length, targets):
    noise = SpanNoise(noise_density=density, mean_span_length=mean)
    assert plan_segment(SpanCorruption(noise=noise), Lengths(targets, inputs)) == length
    assert target_length(noise, length) == targets
    sizes = SpanCorruption(noise=noise).sizes(length)
    assert sizes.source + 1 == inputs


def test_planner_fits_the_target_too():
    # T5's planner says (990, 512) for this one; drawn are 511 and 511.
    noise = SpanNoise(noise_density=0.5, mean_span_length=32)
    assert plan_segment(SpanCorruption(noise=noise), Lengths(512, 512)) == 990
    assert SpanCorruption(noise=noise).sizes(990)[:2] == (510, 510)
    # A short decoder row shortens the segment instead of cutting its eos.
    length = plan_segment(SpanCorruption(), Lengths(50, 512))
    assert target_length(SpanNoise(), length) <= 50 < target_length(SpanNoise(), length + 3)


def test_planner_for_one_stack():
    # 2 per span and 2 eos beside the text: 458 tokens have 69 noisy ones in 23 spans.
    assert plan_segment(SpanCorruption(), Lengths(506)) == 458
    assert plan_segment(PrefixLM(), Lengths(512)) == 510
    assert plan_segment(Deshuffle(), Lengths(512)) == 255


def test_planner_counts_a_mode_token():
    form = TextToText()
    plain = [plan_segment(d.corruption(form), Lengths(512, 512)) for d in UL2_DENOISERS]
    announced = [plan_segment(d.corruption(form), Lengths(512, 512), 1) for d in UL2_DENOISERS]
    shorter = [plan_segment(d.corruption(form), Lengths(512, 511)) for d in UL2_DENOISERS]
    assert announced == shorter
    assert all(a < p for a, p in zip(announced, plain, strict=True))


def test_rows_that_hold_nothing_are_named():
    problems = SpanCorruption().problems(SpecialTokens(pad=0, bos=1, eos=2, sentinels=tuple(range(10, 20))), Lengths(3))
    assert len(problems) == 1
    assert "rows of 3 tokens" in problems[0]
    assert TextToText().fits(Sizes(4, 3, 7), Lengths(4, 5))
    assert not TextToText().fits(Sizes(4, 3, 7), Lengths(3, 5))
    assert not TextToText().fits(Sizes(4, 3, 7), Lengths(4, 4))
    assert not TextToText().fits(Sizes(4, 3, 7), Lengths(8))
    assert TextToText().fits(Sizes(4, 3, 7), Lengths(9))
