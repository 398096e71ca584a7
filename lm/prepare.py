"""Prepares text for training: python -m lm.prepare --input='texts/**/*.txt' --output=tokenizer --vocab_size=8192

Trains a tokenizer on files (or, without --input, on Python's own standard library). With --tokenize it also
writes the tokenised corpus; a run reads it with --config.data.source=OUTPUT --config.data.tokenizer=Saved
--config.data.tokenizer.directory=OUTPUT/tokenizer. --inspect=TOKENIZER --text='...' shows what a tokenizer does.
"""

import dataclasses

from absl import flags

from lm import flags as program
from lm.config import ConfigError
from lm.data import Bytes, DataConfig, Saved, SentencePiece, preparation, tokenizers
from lm.objectives import Causal

_INPUT = flags.DEFINE_string("input", "", "Files, folders and globs, comma-separated; empty: the standard library.")
_OUTPUT = flags.DEFINE_string("output", None, "New folder for the tokenizer or the tokenised corpus.")
_TEXT_FIELD = flags.DEFINE_string("text_field", "text", "Field or column that holds the text.")
_ERRORS = flags.DEFINE_enum("errors", "strict", ["strict", "replace"], "What to do with invalid UTF-8.")
_VALIDATION = flags.DEFINE_float("validation_fraction", 0.05, "Share of the documents a tokenizer must not see.")
_MODEL_TYPE = flags.DEFINE_enum("model_type", "bpe", ["bpe", "unigram", "byte"], "Kind of tokenizer to train.")
_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 8192, "Number of ids, special ones and bytes included.")
_NUM_SENTINELS = flags.DEFINE_integer("num_sentinels", 100, "Ids reserved for corrupted spans.")
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "Folder of a tokenizer to use instead of training one.")
_TOKENIZE = flags.DEFINE_bool("tokenize", False, "Writes the tokenised corpus.")
_NUM_WORKERS = flags.DEFINE_integer("num_workers", 0, "Processes that tokenise; 0 is this one.", lower_bound=0)
_SHOW_ROWS = flags.DEFINE_integer("show_rows", 2, "Rows of --tokenize to show, decoded.", lower_bound=0)
_SEQUENCE_LENGTH = flags.DEFINE_integer("sequence_length", 256, "Positions in the rows shown.", lower_bound=1)
_INSPECT = flags.DEFINE_string("inspect", None, "Folder of a tokenizer to show.")
_TEXT = flags.DEFINE_string("text", "", "Text to show it with.")


def _config() -> DataConfig:
    choice = SentencePiece(
        vocab_size=_VOCAB_SIZE.value,
        model_type="unigram" if _MODEL_TYPE.value == "unigram" else "bpe",
        num_sentinels=_NUM_SENTINELS.value,
    )
    config = DataConfig(
        source=_INPUT.value,
        text_field=_TEXT_FIELD.value,
        errors="replace" if _ERRORS.value == "replace" else "strict",
        validation_fraction=_VALIDATION.value,
        tokenizer=Bytes(num_sentinels=_NUM_SENTINELS.value) if _MODEL_TYPE.value == "byte" else choice,
        sequence_length=_SEQUENCE_LENGTH.value,
    )
    return dataclasses.replace(config, tokenizer=Saved(directory=_TOKENIZER.value)) if _TOKENIZER.value else config


def main(_: list[str]) -> None:
    """Does what the flags say."""
    if _INSPECT.value is not None:
        print("\n".join(preparation.describe_tokenizer(tokenizers.load(_INSPECT.value), _TEXT.value)))
        return
    config = _config()
    output = program.folder(_OUTPUT.value, "--output", " for what is made, or --inspect=TOKENIZER to look at one")
    if problems := config.problems():
        shown = [problem.replace("data.tokenizer.", "--").replace("data.source:", "--input:") for problem in problems]
        raise ConfigError("\n".join(shown))
    if not _TOKENIZE.value:
        tokenizer = preparation.train_tokenizer(config, output)
        print("\n".join([f"wrote {output}", *preparation.describe_tokenizer(tokenizer, _TEXT.value)]))
        return
    print(preparation.tokenize(config, None, output, _NUM_WORKERS.value))
    if _SHOW_ROWS.value:
        tokenizer = tokenizers.load(f"{output}/{preparation.TOKENIZER_FOLDER}")
        shown = dataclasses.replace(config, source=output)
        print("\n".join(preparation.describe_rows(shown, Causal(), tokenizer, _SHOW_ROWS.value)))


if __name__ == "__main__":
    program.run(main)
