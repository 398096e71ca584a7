"""Streaming never splits a character, and loses nothing."""

import itertools

from hypothesis import example, given
from hypothesis import strategies as st

from lm.decoding import TextStream


def decode_bytes(tokens):
    return bytes(tokens).decode("utf-8", errors="replace")


def decode_words(tokens):
    """Like SentencePiece: the space before the first word is dropped."""
    return "".join(f" word{token}" for token in tokens)[1:]


def pieces(decode, tokens, sizes):
    stream, tokens, out = TextStream(decode), list(tokens), []
    for size in itertools.cycle(sizes):
        if not tokens:
            return [*out, stream.close()]
        out.append(stream.push(tokens[:size]))
        tokens = tokens[size:]
    raise AssertionError


chunk_sizes = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@given(st.text(max_size=30), chunk_sizes)
@example("a\N{GRINNING FACE}\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}", [1])
def test_pieces_are_whole_characters_and_join_to_the_text(text, sizes):
    parts = pieces(decode_bytes, text.encode(), sizes)
    assert "".join(parts) == text
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in part for part in parts)
        assert parts[-1] == ""


@given(st.binary(max_size=30), chunk_sizes)
def test_any_bytes_join_to_what_decoding_all_gives(data, sizes):
    assert "".join(pieces(decode_bytes, data, sizes)) == decode_bytes(data)


@given(st.lists(st.integers(0, 99), max_size=20), chunk_sizes)
def test_spaces_between_words_are_kept(tokens, sizes):
    assert "".join(pieces(decode_words, tokens, sizes)) == decode_words(tokens)


def test_text_comes_as_soon_as_it_is_certain():
    stream = TextStream(decode_bytes)
    face = "\N{GRINNING FACE}".encode()
    assert stream.push(b"a") == "a"
    assert stream.push(face[:3]) == ""
    assert stream.push(face[3:]) == "\N{GRINNING FACE}"
    assert stream.push(face[:2]) == ""
    assert stream.close() == "\N{REPLACEMENT CHARACTER}"
    assert stream.close() == ""


def test_work_is_linear():
    longest = 0

    def decode(tokens):
        nonlocal longest
        longest = max(longest, len(tokens))
        return decode_bytes(tokens)

    TextStream(decode).push(b"word " * 1000)
    assert longest <= 8
