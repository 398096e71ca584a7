"""Packing keeps every example whole, in one row, with its own segment and positions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.batch import DTYPES, Example, Lengths
from lm.data.formats import DataError
from lm.data.packing import OPEN_ROWS, assemble, first_fit, one_a_row, shuffle


def example(inputs, targets=None, weights=None, **others):
    targets = inputs if targets is None else targets
    weights = np.ones(len(inputs)) if weights is None else weights
    arrays = {name: np.asarray(value) for name, value in others.items()}
    return Example(np.asarray(inputs), np.asarray(targets), np.asarray(weights, np.float32), **arrays)


def pack(examples, tokens, encoder=None, packer=first_fit):
    lengths = Lengths(tokens, encoder)
    named = [(f"d{number}", one) for number, one in enumerate(examples)]
    rows = list(packer(named, lengths))
    return rows, assemble(rows, lengths, 0, examples[0])


def test_encoder_decoder_known_answer():
    # seqio's own test of its packing feature converter (facts 1.3).
    _, batch = pack(
        [
            example([0, 3, 9], [3, 9, 1], encoder_inputs=[7, 8, 5, 1]),
            example([0, 4], [4, 1], encoder_inputs=[8, 4, 9, 3, 1]),
        ],
        tokens=7,
        encoder=10,
    )
    assert batch.encoder_inputs.tolist() == [[7, 8, 5, 1, 8, 4, 9, 3, 1, 0]]
    assert batch.encoder_segment_ids.tolist() == [[1, 1, 1, 1, 2, 2, 2, 2, 2, 0]]
    assert batch.encoder_positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4, 0]]
    assert batch.targets.tolist() == [[3, 9, 1, 4, 1, 0, 0]]
    assert batch.inputs.tolist() == [[0, 3, 9, 0, 4, 0, 0]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 2, 2, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0, 0]]
    assert batch.weights.tolist() == [[1, 1, 1, 1, 1, 0, 0]]


def test_language_model_known_answer():
    # Facts 1.3: LM only, length 6.
    _, batch = pack([example([0, 3, 9], [3, 9, 1]), example([0, 4], [4, 1])], tokens=6)
    assert batch.inputs.tolist() == [[0, 3, 9, 0, 4, 0]]
    assert batch.targets.tolist() == [[3, 9, 1, 4, 1, 0]]


def test_prefix_language_model_known_answer():
    # Facts 3.2: two examples in a row of 15, bidirectional over the inputs and one more.
    first = example(
        [0, 7, 8, 5, 1, 3, 9], [7, 8, 5, 1, 3, 9, 1], [0, 0, 0, 0, 1, 1, 1], bidirectional=[True] * 5 + [False] * 2
    )
    second = example(
        [0, 8, 4, 9, 3, 1, 4], [8, 4, 9, 3, 1, 4, 1], [0, 0, 0, 0, 0, 1, 1], bidirectional=[True] * 6 + [False]
    )
    _, batch = pack([first, second], tokens=15)
    assert batch.inputs.tolist() == [[0, 7, 8, 5, 1, 3, 9, 0, 8, 4, 9, 3, 1, 4, 0]]
    assert batch.targets.tolist() == [[7, 8, 5, 1, 3, 9, 1, 8, 4, 9, 3, 1, 4, 1, 0]]
    assert batch.weights.tolist() == [[0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4, 5, 6, 0]]
    assert batch.segment_ids.tolist() == [[1] * 7 + [2] * 7 + [0]]
    assert batch.bidirectional.astype(int).tolist() == [[1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0]]


def test_first_fit_goes_back_to_the_first_row_with_room():
    rows, batch = pack([example([1] * n) for n in (6, 5, 3, 4, 2)], tokens=8)
    # In the order in which they become full.
    assert [row.ids for row in rows] == [["d1", "d2"], ["d0", "d4"], ["d3"]]
    assert batch.segment_ids.tolist() == [[1] * 5 + [2] * 3, [1] * 6 + [2] * 2, [1] * 4 + [0] * 4]


def test_little_is_padding():
    # Plain first-fit fills 0.90 of the rows here, first-fit decreasing 0.95.
    sizes = np.random.default_rng(0).integers(133, 667, 20 * 64)
    rows = [
        row
        for start in range(0, len(sizes), 64)
        for row in first_fit((("d", example(np.zeros(n))) for n in sizes[start : start + 64]), Lengths(1024))
    ]
    assert sizes.sum() / (1024 * len(rows)) > 0.95


def test_all_features_must_fit():
    sizes = [(2, 6), (2, 6), (2, 2)]
    rows, _ = pack([example([1] * a, encoder_inputs=[2] * b) for a, b in sizes], tokens=8, encoder=8)
    assert [row.ids for row in rows] == [["d0", "d2"], ["d1"]]


def test_without_packing_each_example_has_a_row():
    rows, batch = pack([example([1, 2]), example([3])], tokens=4, packer=one_a_row)
    assert len(rows) == 2
    assert batch.inputs.tolist() == [[1, 2, 0, 0], [3, 0, 0, 0]]
    assert batch.segment_ids.tolist() == [[1, 1, 0, 0], [1, 0, 0, 0]]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 7)), min_size=1, max_size=200))
@settings(max_examples=60, deadline=None)
def test_each_example_stands_whole_in_one_row(sizes):
    made = [
        example(range(100 * k, 100 * k + a), encoder_inputs=range(100 * k, 100 * k + b), token_types=[k % 2] * a)
        for k, (a, b) in enumerate(sizes)
    ]
    rows, batch = pack(made, tokens=9, encoder=7)
    seen = []
    for number, row in enumerate(rows):
        for segment, name in enumerate(row.ids, start=1):
            original = made[int(name[1:])]
            where, encoder = batch.segment_ids[number] == segment, batch.encoder_segment_ids[number] == segment
            np.testing.assert_array_equal(batch.inputs[number][where], original.inputs)
            np.testing.assert_array_equal(batch.positions[number][where], np.arange(len(original.inputs)))
            np.testing.assert_array_equal(batch.token_types[number][where], original.token_types)
            np.testing.assert_array_equal(batch.encoder_inputs[number][encoder], original.encoder_inputs)
            np.testing.assert_array_equal(batch.encoder_positions[number][encoder], np.arange(encoder.sum()))
            assert np.ptp(np.flatnonzero(where)) == where.sum() - 1
            seen.append(name)
    assert sorted(seen) == sorted(f"d{k}" for k in range(len(sizes)))
    assert (batch.weights[batch.segment_ids == 0] == 0).all()


def test_open_rows_are_bounded():
    rows = first_fit(((f"d{k}", example([1, 1])) for k in range(10**9)), Lengths(3))
    assert next(rows).ids == ["d0"]
    assert OPEN_ROWS == 64


def test_fields_that_only_some_examples_set():
    made = [example([1, 2, 3]), example([4, 5], positions=[8, 9], bidirectional=[True, True]), example([6])]
    _, batch = pack(made, tokens=7)
    assert batch.positions.tolist() == [[0, 1, 2, 8, 9, 0, 0]]
    assert batch.bidirectional.tolist() == [[False] * 3 + [True] * 2 + [False] * 2]


def test_an_id_zero_inside_text_is_a_token_like_any_other():
    # seqio's packer counts what is not zero, and drops the tail (facts 1.3, pitfall a).
    _, batch = pack([example([5, 0, 0, 6]), example([0])], tokens=6)
    assert batch.inputs.tolist() == [[5, 0, 0, 6, 0, 0]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 1, 2, 0]]


def test_dtypes_padding_rows_and_optional_fields():
    lengths, like = Lengths(4, 3), example([1, 2], encoder_inputs=[3], label_targets=[0, 1], label_weights=[0, 1])
    batch = assemble([None, None], lengths, 9, like)
    for name, array in batch._asdict().items():
        assert array is None or array.dtype == DTYPES[name]
    assert (batch.inputs == 9).all()
    assert (batch.encoder_inputs == 9).all()
    assert batch.encoder_inputs.shape == (2, 3)
    assert not batch.segment_ids.any()
    assert not batch.weights.any()
    assert batch.label_weights.shape == (2, 4)
    assert batch.token_types is None


def test_examples_that_no_row_can_hold():
    with pytest.raises(ValueError, match="example of 5 positions from d0: it must have 1 to 4"):
        pack([example([1] * 5)], tokens=4)
    with pytest.raises(ValueError, match="example of 0 positions"):
        pack([example([])], tokens=4)
    with pytest.raises(DataError, match=r"5 encoder positions from d0: data\.encoder_length is 3"):
        pack([example([1], encoder_inputs=[1] * 5)], tokens=4, encoder=3)


def test_shuffled_rows_are_the_same_rows():
    rows = list(first_fit(((f"d{k}", example([k] * 3)) for k in range(40)), Lengths(3)))
    drawn = list(shuffle(iter(rows), 8, np.random.default_rng(0)))
    assert sorted(row.ids[0] for row in drawn) == sorted(row.ids[0] for row in rows)
    places = {row.ids[0]: place for place, row in enumerate(rows)}
    assert all(places[row.ids[0]] <= place + 8 for place, row in enumerate(drawn))
    assert [row.ids for row in drawn] != [row.ids for row in rows]
    assert [row.ids for row in shuffle(iter(rows), 1, np.random.default_rng(0))] == [row.ids for row in rows]
