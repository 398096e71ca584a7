"""What lm.prepare makes: whole folders, corpora that give the same batches as their text, clear errors."""

import dataclasses
import itertools
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from lm.data import Bytes, DataConfig, DataError, Saved, SentencePiece, preparation, tokenizers
from lm.data import train_batches as open_training
from lm.data import validation_batches as open_validation
from tests.data.objective import Chunks, Copy

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.fixture
def config(tmp_path):
    texts = [f"document {number} says\n  " + "many words " * (number % 5) for number in range(80)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return DataConfig(
        source=str(tmp_path / "a.jsonl"),
        tokenizer=SentencePiece(vocab_size=300, num_sentinels=2),
        sequence_length=16,
        encoder_length=16,
        validation_fraction=0.2,
        prefetch=0,
    )


@pytest.mark.parametrize("opener", [open_training, open_validation])
def test_a_tokenised_corpus_gives_the_batches_of_its_text(config, tmp_path, opener):
    report = preparation.tokenize(config, None, str(tmp_path / "ids"))
    assert report.startswith("80 documents, ")
    saved = Saved(directory=str(tmp_path / "ids" / "tokenizer"))
    tokenizer = saved.build(None)
    ready = dataclasses.replace(config, source=str(tmp_path / "ids"), tokenizer=saved)
    assert ready.problems() == []
    of_text, of_ids = opener(config, Copy(), tokenizer, 2), opener(ready, Copy(), tokenizer, 2)
    for first, second in itertools.islice(zip(of_text, of_ids, strict=True), 6):
        for one, other in zip(first, second, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                np.testing.assert_array_equal(one, other)
        assert of_text.document_ids() == of_ids.document_ids()


def test_workers_write_the_same_files(config, tmp_path):
    tokenizer = Bytes().build(None)
    for number in (0, 2):
        preparation.tokenize(config, tokenizer, str(tmp_path / f"ids{number}"), num_workers=number)
    for path in (tmp_path / "ids0").glob("*.*"):
        assert path.read_bytes() == (tmp_path / "ids2" / path.name).read_bytes(), path.name
    with open(config.source, "a") as file:
        file.write("{bad\n")
    with pytest.raises(DataError, match=r"a\.jsonl:81 is not valid JSON"):
        preparation.tokenize(config, tokenizer, str(tmp_path / "bad"), num_workers=2)
    assert not (tmp_path / "bad").exists()


def test_another_tokenizer_is_refused(config, tmp_path):
    preparation.tokenize(config, Bytes().build(None), str(tmp_path / "ids"))
    ready = dataclasses.replace(config, source=str(tmp_path / "ids"), tokenizer=Bytes(num_sentinels=3))
    with pytest.raises(DataError, match="was tokenised by another tokenizer"):
        open_training(ready, Chunks(), Bytes(num_sentinels=3).build(None), 2)
    trained = dataclasses.replace(ready, tokenizer=SentencePiece())
    assert any("cannot be trained" in problem for problem in trained.problems())
    with pytest.raises(DataError, match="tokenised already"):
        preparation.tokenize(ready, Bytes().build(None), str(tmp_path / "again"))


def test_a_trained_tokenizer_is_whole_or_absent(config, tmp_path):
    tokenizer = preparation.train_tokenizer(config, str(tmp_path / "t"))
    assert tokenizers.load(tmp_path / "t").fingerprint == tokenizer.fingerprint
    with pytest.raises(DataError, match="exists already"):
        preparation.train_tokenizer(config, str(tmp_path / "t"))
    large = dataclasses.replace(config, tokenizer=SentencePiece(vocab_size=90000))
    with pytest.raises(DataError, match="larger than the text supports"):
        preparation.train_tokenizer(large, str(tmp_path / "large"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "t"]


def test_reports(config):
    tokenizer = Bytes(num_sentinels=5).build(None)
    lines = preparation.describe_tokenizer(tokenizer, "hé\n")
    assert lines[0].startswith("276 ids, 256 of them text, the longest 1 bytes")
    assert "sentinels 15 to 19" in lines[1]
    assert lines[3] == "pieces: 'h' '<0xC3>' '<0xA9>' '\\n'"
    assert lines[4] == "4 bytes in 4 tokens: 1.00 bytes per token"
    assert lines[5] == "round trip: exact"
    lines = preparation.describe_rows(config, Chunks(), tokenizer, 2)
    assert lines[0].startswith("row 0: ")
    assert any(line.startswith("  segment 1, ") and "from a.jsonl#" in line for line in lines)
    assert any("inputs  '<s>" in line for line in lines)


def prepare(*arguments):
    command = [sys.executable, "-m", "lm.prepare", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.system
def test_the_program(config, tmp_path):
    flags = [f"--input={config.source}", "--vocab_size=300", "--num_sentinels=2"]
    done = prepare(*flags, f"--output={tmp_path}/ids", "--tokenize", "--sequence_length=32")
    assert done.returncode == 0, done.stderr
    assert "80 documents" in done.stdout
    assert "row 1: " in done.stdout
    done = prepare(f"--inspect={tmp_path}/ids/tokenizer", "--text=many words")
    assert done.returncode == 0, done.stderr
    assert "round trip: exact" in done.stdout
    for wrong in (
        [*flags, f"--output={tmp_path}/ids"],
        [f"--inspect={tmp_path}/none"],
        ["--input=none", f"--output={tmp_path}/x"],
        flags,
    ):
        done = prepare(*wrong)
        assert done.returncode == 2
        assert done.stderr.startswith("prepare: ")
        assert done.stderr.count("\n") == 1
    assert not (tmp_path / "x").exists()
