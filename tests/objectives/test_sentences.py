import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.objectives.sentences import split_sentences
from tests.objectives.vocabulary import ALPHABET, VOCABULARY


def split(text):
    return [VOCABULARY.decode(s) for s in split_sentences(VOCABULARY.encode(text), VOCABULARY)]


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("Ah. So be it.", ["Ah.", " So be it."]),
        ("Pi is 3.14 or so! Is it?\nYes", ["Pi is 3.14 or so!", " Is it?", "\nYes"]),
        ("no end", ["no end"]),
        ("", []),
    ],
)
def test_known_texts(text, sentences):
    assert split(text) == sentences


@given(st.text(alphabet=[*". \n!?ab", *ALPHABET[100:110]], max_size=60))
def test_the_sentences_in_a_row_are_the_tokens(text):
    tokens = VOCABULARY.encode(text)
    sentences = split_sentences(tokens, VOCABULARY)
    assert all(len(sentence) for sentence in sentences)
    np.testing.assert_array_equal(np.concatenate([*sentences, tokens[:0]]), tokens)
