"""Tokenizers of other projects: a `tokenizer.json` read by the package `tokenizers`.

Owns how special tokens and the bytes of each id are found in a file that we did not write. Knows no
source and no objective. Law: it encodes as `tokenizers` does without special tokens; text that spells a
special token stays text. Byte-level files lose nothing; for WordPiece and other lossy ones `token_bytes` is
the piece's own bytes.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lm.batch import SpecialTokens
from lm.data import tokenizers as own
from lm.data.formats import DataError

FILE = "tokenizer.json"
# With full-width bars and SentencePiece's spaces.
DEEPSEEK = "<\uff5c{}\u2581of\u2581sentence\uff5c>"
# Names under which published tokenizers carry each special token, the first found wins.
NAMES = {
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|endoftext|>"),
    "bos": ("<s>", "<bos>", "[BOS]", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>", DEEPSEEK.format("begin")),
    "eos": ("</s>", "<eos>", "[EOS]", "<|end_of_text|>", "<|endoftext|>", DEEPSEEK.format("end")),
    "unk": ("<unk>", "[UNK]"),
    "mask": ("<mask>", "[MASK]"),
    "cls": ("[CLS]", "<cls>"),
    "sep": ("[SEP]", "<sep>"),
    "sop": ("<|startofpiece|>", "<sop>"),
    "eop": ("<|endofpiece|>", "<eop>"),
}
# A table of all ids is made: a damaged file must not fill the memory.
_MOST_IDS = 1 << 24
FIM = (
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
)


def _byte_of_character() -> dict[str, int]:
    """Returns GPT-2's table from printable characters to bytes (Radford et al. 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(others)}


def _types(node: Any) -> Iterator[str]:
    """Yields the `type` of every component below a node of the file."""
    if isinstance(node, dict):
        if isinstance(node.get("type"), str):
            yield node["type"]
        for value in node.values():
            yield from _types(value)
    elif isinstance(node, list):
        for value in node:
            yield from _types(value)


class _Content:
    """The bytes that a piece stands for, by what the file's decoder says it does."""

    def __init__(self, description: dict[str, Any]) -> None:
        parts = {name: set(_types(description.get(name))) for name in ("pre_tokenizer", "decoder", "model")}
        self._bytes = _byte_of_character() if "ByteLevel" in parts["pre_tokenizer"] | parts["decoder"] else None
        self._continuation = (description["model"].get("continuing_subword_prefix") or "").encode()
        self._byte_fallback = bool(description["model"].get("byte_fallback"))

    def __call__(self, piece: str) -> bytes:
        if self._bytes is not None:
            return bytes(self._bytes[character] for character in piece if character in self._bytes)
        if self._byte_fallback and len(piece) == 6 and piece.startswith("<0x"):
            return bytes([int(piece[3:5], 16)])
        raw = piece.replace("\u2581", " ").encode()
        return raw.removeprefix(self._continuation)


def _find_specials(ids: dict[str, int]) -> SpecialTokens:
    found: dict[str, Any] = {}
    for field, names in NAMES.items():
        found[field] = next((ids[name] for name in names if name in ids), None)
    if found["mask"] is not None and found["cls"] is None and found["sep"] is None:
        # RoBERTa's kind frames an encoder's text by <s> and </s>.
        found["cls"], found["sep"] = found["bos"], found["eos"]
    if found["pad"] is None:
        # Validity is said by segment ids and weights, so any id can fill.
        found["pad"] = 0
    fim = next((names for names in FIM if all(name in ids for name in names)), ())
    sentinels: list[int] = []
    while (name := f"<extra_id_{len(sentinels)}>") in ids:
        sentinels.append(ids[name])
    if sentinels and found["bos"] is None and found["eos"] is not None:
        # T5's decoder starts with pad, the only one that it has for that.
        found["bos"] = found["pad"]
    return SpecialTokens(**found, fim=tuple(ids[name] for name in fim), sentinels=tuple(sentinels))


class HuggingFaceTokenizer:
    """A tokenizer of the package `tokenizers`; special tokens it lacks are None.

    Args:
      content: the text of a tokenizer.json.
    """

    def __init__(self, content: str) -> None:
        try:
            import tokenizers
        except ImportError:
            raise DataError("a tokenizer.json needs the package tokenizers: pip install tokenizers") from None
        self._file = content
        self._tokenizer = tokenizers.Tokenizer.from_str(content)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Text that spells a special token must not become one.
        self._tokenizer.encode_special_tokens = True
        description = json.loads(content)
        special = {token["id"]: token["content"] for token in description["added_tokens"] if token["special"]}
        added = {token["id"]: token["content"] for token in description["added_tokens"]}
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        if max(ids.values()) >= _MOST_IDS:
            raise ValueError(f"it has the id {max(ids.values())}, beyond any vocabulary")
        # A character that is in no vocabulary: without an id for what is unknown it would fail in the middle of a run.
        self.encode("\U0010fffd")
        content_of = _Content(description)
        pieces = [b""] * (max(ids.values()) + 1)
        for piece, number in ids.items():
            if number not in special:
                pieces[number] = added[number].encode() if number in added else content_of(piece)
        self._table = own.PieceTable(pieces, special)
        self.specials = _find_specials(ids)
        self.size = len(self._table)
        self.token_bytes = self._table.token_bytes
        self.starts_word = self._starts_word(ids, description)
        self.pieces = self._table.pieces
        self.fingerprint = hashlib.blake2b(content.encode(), digest_size=16).hexdigest()

    def _starts_word(self, ids: dict[str, int], description: dict[str, Any]) -> np.ndarray:
        prefix = description["model"].get("continuing_subword_prefix")
        if not prefix:
            return self._table.starts_word
        starts = np.zeros(self.size, np.bool_)
        for piece, number in ids.items():
            starts[number] = self.token_bytes[number] > 0 and not piece.startswith(prefix)
        return starts

    def __reduce__(self) -> tuple[Any, ...]:
        return HuggingFaceTokenizer, (self._file,)

    def encode(self, text: str) -> np.ndarray:
        """Returns i32[N], the ids of `text`, without special tokens."""
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of `ids` by the file's own decoder; special tokens are shown by their names."""
        return self._tokenizer.decode([int(number) for number in ids], skip_special_tokens=False)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes the tokenizer.json as it was read, and the description."""
        own.write_file(directory, FILE, self._file.encode())
        own.write_description(directory, "hugging_face", {"file": FILE})


def read(file: pathlib.Path) -> HuggingFaceTokenizer:
    """Reads a tokenizer.json.

    Raises:
      DataError: the file cannot be read or is no tokenizer.
    """
    try:
        return HuggingFaceTokenizer(file.read_text(encoding="utf-8"))
    except DataError:
        raise
    except Exception as error:  # `tokenizers` raises bare Exception
        raise DataError(f"{file} is not a tokenizer.json: {error}") from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class HuggingFace:
    """A tokenizer of another project, from its tokenizer.json.

    Attributes:
      path: the tokenizer.json, or a folder that holds one.
    """

    path: str = ""

    @property
    def _file(self) -> pathlib.Path:
        path = pathlib.Path(self.path)
        return path / FILE if path.is_dir() else path

    def problems(self) -> list[str]:
        """Returns one sentence for each reason why this cannot work."""
        return [] if self._file.is_file() else [f"data.tokenizer.path: {self._file} does not exist"]

    @property
    def known(self) -> tuple[int, SpecialTokens] | None:
        """Nothing before the file is read."""
        return None

    def build(self, text: own.TrainingText) -> HuggingFaceTokenizer:
        """Returns the tokenizer; the text is not looked at.

        Raises:
          DataError: the file cannot be read or is no tokenizer.
        """
        del text
        return read(self._file)
