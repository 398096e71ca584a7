"""A tokenizer.json of others encodes as the package `tokenizers` does."""

import pickle

import numpy as np
import pytest

from lm.data.formats import DataError
from lm.data.hugging_face import HuggingFace
from lm.data.tokenizers import load

tokenizers = pytest.importorskip("tokenizers")
TEXTS = ["the quick brown fox jumps over the lazy dog\n" * 3, "  two  spaces and é 日本 🙂\t<mask> </s>"]


def byte_level():
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "<pad>", "</s>", "<mask>", "<extra_id_0>", "<extra_id_1>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS, trainer)
    made.enable_truncation(3)
    return made


def word_piece():
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.decoder = tokenizers.decoders.WordPiece()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = tokenizers.trainers.WordPieceTrainer(vocab_size=90, special_tokens=specials, show_progress=False)
    made.train_from_iterator(TEXTS, trainer)
    return made


@pytest.fixture
def saved(tmp_path):
    def save(made):
        path = tmp_path / "tokenizer.json"
        made.save(str(path))
        return HuggingFace(path=str(path))

    return save


def test_byte_level_is_lossless(saved):
    tokenizer = saved(byte_level()).build(None)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())
        assert not set(ids.tolist()) & set(range(6))
    ids = tokenizer.encode("the quick fox")
    offsets = (np.cumsum(tokenizer.token_bytes[ids]) - tokenizer.token_bytes[ids])[tokenizer.starts_word[ids]]
    assert offsets.tolist() == [3, 9]


def test_specials_by_name(saved):
    specials = saved(byte_level()).build(None).specials
    assert (specials.bos, specials.pad, specials.eos, specials.mask, specials.sentinels) == (0, 1, 2, 3, (4, 5))
    # As RoBERTa, which has no others to frame an encoder's text with.
    assert (specials.cls, specials.sep) == (0, 2)
    assert specials.unk is None
    assert specials.fim == ()


def test_specials_of_families_without_a_bos_of_that_name(saved):
    names = ["<pad>", "</s>", "<extra_id_0>"]
    made = tokenizers.Tokenizer(tokenizers.models.BPE({name: i for i, name in enumerate(names)}, []))
    made.add_special_tokens(names)
    # T5's decoder starts with pad.
    assert saved(made).build(None).specials.bos == 0
    names = ["<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"]
    made = tokenizers.Tokenizer(tokenizers.models.BPE({name: i for i, name in enumerate(names)}, []))
    made.add_special_tokens(names)
    specials = saved(made).build(None).specials
    assert (specials.bos, specials.eos) == (0, 1)


def test_word_piece(saved):
    tokenizer = saved(word_piece()).build(None)
    assert (tokenizer.specials.pad, tokenizer.specials.cls, tokenizer.specials.mask) == (0, 2, 4)
    assert tokenizer.specials.bos is None
    ids = tokenizer.encode("jumps over lazy")
    assert tokenizer.pieces(ids)[0][0] == "j"
    assert tokenizer.token_bytes[ids].sum() == len("jumpsoverlazy")
    assert tokenizer.starts_word[ids].sum() == 3


def test_storage(saved, tmp_path):
    tokenizer = saved(byte_level()).build(None)
    tokenizer.save(tmp_path / "copy")
    for copy in (load(tmp_path / "copy"), HuggingFace(path=str(tmp_path)).build(None)):
        assert copy.fingerprint == tokenizer.fingerprint
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(tokenizer)).encode(TEXTS[0]), tokenizer.encode(TEXTS[0]))


def test_bad_files(tmp_path):
    assert "does not exist" in HuggingFace(path=str(tmp_path)).problems()[0]
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"is not a tokenizer\.json"):
        HuggingFace(path=str(tmp_path)).build(None)
