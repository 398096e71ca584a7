import dataclasses
import typing

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lm.objectives
from lm.batch import Document, SpecialTokens
from lm.config import field_help
from lm.objectives.base import cut, find_missing, special
from tests.objectives.table import ROWS
from tests.objectives.vocabulary import make_context


@given(st.integers(0, 100), st.integers(1, 4), st.integers(0, 20))
def test_pieces_in_a_row_are_the_tokens(length, minimum, extra):
    limit = 2 * minimum - 1 + extra
    pieces = cut(np.arange(length), limit, minimum)
    if length < minimum:
        assert pieces == []
        return
    assert np.concatenate(pieces).tolist() == list(range(length)) if length else pieces == []
    assert all(minimum <= len(piece) <= limit for piece in pieces)
    assert all(len(piece) == limit for piece in pieces[:-2])


def test_a_limit_that_cannot_work_is_refused():
    with pytest.raises(ValueError, match="raise the lengths"):
        cut(np.arange(10), 2, minimum=2)


def test_a_missing_special_token_is_named():
    assert special(SpecialTokens(pad=0, mask=3), "mask") == 3
    with pytest.raises(ValueError, match="'mask'"):
        special(SpecialTokens(pad=0), "mask")
    assert find_missing(SpecialTokens(pad=0, bos=0), "bos", "pad") == []


def test_generators_depend_on_every_part_of_their_key():
    def draw(purpose=0, **key):
        return make_context(**key).rng(purpose).integers(2**62)

    draws = [draw(), draw(1), draw(seed=1), draw(epoch=1), draw(index=1)]
    assert len(set(draws)) == 5
    assert draw() == draws[0]


def test_static_generators_depend_on_the_document_and_the_turn():
    def draw(name, epoch, index=0, purpose=0):
        document = Document(name, None, np.zeros(1, np.int32))
        return make_context(epoch=epoch, index=index).static_rng(document, 2, purpose).integers(2**62)

    assert draw("a", 0) == draw("a", 2, index=9)
    assert len({draw("a", 0), draw("a", 1), draw("b", 0), draw("a", 0, purpose=1)}) == 4


def config_classes(hint):
    if dataclasses.is_dataclass(hint):
        yield hint
        for inner in typing.get_type_hints(hint).values():
            yield from config_classes(inner)
    for inner in typing.get_args(hint):
        yield from config_classes(inner)


def test_every_setting_is_documented():
    classes = set(config_classes(lm.objectives.AnyObjective))
    assert len(classes) > 20
    for cls in classes:
        documented = field_help(cls)
        for field in dataclasses.fields(cls):
            assert documented.get(field.name, "").strip(), f"{cls.__name__}.{field.name}"


def test_every_objective_is_offered_and_tested():
    offered = set(typing.get_args(lm.objectives.AnyObjective))
    assert {type(row.objective) for row in ROWS} == offered
    assert {cls.__name__ for cls in offered} <= set(vars(lm.objectives))
