"""The yardstick: every token once, nothing seen that is predicted, and a uniform model needs log2(V) bits a token."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.batch import Document
from lm.data import Files
from lm.data.packing import assemble, first_fit
from lm.data.sources import split
from lm.evaluation import cells
from lm.evaluation.heldout import make_evaluate
from lm.evaluation.yardstick import Continuation, PseudoLikelihood, WholeBlank, choose_yardstick
from lm.objectives import BART, UL2, Causal, SpanCorruption
from lm.training.assembly import assemble as assemble_run
from tests.objectives.vocabulary import SPECIALS, VOCABULARY, make_context, make_distinct

YARDSTICKS = {
    "rows": (Causal(), None),
    "continuation": (Continuation(), 24),
    "pseudo": (PseudoLikelihood(), None),
    "one at a time": (PseudoLikelihood(stride=None), None),
    "blank": (WholeBlank(), None),
}


def text_targets(example):
    """The tokens of text that an example scores."""
    scored = example.targets[example.weights > 0]
    return scored[VOCABULARY.token_bytes[scored] > 0].tolist()


@pytest.mark.parametrize("length", [0, 1, 2, 7, 30, 31, 100])
@pytest.mark.parametrize("name", YARDSTICKS)
def test_every_token_is_scored_exactly_once(name, length):
    objective, encoder = YARDSTICKS[name]
    document, context = make_distinct(length), make_context(32, encoder)
    examples = objective.examples(document, context)
    assert sorted(t for e in examples for t in text_targets(e)) == sorted(document.tokens.tolist())
    assert objective.problems(SPECIALS, context.lengths) == []
    if examples:
        rows = list(first_fit([("d", e) for e in examples], context.lengths))
        batch = assemble(rows, context.lengths, 0, examples[0])
        assert batch.weights.sum() == sum(e.weights.sum() for e in examples)


@pytest.mark.parametrize("name", ["pseudo", "one at a time"])
def test_what_is_hidden_is_not_shown(name):
    objective, _ = YARDSTICKS[name]
    for example in objective.examples(make_distinct(100), make_context(32)):
        hidden = example.weights > 0
        assert hidden.any()
        assert set(example.inputs[hidden]) == {SPECIALS.mask}
        np.testing.assert_array_equal(example.inputs[~hidden], example.targets[~hidden])
        assert not set(example.targets[hidden]) & set(example.inputs)
        assert example.bidirectional.all()


def test_pseudo_likelihood_known_answer():
    tokens = np.array([20, 21, 22], np.int32) + 200
    examples = PseudoLikelihood(stride=2).examples(Document("d", None, tokens), make_context(8))
    cls, sep, mask = SPECIALS.cls, SPECIALS.sep, SPECIALS.mask
    assert [e.inputs.tolist() for e in examples] == [[cls, mask, 221, mask, sep], [cls, 220, mask, 222, sep]]
    assert [e.weights.tolist() for e in examples] == [[0, 1, 0, 1, 0], [0, 0, 1, 0, 0]]


def test_continuation_after_bart():
    """The decoder starts with eos, and source and target with bos, which is not scored."""
    tokens = np.array([20, 21, 22], np.int32) + 200
    examples = Continuation(frame=BART().traits.frame).examples(Document("d", None, tokens), make_context(3, 4))
    bos, eos = SPECIALS.bos, SPECIALS.eos
    assert [e.encoder_inputs.tolist() for e in examples] == [[bos, eos], [bos, 220, 221, eos]]
    assert [e.inputs.tolist() for e in examples] == [[eos, bos, 220], [eos, bos, 222]]
    assert [e.targets.tolist() for e in examples] == [[bos, 220, 221], [bos, 222, eos]]
    assert [e.weights.tolist() for e in examples] == [[0, 1, 1], [0, 1, 1]]


@pytest.mark.parametrize(
    ("objective", "before", "mark"),
    [(UL2(), [SPECIALS.modes[1]], []), (SpanCorruption(), [], [SPECIALS.sentinels[0]])],
)
def test_continuation_shows_the_marks_that_training_showed(objective, before, mark):
    """UL2's mode token, which is S; T5's sentinel at the gap and before the answer, which is not scored."""
    tokens = np.array([20, 21, 22], np.int32) + 200
    bos, eos = SPECIALS.bos, SPECIALS.eos
    lengths = (2 + len(mark), 3 + len(before) + len(mark))
    yardstick = choose_yardstick(objective, "encoder_decoder").objective
    examples = yardstick.examples(Document("d", None, tokens), make_context(*lengths))
    assert [e.encoder_inputs.tolist() for e in examples] == [
        [*before, *mark, eos],
        [*before, 220, 221, *mark, eos],
    ]
    assert [e.inputs.tolist() for e in examples] == [[bos, *mark, 220][: lengths[0]], [bos, *mark, 222][: lengths[0]]]
    assert [e.targets.tolist() for e in examples] == [[*mark, 220, 221], [*mark, 222, eos]]
    assert [e.weights.tolist() for e in examples] == [[0] * len(mark) + [1, 1]] * 2
    without = dataclasses.replace(SPECIALS, modes=(), sentinels=())
    assert len(yardstick.problems(without, make_context(*lengths).lengths)) == 1


def test_continuation_known_answer():
    """Rows of three: the source is what came before, at most three tokens of it, and eos."""
    tokens = np.array([20, 21, 22, 23, 24], np.int32) + 200
    examples = Continuation().examples(Document("d", None, tokens), make_context(3, 4))
    bos, eos = SPECIALS.bos, SPECIALS.eos
    assert [e.encoder_inputs.tolist() for e in examples] == [[eos], [220, 221, 222, eos]]
    assert [e.inputs.tolist() for e in examples] == [[bos, 220, 221], [bos, 223, 224]]
    assert [e.targets.tolist() for e in examples] == [[220, 221, 222], [223, 224, eos]]


def test_continuation_shows_only_what_came_before():
    document = make_distinct(100)
    place = {token: i for i, token in enumerate(document.tokens.tolist())}
    for example in Continuation().examples(document, make_context(32, 24)):
        targets = [place[t] for t in text_targets(example)]
        assert all(place[t] < min(targets) for t in example.encoder_inputs.tolist() if t in place)


def test_whole_blank_known_answer():
    tokens = np.array([20, 21], np.int32) + 200
    (example,) = WholeBlank().examples(Document("d", None, tokens), make_context(8))
    assert example.inputs.tolist() == [SPECIALS.mask, SPECIALS.sop, 220, 221]
    assert example.targets[1:].tolist() == [220, 221, SPECIALS.eop]
    assert example.weights.tolist() == [0, 1, 1, 1]
    assert example.block_positions.tolist() == [0, 1, 2, 3]
    assert example.positions.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("name", [name for name, run in cells.cells().items() if not run.problems()])
def test_the_model_that_trains_can_read_its_yardstick(name):
    run = cells.cells()[name]
    yardstick = choose_yardstick(run.objective, run.model.layout)
    scored = dataclasses.replace(run, objective=yardstick.objective)
    # No pooled head is trained or needed: token types and labels are absent, which models read as zeros and skip.
    clashes = [line for line in scored.problems() if "num_classes" not in line]
    assert clashes == []
    assert yardstick.words


SIGHTS = {
    "Causal": ("Causal", "Decoder"),
    "PrefixLM": ("PrefixLM", "Decoder"),
    "GLM": ("GLM", "Decoder"),
    "MLM": ("MaskedLM (BERT)", "Encoder"),
    "spans": ("SpanCorruption", "EncoderDecoder"),
}


@pytest.mark.parametrize("name", SIGHTS)
def test_a_uniform_model_needs_log2_of_the_vocabulary_for_each_token(name, corpus):
    run = cells.make_cell(*SIGHTS[name])
    data = dataclasses.replace(run.data, source=corpus, validation_fraction=0.3)
    run = dataclasses.replace(run, data=data, batch_size=8)
    parts = assemble_run(run, data.tokenizer.build(None))
    # With every weight 0 all logits are 0.
    zeros = jax.tree.map(lambda x: jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding), parts.state.params)
    figures = make_evaluate(parts)(zeros, True)
    # One token a byte; a chain's last token, eos or the end of a blank, is scored besides and stands for no byte.
    ends = figures["bits_per_byte"] * figures["bytes"] / math.log2(run.model.vocab_size) - figures["bytes"]
    np.testing.assert_allclose(ends, round(ends), atol=0.02)
    text = Files(paths=(corpus,)).open()
    _, held_out = split(text.keys(), 0.3)
    sizes = [len(text.text(int(place)).encode()) for place in held_out]
    assert figures["bytes"] == sum(sizes)
    rows_of_blanks = sum(math.ceil(size / (cells.LENGTH - 2)) for size in sizes)
    assert round(ends) == {"MLM": 0, "GLM": rows_of_blanks}.get(name, len(sizes))
