"""A corpus tokenised ahead: shards of token ids with offsets, ids and keys, as plain .npy files.

Owns the format, its writer and its memory-mapped reader. Knows no tokenizer: it keeps the fingerprint of
the one that made the ids. Law: what is read is what was written, document by document, with the same ids
and keys (and so the same split) as the text had; a folder is whole or does not exist.
"""

import bisect
import contextlib
import functools
import itertools
import json
import os
import pathlib
import shutil
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from lm.data.formats import DataError, decode

INDEX = "tokenized.json"
FORMAT = "lm.tokenized.1"
SHARD_TOKENS = 1 << 26


def is_tokenized(directory: str | os.PathLike[str]) -> bool:
    """Returns whether a folder holds a corpus that was tokenised ahead."""
    # Unlike pathlib it takes a name that no file can have for what it is: not there.
    return os.path.isfile(os.path.join(directory, INDEX))


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Gives a temporary folder to fill, which gets the name `path` at the end, or vanishes on an error.

    Raises:
      DataError: `path` exists and is not empty, or its parent cannot be written.
    """
    target = pathlib.Path(path).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DataError(f"{target} exists already: name a new folder, or remove it")
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except OSError as error:
        raise DataError(f"{target} cannot be written: {error.strerror}") from None
    try:
        yield partial
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _offsets(lengths: Sequence[int]) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(np.asarray(lengths, np.int64))])


def _write_shard(directory: pathlib.Path, number: int, documents: list[tuple[str, int, np.ndarray]]) -> dict[str, Any]:
    names = [name.encode() for name, _, _ in documents]
    tokens = [ids for _, _, ids in documents]
    arrays = {
        "tokens": np.concatenate(tokens),
        "offsets": _offsets([len(ids) for ids in tokens]),
        "ids": np.frombuffer(b"".join(names), np.uint8),
        "id_offsets": _offsets([len(name) for name in names]),
        "keys": np.asarray([key for _, key, _ in documents], np.uint64),
    }
    for name, array in arrays.items():
        np.save(directory / f"{number:05d}.{name}.npy", array, allow_pickle=False)
    return {"documents": len(documents), "tokens": len(arrays["tokens"])}


def write(
    directory: pathlib.Path,
    documents: Iterable[tuple[str, int, np.ndarray]],
    vocabulary_size: int,
    fingerprints: dict[str, str],
    shard_tokens: int = SHARD_TOKENS,
) -> dict[str, Any]:
    """Writes documents (id, key, i32[N] token ids) as shards, and returns the index that describes them.

    Args:
      directory: an existing folder; the index is written last, so that a partial folder is never read.
      documents: in corpus order.
      vocabulary_size: ids are stored as uint16 where they fit.
      fingerprints: `tokenizer` and `source`, kept in the index.
      shard_tokens: a shard is closed when it has as many.

    Raises:
      DataError: there is no document.
    """
    dtype = np.uint16 if vocabulary_size <= 1 << 16 else np.uint32
    shards, held, count = [], [], 0
    for name, key, ids in documents:
        held.append((name, key, ids.astype(dtype)))
        count += len(ids)
        if count >= shard_tokens:
            shards.append(_write_shard(directory, len(shards), held))
            held, count = [], 0
    if held:
        shards.append(_write_shard(directory, len(shards), held))
    if not shards:
        raise DataError("there is no document to tokenise")
    index = {"format": FORMAT, "vocabulary_size": vocabulary_size, "fingerprints": fingerprints, "shards": shards}
    (directory / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    return index


class TokenizedCorpus:
    """Reads what `write` wrote; only the pages that are used come into memory."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._directory = pathlib.Path(directory)
        try:
            self._index = json.loads((self._directory / INDEX).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"{directory} is not whole: {error}; prepare it again") from None
        found = self._index.get("format") if isinstance(self._index, dict) else None
        if found != FORMAT:
            raise DataError(f"{directory}: format {found!r} is unknown, expected {FORMAT!r}")
        if not _describes_shards(self._index):
            raise DataError(f"{directory} is not whole: {INDEX} is damaged; prepare it again")
        sizes = [shard["documents"] for shard in self._index["shards"]]
        self._shards = [self._open_shard(number, size) for number, size in enumerate(sizes)]
        self._ends = list(itertools.accumulate(sizes))

    def _open_shard(self, number: int, size: int) -> dict[str, np.ndarray]:
        names = ("tokens", "offsets", "ids", "id_offsets", "keys")
        paths = {name: self._directory / f"{number:05d}.{name}.npy" for name in names}
        try:
            arrays = {name: _load(path) for name, path in paths.items()}
        except OSError as error:
            raise DataError(f"{self._directory} is not whole: {error}; prepare it again") from None
        except (ValueError, EOFError, MemoryError, SyntaxError, tokenize.TokenError) as error:
            # What NumPy raises, and the parser by which it reads a header.
            raise DataError(f"{self._directory}, shard {number}, is damaged: {error}; prepare it again") from None
        if not _fits(arrays, size):
            raise DataError(f"{self._directory}, shard {number}, is damaged: its arrays do not fit; prepare it again")
        return arrays

    def __len__(self) -> int:
        return self._ends[-1]

    def _slice(self, index: int, values: str, offsets: str) -> np.ndarray:
        shard = bisect.bisect_right(self._ends, index)
        number = index - (self._ends[shard - 1] if shard else 0)
        arrays = self._shards[shard]
        return arrays[values][arrays[offsets][number] : arrays[offsets][number + 1]]

    def document_id(self, index: int) -> str:
        """Returns the id that the document had as text."""
        raw = self._slice(index, "ids", "id_offsets").tobytes()
        return decode(raw, f"{self._directory}, id of document {index},", 0, "strict")

    def keys(self) -> np.ndarray:
        """Returns u64[N], the hash of each document's id."""
        return np.concatenate([shard["keys"] for shard in self._shards])

    def text(self, index: int) -> None:
        """Returns None: only the tokens were kept."""

    def tokens(self, index: int) -> np.ndarray:
        """Returns i32[N], the ids of a document."""
        return self._slice(index, "tokens", "offsets").astype(np.int32)

    def tokenizer_fingerprint(self) -> str:
        """Returns the fingerprint of the tokenizer that made the ids."""
        return self._index["fingerprints"]["tokenizer"]

    @functools.cached_property
    def _fingerprint(self) -> str:
        return "-".join(self._index["fingerprints"][name] for name in ("source", "tokenizer"))

    def fingerprint(self) -> str:
        """Returns the fingerprints of the text and of the tokenizer, joined."""
        return self._fingerprint


def _describes_shards(index: dict[str, Any]) -> bool:
    """Whether an index has what the reader needs of it."""
    shards, prints = index.get("shards"), index.get("fingerprints")
    if not isinstance(shards, list) or not shards or not isinstance(prints, dict):
        return False
    sizes = [shard.get("documents") if isinstance(shard, dict) else None for shard in shards]
    named = all(isinstance(prints.get(name), str) for name in ("source", "tokenizer"))
    return named and all(type(size) is int and size > 0 for size in sizes)


def _fits(arrays: dict[str, np.ndarray], size: int) -> bool:
    """Whether the arrays of a shard have the dtypes and lengths of `size` documents."""
    kinds = {"tokens": "u", "offsets": "i", "ids": "u", "id_offsets": "i", "keys": "u"}
    if any(array.ndim != 1 or array.dtype.kind != kinds[name] for name, array in arrays.items()):
        return False
    offsets, id_offsets = arrays["offsets"], arrays["id_offsets"]
    if not len(offsets) == len(id_offsets) == size + 1 == len(arrays["keys"]) + 1:
        return False
    return int(offsets[-1]) == len(arrays["tokens"]) and int(id_offsets[-1]) == arrays["ids"].nbytes


def _load(path: pathlib.Path) -> np.ndarray:
    # NumPy cannot map an array without elements.
    empty = np.load(path, mmap_mode=None, allow_pickle=False) if path.stat().st_size <= 128 else None
    return empty if empty is not None else np.load(path, mmap_mode="r", allow_pickle=False)
