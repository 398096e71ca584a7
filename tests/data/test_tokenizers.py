"""Tokenizers lose nothing, never make a special id from text, train alike every time, and survive storage."""

import dataclasses
import pickle

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lm.data.formats import DataError
from lm.data.sources import StandardLibrary
from lm.data.tokenizers import DESCRIPTION, MODEL, Bytes, Saved, SentencePiece, load, special_names

HARD = [
    "hello  world\n\n\tx",
    "  leading and trailing  ",
    "a\r\nb\rc\x00d\x0b",
    "▁ the sign of SentencePiece ▁▁x▁",
    "".join(special_names(3)) + "<0x41>",
    "日本語 é e\u0301 ﬁ ½ \u200b\ufeff\uffff 🙂",
    "",
]


class Text:
    """The first modules of the standard library."""

    def __init__(self, *texts):
        self.texts = texts

    def sample(self, num_bytes):
        if self.texts:
            yield from self.texts
            return
        corpus = StandardLibrary().open()
        for index in range(12):
            yield corpus.text(index)


CHOICES = {
    "bytes": Bytes(num_sentinels=5),
    "bpe": SentencePiece(vocab_size=700, num_sentinels=5),
    "unigram": SentencePiece(vocab_size=500, model_type="unigram", num_sentinels=5),
}


@pytest.fixture(scope="module", params=CHOICES)
def tokenizer(request):
    return CHOICES[request.param].build(Text())


def check_lossless(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert (ids >= len(special_names(5))).all()


@pytest.mark.parametrize("text", HARD)
def test_hard_texts_are_lossless(tokenizer, text):
    check_lossless(tokenizer, text)


@given(st.text(max_size=200))
@example("▁")
@settings(max_examples=100, deadline=None)
def test_any_text_is_lossless(tokenizer, text):
    check_lossless(tokenizer, text)


def test_real_text_is_lossless(tokenizer):
    corpus = StandardLibrary().open()
    for index in (20, 30, len(corpus) - 5):
        check_lossless(tokenizer, corpus.text(index))


def test_special_ids(tokenizer):
    specials = tokenizer.specials
    assert (specials.pad, specials.bos, specials.eos, specials.unk) == (0, 1, 2, 3)
    assert (specials.mask, specials.cls, specials.sep, specials.modes) == (4, 5, 6, (7, 8, 9))
    assert (specials.fim, specials.sop, specials.eop) == ((10, 11, 12), 13, 14)
    assert specials.sentinels == (15, 16, 17, 18, 19)
    assert tokenizer.pieces(range(20)) == list(special_names(5))
    assert tokenizer.decode([1, *tokenizer.encode("hi"), 15, 2]) == "<s>hi<extra_id_0></s>"
    assert not tokenizer.token_bytes[:20].any()
    assert not tokenizer.starts_word[:20].any()
    assert len(tokenizer.token_bytes) == len(tokenizer.starts_word) == tokenizer.size
    assert (tokenizer.token_bytes[20:] > 0).all()


def test_words_start_at_spaces_and_newlines(tokenizer):
    ids = tokenizer.encode("one two\nthree")
    starts = np.flatnonzero(tokenizer.starts_word[ids])
    before = np.concatenate([[0], np.cumsum(tokenizer.token_bytes[ids])])[starts]
    assert set(before.tolist()) <= {3, 7}
    assert 3 in before


def test_storage_round_trip(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t")
    again = load(tmp_path / "t")
    assert again.fingerprint == tokenizer.fingerprint
    assert again.specials == tokenizer.specials
    for copy in (again, Saved(directory=str(tmp_path / "t")).build(Text()), pickle.loads(pickle.dumps(tokenizer))):
        for text in HARD:
            np.testing.assert_array_equal(copy.encode(text), tokenizer.encode(text))
        np.testing.assert_array_equal(copy.token_bytes, tokenizer.token_bytes)
    assert not [path for path in (tmp_path / "t").iterdir() if "partial" in path.name]


@pytest.mark.parametrize("name", ["bpe", "unigram"])
def test_training_is_deterministic(name):
    text = Text(StandardLibrary().open().text(20))
    choice = dataclasses.replace(CHOICES[name], vocab_size=380)
    assert choice.build(text).fingerprint == choice.build(text).fingerprint


def test_subwords_are_shorter_than_bytes():
    tokenizer = CHOICES["bpe"].build(Text())
    text = StandardLibrary().open().text(20)
    assert len(tokenizer.encode(text)) < len(text.encode()) / 2
    # Runs of spaces are pieces: indentation is cheap.
    assert len(tokenizer.encode("        ")) <= 2


def test_lines_with_tabs_are_trained_on_too():
    # SentencePiece passes over sentences with a tab; ours are cut there.
    text = Text("\t".join(["wonderful day"] * 200))
    tokenizer = SentencePiece(vocab_size=305, num_sentinels=0).build(text)
    assert len(tokenizer.encode("wonderful")) <= 2


def test_a_vocabulary_larger_than_the_text_supports():
    text = Text("a few words, and no more of them\n" * 3)
    with pytest.raises(DataError, match=r"vocab_size 9000 is larger than the text supports: at most (\d+)") as caught:
        SentencePiece(vocab_size=9000).build(text)
    largest = int(str(caught.value).split("at most ")[1].split(",")[0])
    assert SentencePiece(vocab_size=largest).build(text).size == largest
    with pytest.raises(DataError, match="larger than the text supports"):
        SentencePiece(vocab_size=largest + 1).build(text)


def test_a_vocabulary_smaller_than_the_characters():
    with pytest.raises(DataError, match=r"vocab_size 400 is smaller than the text's characters need: at least \d+"):
        SentencePiece(vocab_size=400, character_coverage=1.0).build(Text("".join(map(chr, range(0x4E00, 0x4F00)))))


def test_no_text_at_all():
    with pytest.raises(DataError, match="no text to train"):
        SentencePiece(vocab_size=400).build(Text("", "\t"))


def test_problems():
    assert Bytes().problems() == SentencePiece().problems() == []
    assert "num_sentinels is -1" in Bytes(num_sentinels=-1).problems()[0]
    assert "special ids and bytes alone take 371" in SentencePiece(vocab_size=300).problems()[0]
    assert "character_coverage is 0" in SentencePiece(character_coverage=0).problems()[0]
    assert "training_megabytes is 0" in SentencePiece(training_megabytes=0).problems()[0]
    assert "has no vocabulary.json" in Saved(directory="nowhere").problems()[0]


def test_damaged_folders(tmp_path):
    with pytest.raises(DataError, match="holds no whole tokenizer"):
        load(tmp_path)
    CHOICES["bpe"].build(Text()).save(tmp_path)
    (tmp_path / MODEL).write_bytes(b"damaged")
    with pytest.raises(DataError, match="holds no whole tokenizer"):
        load(tmp_path)
    (tmp_path / DESCRIPTION).write_text('{"kind": "unheard of"}')
    with pytest.raises(DataError, match="holds no whole tokenizer"):
        load(tmp_path)


def test_an_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        Bytes().build(Text()).save(tmp_path / "file" / "t")
