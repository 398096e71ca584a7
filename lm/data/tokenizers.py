"""Tokenizers that lose nothing: bytes, and SentencePiece trained on the user's text; their choice and storage.

Owns which ids are special, the trained classes, and their files. Knows no source and no objective.
Laws: the bytes of a text's tokens, joined, are its UTF-8 bytes exactly (newlines and runs of spaces
included), so the sum of `token_bytes` over a document is its length in bytes; no text ever encodes to a
special id; training is deterministic; `load(save(x))` encodes as `x` does.
"""

import dataclasses
import hashlib
import io
import json
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from lm.batch import SpecialTokens
from lm.data.formats import DataError
from lm.document import Vocabulary

DESCRIPTION = "vocabulary.json"
FORMAT = "lm.vocabulary.1"
MODEL = "sentencepiece.model"
# More than any vocabulary has ids: a damaged description must not fill the memory.
_MOST_SENTINELS = 1 << 20
# SentencePiece writes a space as this sign; the sign itself in a text goes by its three bytes.
_SPACE_SIGN = "\u2581"
_WHITESPACE = b" \t\n\r\v\f"
_NAMES = ("<pad>", "<s>", "</s>", "<unk>", "<mask>", "<cls>", "<sep>", "<mode_r>", "<mode_s>", "<mode_x>")
_NAMES += ("<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<sop>", "<eop>")


class Tokenizer(Vocabulary, Protocol):
    """A vocabulary that can be stored and told from another one."""

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides how it encodes."""
        ...

    def pieces(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """Returns what each id stands for, for a reader."""
        ...

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes the files that `load` reads; the description comes last, under its final name at once."""
        ...


class TrainingText(Protocol):
    """Text to train a tokenizer on."""

    def sample(self, num_bytes: int) -> Iterator[str]:
        """Yields documents, the same in every run, until they have `num_bytes` bytes."""
        ...


def special_names(num_sentinels: int) -> tuple[str, ...]:
    """Returns the names of the special ids 0, 1, 2, ... of our own tokenizers."""
    return _NAMES + tuple(f"<extra_id_{number}>" for number in range(num_sentinels))


def special_tokens(num_sentinels: int) -> SpecialTokens:
    """Returns the special ids of our own tokenizers, in the order of `special_names`."""
    sentinels = tuple(range(len(_NAMES), len(_NAMES) + num_sentinels))
    first = {name: number for number, name in enumerate(("pad", "bos", "eos", "unk", "mask", "cls", "sep"))}
    return SpecialTokens(**first, modes=(7, 8, 9), fim=(10, 11, 12), sop=13, eop=14, sentinels=sentinels)


def write_file(directory: str | os.PathLike[str], name: str, content: bytes) -> None:
    """Writes a file under a temporary name and renames it, so that it is never seen half-written."""
    folder = pathlib.Path(directory)
    partial = folder / f".{name}.partial-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        os.replace(partial, folder / name)
    except OSError as error:
        raise DataError(f"{folder / name} cannot be written: {error.strerror}") from None


def write_description(directory: str | os.PathLike[str], kind: str, settings: dict[str, Any]) -> None:
    """Writes the description that says which class `load` builds, with its settings."""
    content = json.dumps({"format": FORMAT, "kind": kind, **settings}, indent=1) + "\n"
    write_file(directory, DESCRIPTION, content.encode())


class PieceTable:
    """What each id stands for: the bytes of text, or the name of a special id. Shared by all tokenizers."""

    def __init__(self, content: Sequence[bytes], names: dict[int, str]) -> None:
        self._shown = [names[number].encode() if number in names else raw for number, raw in enumerate(content)]
        self.token_bytes = np.asarray([len(raw) for raw in content], np.int32)
        self.starts_word = np.asarray([raw[:1] != b"" and raw[:1] in _WHITESPACE for raw in content])

    def __len__(self) -> int:
        return len(self._shown)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of ids; bytes that form no character are shown as U+FFFD."""
        return b"".join([self._shown[number] for number in ids]).decode("utf-8", "replace")

    def pieces(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """Returns what each id stands for; a part of a character is shown as its bytes."""
        shown = []
        for number in ids:
            try:
                shown.append(self._shown[number].decode())
            except UnicodeDecodeError:
                shown.append("".join(f"<0x{byte:02X}>" for byte in self._shown[number]))
        return shown


class ByteTokenizer:
    """One id for each byte of UTF-8, after the special ids. Needs no training."""

    def __init__(self, num_sentinels: int) -> None:
        names = special_names(num_sentinels)
        self._num_sentinels, self._first = num_sentinels, len(names)
        content = [b""] * len(names) + [bytes([byte]) for byte in range(256)]
        self._table = PieceTable(content, dict(enumerate(names)))
        self.specials = special_tokens(num_sentinels)
        self.size = len(self._table)
        self.token_bytes, self.starts_word = self._table.token_bytes, self._table.starts_word
        self.decode, self.pieces = self._table.decode, self._table.pieces
        self.fingerprint = hashlib.blake2b(f"bytes {num_sentinels}".encode(), digest_size=16).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """Returns i32[N], one id for each byte of `text`."""
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32) + np.int32(self._first)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes the description; there is nothing else to store."""
        write_description(directory, "bytes", {"num_sentinels": self._num_sentinels})


class SentencePieceTokenizer:
    """A SentencePiece model with identity normalisation and byte fallback (Kudo and Richardson 2018).

    Args:
      model: the serialised model, as `train_sentencepiece` made it.
      num_sentinels: how many sentinels it was trained with.
    """

    def __init__(self, model: bytes, num_sentinels: int) -> None:
        import sentencepiece

        self._model, self._num_sentinels = model, num_sentinels
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        names = special_names(num_sentinels)
        content = [self._content(number, len(names)) for number in range(self._processor.get_piece_size())]
        self._space_sign = np.asarray([content.index(bytes([byte])) for byte in _SPACE_SIGN.encode()], np.int32)
        self._table = PieceTable(content, dict(enumerate(names)))
        self.specials = special_tokens(num_sentinels)
        self.size = len(self._table)
        self.token_bytes, self.starts_word = self._table.token_bytes, self._table.starts_word
        self.decode, self.pieces = self._table.decode, self._table.pieces
        self.fingerprint = hashlib.blake2b(model, digest_size=16).hexdigest()

    def _content(self, number: int, num_specials: int) -> bytes:
        if number < num_specials:
            return b""
        piece = self._processor.id_to_piece(number)
        if self._processor.is_byte(number):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(_SPACE_SIGN, " ").encode()

    def __reduce__(self) -> tuple[Any, ...]:
        return SentencePieceTokenizer, (self._model, self._num_sentinels)

    def encode(self, text: str) -> np.ndarray:
        """Returns i32[N], the ids of `text`, without special tokens."""
        parts = []
        for number, part in enumerate(text.split(_SPACE_SIGN)):
            if number:
                parts.append(self._space_sign)
            parts.append(np.asarray(self._processor.encode(part), np.int32))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes the model and the description."""
        write_file(directory, MODEL, self._model)
        write_description(directory, "sentencepiece", {"num_sentinels": self._num_sentinels})


def _sentences(texts: Iterator[str], most: int) -> Iterator[str]:
    """Yields the lines of documents, joined to at most `most` characters, without the signs SentencePiece reserves."""
    for text in texts:
        held, size = [], 0
        for line in text.splitlines(keepends=True):
            if size + len(line) > most and held:
                yield from filter(None, re.split(f"[\t\0{_SPACE_SIGN}]", "".join(held)))
                held, size = [], 0
            held.append(line)
            size += len(line)
        yield from filter(None, re.split(f"[\t\0{_SPACE_SIGN}]", "".join(held)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bytes:
    """One id for each byte of UTF-8 (ByT5, Xue et al. 2022); nothing to train.

    Attributes:
      num_sentinels: ids reserved for corrupted spans.
    """

    num_sentinels: int = 100

    def problems(self) -> list[str]:
        """Returns one sentence for each reason why this cannot work."""
        return _sentinel_problems(self.num_sentinels)

    @property
    def known(self) -> tuple[int, SpecialTokens] | None:
        """The number of ids and the special ones, where they are known before anything is read; else None."""
        if self.problems():  # as many names as a damaged config says might fill the memory
            return None
        return _num_special(self.num_sentinels) + 256, special_tokens(self.num_sentinels)

    def build(self, text: TrainingText) -> ByteTokenizer:
        """Returns the tokenizer; the text is not looked at."""
        del text
        return ByteTokenizer(self.num_sentinels)


def _num_special(num_sentinels: int) -> int:
    return len(_NAMES) + num_sentinels


def _sentinel_problems(num_sentinels: int) -> list[str]:
    if 0 <= num_sentinels <= _MOST_SENTINELS:
        return []
    return [f"data.tokenizer.num_sentinels is {num_sentinels}, it must be from 0 to {_MOST_SENTINELS}"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SentencePiece:
    """Subwords trained on the training text, with one id for every byte as the way out for rare characters.

    Attributes:
      vocab_size: number of ids, the special ones (15 and the sentinels) and the 256 bytes included.
      model_type: `bpe` (Sennrich et al. 2016) or `unigram` (Kudo 2018).
      num_sentinels: ids reserved for corrupted spans.
      character_coverage: share of the text's characters that get an id of their own; the rest go by bytes.
      training_megabytes: as much text is drawn from the corpus to train on.
    """

    vocab_size: int = 8192
    model_type: Literal["bpe", "unigram"] = "bpe"
    num_sentinels: int = 100
    character_coverage: float = 0.9995
    training_megabytes: int = 16

    def problems(self) -> list[str]:
        """Returns one sentence for each reason why this cannot work."""
        problems = _sentinel_problems(self.num_sentinels)
        least = _num_special(max(self.num_sentinels, 0)) + 256
        if self.vocab_size <= least:
            problems.append(
                f"data.tokenizer.vocab_size is {self.vocab_size}, but special ids and bytes alone take {least}: "
                "set it higher, or num_sentinels lower"
            )
        if not 0 < self.character_coverage <= 1:
            problems.append(f"data.tokenizer.character_coverage is {self.character_coverage}, it must be in (0, 1]")
        if self.training_megabytes < 1:
            problems.append(f"data.tokenizer.training_megabytes is {self.training_megabytes}, it must be 1 or more")
        return problems

    @property
    def known(self) -> tuple[int, SpecialTokens] | None:
        """The number of ids and the special ones, where they are known before anything is read; else None."""
        return None if self.problems() else (self.vocab_size, special_tokens(self.num_sentinels))

    def build(self, text: TrainingText) -> SentencePieceTokenizer:
        """Trains a tokenizer.

        Raises:
          DataError: there is no text, or it supports fewer pieces than `vocab_size` (says how many).
        """
        import sentencepiece

        names = special_names(self.num_sentinels)
        written = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue] made by SWIG
                sentence_iterator=_sentences(text.sample(self.training_megabytes << 20), most=4096),
                model_writer=written,
                model_type=self.model_type,
                vocab_size=self.vocab_size,
                character_coverage=self.character_coverage,
                byte_fallback=True,
                # Without these three, runs of spaces, leading spaces and compatibility characters would change.
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                pad_id=0,
                bos_id=1,
                eos_id=2,
                unk_id=3,
                pad_piece=names[0],
                bos_piece=names[1],
                eos_piece=names[2],
                unk_piece=names[3],
                control_symbols=list(names[4:]),
                max_sentence_length=1 << 30,
                # The result of unigram depends on the number of threads, so it is not the machine's.
                num_threads=4,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise _explain(str(error), self.vocab_size) from None
        return SentencePieceTokenizer(written.getvalue(), self.num_sentinels)


def _explain(message: str, vocab_size: int) -> DataError:
    """Turns what SentencePiece says when training fails into our sentence."""
    if found := re.search(r"<= (\d+)\.", message):
        return DataError(
            f"data.tokenizer.vocab_size {vocab_size} is larger than the text supports: at most {found[1]}, or more text"
        )
    if found := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return DataError(
            f"data.tokenizer.vocab_size {vocab_size} is smaller than the text's characters need: at least {found[1]}, "
            "or lower character_coverage"
        )
    if "sentences_.empty()" in message:
        return DataError("there is no text to train a tokenizer on")
    return DataError(f"the tokenizer could not be trained: {message}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saved:
    """A tokenizer that `python -m lm.prepare` or another run stored.

    Attributes:
      directory: the folder that holds its vocabulary.json.
    """

    directory: str = ""

    def problems(self) -> list[str]:
        """Returns one sentence for each reason why this cannot work."""
        if not pathlib.Path(self.directory, DESCRIPTION).is_file():
            return [f"data.tokenizer.directory: {self.directory} has no {DESCRIPTION}: lm.prepare writes such a folder"]
        return []

    @property
    def known(self) -> tuple[int, SpecialTokens] | None:
        """Nothing before the file is read."""
        return None

    def build(self, text: TrainingText) -> Tokenizer:
        """Returns the stored tokenizer; the text is not looked at."""
        del text
        return load(self.directory)


def load(directory: str | os.PathLike[str]) -> Tokenizer:
    """Reads a tokenizer from its folder; raises `DataError` if it is not whole."""
    from lm.data import hugging_face

    folder = pathlib.Path(directory)
    readers = {
        "bytes": lambda found: ByteTokenizer(_num_sentinels(found)),
        "sentencepiece": lambda found: SentencePieceTokenizer((folder / MODEL).read_bytes(), _num_sentinels(found)),
        # Under the one name that `save` gives: a description must not lead out of its folder.
        "hugging_face": lambda _: hugging_face.read(folder / hugging_face.FILE),
    }
    try:
        found = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        return readers[found["kind"]](found)
    except (OSError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{folder} holds no whole tokenizer: {error}") from None


def _num_sentinels(found: dict[str, Any]) -> int:
    number = found["num_sentinels"]
    if type(number) is not int or not 0 <= number <= _MOST_SENTINELS:
        raise ValueError(f"num_sentinels is {number!r}, not a number from 0 to {_MOST_SENTINELS}")
    return number
