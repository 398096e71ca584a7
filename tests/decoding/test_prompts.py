"""Padding and bucketing of prompts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.decoding import DecodingError, bucket_length, pad_prompts


@given(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=40), min_size=1, max_size=5))
def test_prompts_can_be_read_back(prompts):
    padded = pad_prompts(prompts)
    assert padded.tokens.dtype == padded.lengths.dtype == padded.rows.dtype == np.int32
    assert [row[:length].tolist() for row, length in zip(padded.tokens, padded.lengths, strict=True)] == prompts
    assert padded.tokens.shape[1] == bucket_length(max(map(len, prompts)))
    assert padded.encoder_tokens is None


def test_bucket_length():
    assert [bucket_length(n) for n in (1, 16, 17, 32, 33, 1000)] == [16, 16, 32, 32, 64, 1024]
    assert bucket_length(1, smallest=1) == 1


def test_encoder_prompts_are_padded_apart():
    padded = pad_prompts([[0], [0]], encoder_prompts=[[1] * 20, [2]], rows=[7, 3], smallest=1)
    assert padded.tokens.shape == (2, 1)
    assert padded.encoder_tokens.shape == (2, 32)
    assert padded.encoder_lengths.tolist() == [20, 1]
    assert padded.rows.tolist() == [7, 3]


@pytest.mark.parametrize("prompts", [[], [[]], [[1], []]])
def test_a_prompt_without_tokens_is_an_error(prompts):
    with pytest.raises(DecodingError, match="bos"):
        pad_prompts(prompts)


def test_lists_of_different_lengths_are_an_error():
    with pytest.raises(DecodingError, match="encoder prompts"):
        pad_prompts([[1]], encoder_prompts=[[1], [2]])
    with pytest.raises(DecodingError, match="row numbers"):
        pad_prompts([[1]], rows=[1, 2])
