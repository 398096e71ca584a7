"""Ids, the split and the fingerprint depend on names and places only, and bad sources say so."""

import gzip
import json
import pathlib
import sys

import numpy as np
import pytest

from lm.data.formats import DataError
from lm.data.sources import Files, StandardLibrary, Tokenized, hash_keys, parse_source, split


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".txt").write_text(content)
    return str(folder)


def contents(corpus):
    return {corpus.document_id(index): corpus.text(index) for index in range(len(corpus))}


def test_the_standard_library():
    corpus = StandardLibrary().open()
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    ids = [corpus.document_id(index) for index in range(len(corpus))]
    assert len(set(ids)) == len(ids) > 500
    assert not [name for name in ids if "/test" in name or "site-packages" in name]
    assert f"{version}/json/decoder.py#0" in ids
    assert corpus.text(ids.index(f"{version}/json/decoder.py#0")) == pathlib.Path(json.decoder.__file__).read_text()
    assert sum(name.startswith(f"{version}/topics#") for name in ids) > 50
    assert sum(len(corpus.text(index)) for index in range(len(corpus))) > 5e6
    assert corpus.fingerprint() == StandardLibrary().open().fingerprint()


def test_folders_globs_and_several_at_once(tmp_path):
    write(tmp_path / "a", one="1", sub__two="2")
    write(tmp_path / "b", three="3")
    (tmp_path / "b" / "four.jsonl").write_text('{"text": "4"}\n{"text": "5"}\n')
    (tmp_path / "b" / "six.txt.gz").write_bytes(gzip.compress(b"6"))
    folder = contents(Files(paths=(str(tmp_path),)).open())
    assert folder == {
        "a/one.txt#0": "1",
        "a/sub/two.txt#0": "2",
        "b/four.jsonl#0": "4",
        "b/four.jsonl#1": "5",
        "b/six.txt.gz#0": "6",
        "b/three.txt#0": "3",
    }
    several = Files(paths=(f"{tmp_path}/a/**/*.txt", f"{tmp_path}/b", f"{tmp_path}/b/three.txt"))
    assert contents(several.open()) == folder


def test_the_same_data_elsewhere_have_the_same_ids_keys_and_fingerprint(tmp_path):
    first = Files(paths=(write(tmp_path / "x", one="1", two="2"),)).open()
    second = Files(paths=(write(tmp_path / "y" / "z", one="1", two="2"),)).open()
    assert contents(first) == contents(second)
    assert first.keys().tolist() == second.keys().tolist()
    assert first.fingerprint() == second.fingerprint()
    changed = Files(paths=(write(tmp_path / "w", one="1", two="3"),)).open()
    renamed = Files(paths=(write(tmp_path / "v", one="1", three="2"),)).open()
    assert len({corpus.fingerprint() for corpus in (first, changed, renamed)}) == 3


def test_the_split_is_a_share_and_does_not_depend_on_other_documents():
    keys = hash_keys("a", np.arange(20000))
    assert len(set(keys.tolist())) == 20000
    training, held_out = split(keys, 0.1)
    assert sorted([*training, *held_out]) == list(range(20000))
    assert abs(len(held_out) / 20000 - 0.1) < 0.01
    _, fewer = split(keys[:5000], 0.1)
    assert fewer.tolist() == [index for index in held_out if index < 5000]
    _, more = split(keys, 0.2)
    assert set(held_out) < set(more)


def test_the_split_of_very_few_documents():
    for count in range(2, 40):
        training, held_out = split(hash_keys("b", np.arange(count)), 0.999999)
        assert [len(training), len(held_out)] == [1, count - 1]
        training, held_out = split(hash_keys("b", np.arange(count)), 1e-9)
        assert len(held_out) == 1
        assert len(training) == count - 1
    assert [len(side) for side in split(hash_keys("b", np.arange(1)), 0.999)] == [1, 0]
    assert [len(side) for side in split(hash_keys("b", np.arange(10)), 0.0)] == [10, 0]
    assert [len(side) for side in split(hash_keys("b", np.arange(10)), 1.0)] == [0, 10]


def test_missing_and_empty_sources(tmp_path):
    missing = Files(paths=(str(tmp_path / "none*.txt"),))
    assert missing.problems() == [f"data.source: {tmp_path}/none*.txt: no such file, folder or match for a glob"]
    with pytest.raises(DataError, match="no such file"):
        missing.open()
    empty = Files(paths=(write(tmp_path / "empty", one="", two=""),))
    assert empty.problems() == []
    with pytest.raises(DataError, match=r"empty, there is no document in 2 file\(s\)"):
        empty.open()
    assert "Files has no paths" in Files().problems()[0]
    assert "tokenized.json" in Tokenized(directory=str(tmp_path)).problems()[0]


def test_a_binary_file_in_a_folder_is_named(tmp_path):
    folder = write(tmp_path / "mixed", one="text")
    (tmp_path / "mixed" / "image.png").write_bytes(b"\x89PNG\0\0")
    with pytest.raises(DataError, match=r"image\.png looks like a binary file.*glob"):
        Files(paths=(folder,)).open()
    assert len(Files(paths=(f"{folder}/*.txt",)).open()) == 1


def test_parsing_the_command_line():
    assert parse_source("a.txt, b/*.jsonl", "body", "replace") == (
        Files(paths=("a.txt", "b/*.jsonl"), text_field="body", errors="replace"),
    )
    assert parse_source(" ", "text", "strict")[0].problems()
