"""Every setting that cannot work has its sentence, and the settings themselves import no jax."""

import dataclasses
import subprocess
import sys

import pytest

from lm.config import field_help, from_json, override, to_json
from lm.data import Bytes, DataConfig, Files, HuggingFace, Saved, SentencePiece, StandardLibrary, Tokenized


def test_the_defaults_work():
    assert DataConfig().problems() == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sequence_length": 0}, "data.sequence_length is 0, it must be 1 or more"),
        ({"encoder_length": 0}, "data.encoder_length is 0"),
        ({"window": 0}, "data.window is 0"),
        ({"shuffle_rows": 0}, "data.shuffle_rows is 0"),
        ({"num_epochs": 0}, "data.num_epochs is 0"),
        ({"seed": -1}, "data.seed is -1, it must be 0 or more"),
        ({"prefetch": -1}, "data.prefetch is -1"),
        ({"num_workers": 1, "prefetch": 0}, "data.num_workers needs data.prefetch"),
        ({"cache_megabytes": -1}, "data.cache_megabytes is -1"),
        ({"validation_fraction": 1.5}, "data.validation_fraction is 1.5"),
        ({"sources": ()}, "data.sources is empty"),
        ({"source": "no/such/file"}, "no/such/file: no such file"),
        ({"sources": (StandardLibrary(weight=0.0),)}, "each must be more than 0"),
        ({"sources": (StandardLibrary(weight=2.0), StandardLibrary()), "num_epochs": 1}, "clashes with the weights"),
        ({"tokenizer": SentencePiece(vocab_size=10)}, "data.tokenizer.vocab_size is 10"),
        ({"tokenizer": HuggingFace()}, "data.tokenizer.path"),
        ({"tokenizer": Saved()}, "data.tokenizer.directory"),
        ({"sources": (Tokenized(directory="none"),)}, "none: no tokenized.json"),
    ],
)
def test_problems(fields, message):
    problems = DataConfig(**fields).problems()
    assert any(message in problem for problem in problems), problems
    assert all("\n" not in problem for problem in problems)


def test_the_command_line_reaches_every_choice(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    config = override(DataConfig(), {"source": str(tmp_path / "*.txt"), "text_field": "body", "errors": "replace"})
    assert config.chosen_sources == (Files(paths=(str(tmp_path / "*.txt"),), text_field="body", errors="replace"),)
    assert config.problems() == []
    for choice in (Bytes(), SentencePiece(), HuggingFace(), Saved()):
        config = override(DataConfig(), {"tokenizer": type(choice).__name__})
        assert config.tokenizer == choice
    config = override(DataConfig(), {"tokenizer": "SentencePiece", "tokenizer.vocab_size": "500"})
    assert config.tokenizer == SentencePiece(vocab_size=500)


def test_saved_and_loaded():
    config = DataConfig(
        sources=(Files(paths=("a", "b"), weight=2.0), StandardLibrary(), Tokenized(directory="d")),
        tokenizer=SentencePiece(model_type="unigram"),
        num_epochs=3,
    )
    assert from_json(DataConfig, to_json(config)) == config


def test_every_field_is_documented():
    for cls in (DataConfig, Files, StandardLibrary, Tokenized, Bytes, SentencePiece, HuggingFace, Saved):
        for field in dataclasses.fields(cls):
            assert field_help(cls).get(field.name, "").endswith("."), f"{cls.__name__}.{field.name}"


def test_no_jax_until_the_first_batch():
    program = (
        "import sys; from lm.data import *; DataConfig().problems(); fingerprint(DataConfig()); "
        "sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
