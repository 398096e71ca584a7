"""What was tokenised ahead is read back with the same ids, keys and tokens; a folder is whole or absent."""

import json

import numpy as np
import pytest

from lm.data.formats import DataError
from lm.data.sources import hash_keys
from lm.data.tokenized import INDEX, TokenizedCorpus, new_folder, write

DOCUMENTS = [
    (f"näme#{k}", int(hash_keys("n", np.arange(20))[k]), np.arange(k % 7, dtype=np.int32) + k) for k in range(20)
]


def save(path, documents=DOCUMENTS, vocabulary_size=300, **others):
    with new_folder(path) as folder:
        return write(folder, iter(documents), vocabulary_size, {"tokenizer": "t", "source": "s"}, **others)


@pytest.mark.parametrize("shard_tokens", [1, 10, 10**6])
@pytest.mark.parametrize(("vocabulary_size", "dtype"), [(300, np.uint16), (70000, np.uint32)])
def test_round_trip(tmp_path, shard_tokens, vocabulary_size, dtype):
    index = save(tmp_path / "x", vocabulary_size=vocabulary_size, shard_tokens=shard_tokens)
    assert sum(shard["documents"] for shard in index["shards"]) == 20
    corpus = TokenizedCorpus(tmp_path / "x")
    assert len(corpus) == 20
    for number in reversed(range(20)):
        name, _, tokens = DOCUMENTS[number]
        assert corpus.document_id(number) == name
        assert corpus.tokens(number).dtype == np.int32
        np.testing.assert_array_equal(corpus.tokens(number), tokens)
        assert corpus.text(number) is None
    assert corpus.keys().tolist() == [key for _, key, _ in DOCUMENTS]
    assert corpus.tokenizer_fingerprint() == "t"
    assert corpus.fingerprint() == "s-t"
    assert np.load(tmp_path / "x" / "00000.tokens.npy").dtype == dtype


def test_documents_without_tokens(tmp_path):
    save(tmp_path / "x", [("a", 1, np.zeros(0, np.int32))])
    assert TokenizedCorpus(tmp_path / "x").tokens(0).tolist() == []


def test_nothing_is_left_half_written(tmp_path):
    def broken():
        yield DOCUMENTS[1]
        raise DataError("the second document is bad")

    with pytest.raises(DataError, match="second"):
        save(tmp_path / "x", broken(), shard_tokens=1)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match="no document"):
        save(tmp_path / "x", [])
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept(tmp_path):
    (tmp_path / "x").mkdir()
    save(tmp_path / "x")
    with pytest.raises(DataError, match="exists already"):
        save(tmp_path / "x", [])
    assert len(TokenizedCorpus(tmp_path / "x")) == 20


def test_damaged_folders(tmp_path):
    save(tmp_path / "x")
    shard = tmp_path / "x" / "00000.offsets.npy"
    content = shard.read_bytes()
    shard.write_bytes(content[:-8])
    with pytest.raises(DataError, match="shard 0, is damaged"):
        TokenizedCorpus(tmp_path / "x")
    shard.unlink()
    with pytest.raises(DataError, match="is not whole"):
        TokenizedCorpus(tmp_path / "x")
    (tmp_path / "x" / INDEX).write_text(json.dumps({"format": "lm.tokenized.99"}))
    with pytest.raises(DataError, match="format"):
        TokenizedCorpus(tmp_path / "x")
