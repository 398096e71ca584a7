"""The laws that every objective keeps, over the table of all of them."""

import dataclasses
import hashlib
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.batch import DTYPES, ENCODER_FIELDS, Lengths, SpecialTokens
from lm.config import from_json, to_json
from tests.objectives.table import ROWS
from tests.objectives.vocabulary import SENTENCES, SPECIALS, TEXT_START, make_context, make_distinct, make_document

CASES = [pytest.param(row, stacks, id=f"{row.name}-{stacks}") for row in ROWS for stacks in row.stacks]
OPTIONAL = {"token_types", "label_targets", "label_weights", "block_positions", "components"}


def context_for(stacks, tokens=64, **kwargs):
    return make_context(tokens=tokens, encoder=tokens if stacks == 2 else None, **kwargs)


def same(first, second):
    for name in (field.name for field in dataclasses.fields(first)):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name), err_msg=name)


@pytest.mark.parametrize(("row", "stacks"), CASES)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(length=st.integers(0, 200), index=st.integers(0, 2**32), prose=st.booleans())
def test_examples_keep_the_contract(row, stacks, length, index, prose):
    context = context_for(stacks, index=index)
    assert row.objective.problems(SPECIALS, context.lengths) == []
    document = make_document(SENTENCES[:length]) if prose else make_distinct(length)
    traits = row.objective.traits
    assert ("encoder_decoder" if stacks == 2 else "decoder") in traits.layouts or "encoder" in traits.layouts
    for example in row.objective.examples(document, context):
        size = len(example.inputs)
        assert 1 <= size <= context.lengths.tokens
        assert (example.encoder_inputs is not None) == (stacks == 2)
        assert {name for name in OPTIONAL if getattr(example, name) is not None} == traits.fields
        assert example.weights.sum() > 0 or example.label_weights.sum() > 0
        assert example.positions is None or 0 <= example.positions.min() <= example.positions.max() < 64
        if not traits.bidirectional:
            assert example.bidirectional is None
        for field in dataclasses.fields(example):
            value = getattr(example, field.name)
            if value is not None:
                assert value.dtype == DTYPES[field.name], field.name
                assert value.shape == (len(example.encoder_inputs) if field.name in ENCODER_FIELDS else size,)
        if stacks == 2:
            assert 1 <= len(example.encoder_inputs) <= context.lengths.encoder
        if traits.component_names:
            assert 0 <= example.components.min() <= example.components.max() < len(traits.component_names)
        if traits.num_labels:
            assert example.label_weights.tolist() == [1] + [0] * (size - 1)
            assert 0 <= example.label_targets[0] < traits.num_labels


@pytest.mark.parametrize(("row", "stacks"), CASES)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(length=st.integers(2, 200), index=st.integers(0, 2**32), prose=st.booleans())
def test_examples_rebuild_the_text(row, stacks, length, index, prose):
    # Pairs drop what exceeds a row, so theirs holds the whole document.
    context = context_for(stacks, tokens=256 if row.readable.traits.num_labels else 64, index=index)
    document = make_document(SENTENCES[:length]) if prose else make_distinct(length)
    examples = row.readable.examples(document, context)
    if not examples:
        assert row.readable.traits.num_labels or length < 4  # A short text may have no second sentence, or no word.
        return
    if row.name == "bert" and len(document.tokens) != sum(len(e.targets) - 3 for e in examples):
        return  # A single sentence was paired with another document.
    assert row.rebuild(examples, document) == document.tokens.tolist()


def allowed(example, i):
    """Returns the positions that position i attends to (`lm.batch.Batch`)."""
    flags = np.zeros(len(example.inputs), bool) if example.bidirectional is None else example.bidirectional
    places = np.arange(len(example.inputs))
    return np.flatnonzero((places <= i) | (flags & flags[i]))


@pytest.mark.parametrize(("row", "stacks"), CASES)
@pytest.mark.parametrize("index", range(6))
def test_no_predicted_token_can_be_seen(row, stacks, index):
    document = make_distinct(150)
    for example in row.readable.examples(document, context_for(stacks, index=index)):
        in_source = np.zeros(len(example.inputs), bool)
        encoder_inputs = set() if example.encoder_inputs is None else set(example.encoder_inputs.tolist())
        if row.copies:
            encoder_inputs = set()
            in_source = np.arange(len(example.inputs)) <= (example.weights == 0).sum() if stacks == 1 else in_source
        for i in np.flatnonzero(example.weights > 0):
            target = int(example.targets[i])
            if target < TEXT_START + 96:
                continue  # A special token, or prose from another document, whose characters repeat.
            seen = [int(example.inputs[j]) for j in allowed(example, i) if not in_source[j]]
            assert target not in seen, (i, target)
            assert target not in encoder_inputs, (i, target)


@pytest.mark.parametrize(("row", "stacks"), CASES)
def test_an_example_depends_on_its_key_alone(row, stacks):
    documents = [make_distinct(150, name="corpus/a"), make_document(SENTENCES, "corpus/b")]
    keys = [(epoch, index) for epoch in (0, 1) for index in (0, 7)]

    def make(key, document):
        return row.objective.examples(document, context_for(stacks, seed=3, epoch=key[0], index=key[1]))

    first = {(key, d.id): make(key, d) for key in keys for d in documents}
    for key in reversed(keys):
        for document in reversed(documents):
            again = make(key, document)
            assert len(again) == len(first[key, document.id])
            for one, other in zip(again, first[key, document.id], strict=True):
                same(one, other)


def digest():
    """Returns a fingerprint of every objective's examples of two documents."""
    total = hashlib.sha256()
    for row in ROWS:
        for stacks in row.stacks:
            for document in (make_distinct(150), make_document(SENTENCES)):
                for example in row.objective.examples(document, context_for(stacks, seed=1, epoch=2, index=3)):
                    for field in dataclasses.fields(example):
                        value = getattr(example, field.name)
                        total.update(b"" if value is None else value.tobytes())
    return total.hexdigest()


def test_another_process_makes_the_same_examples():
    program = "from tests.objectives.test_laws import digest; print(digest())"
    root = pathlib.Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONHASHSEED": "123", "PYTHONPATH": str(root)}
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert other.stdout.strip() == digest()


@pytest.mark.parametrize(("row", "stacks"), CASES)
def test_rows_too_short_are_refused_or_work(row, stacks):
    for tokens in range(1, 17):
        context = context_for(stacks, tokens=tokens)
        problems = row.objective.problems(SPECIALS, context.lengths)
        for document in (make_distinct(40), make_document(SENTENCES[:60])):
            try:
                examples = row.objective.examples(document, context)
            except ValueError:
                assert problems
            else:
                assert problems or all(len(e.inputs) <= tokens for e in examples)


@pytest.mark.parametrize(("row", "stacks"), CASES)
def test_documents_are_not_changed(row, stacks):
    document = make_distinct(150)
    document.tokens.setflags(write=False)
    row.objective.examples(document, context_for(stacks))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_poor_tokenizer_and_short_rows_are_named(row):
    lengths = Lengths(64, 64 if row.stacks == (2,) else None)
    poor = row.objective.problems(SpecialTokens(pad=0), lengths)
    assert poor
    assert all(len(problem) < 300 for problem in poor)
    assert row.objective.problems(SPECIALS, Lengths(1, 1 if row.stacks == (2,) else None)) or row.name == "causal"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_settings_survive_json(row):
    assert from_json(type(row.objective), to_json(row.objective)) == row.objective
    hash(row.objective)
