"""Where text comes from: the default corpus, the user's files, and what `lm.prepare` tokenised ahead.

Owns the choice of a source, its numbered documents with stable ids, the split into training and
validation, and the fingerprint of a corpus. Knows no tokenizer's inside, no objective and no order.
Law: a document's id and its side of the split depend on its file's name and its place in the file only,
never on how the corpus is read.
"""

import bisect
import dataclasses
import glob
import hashlib
import itertools
import os
import pathlib
import sys
import sysconfig
import tokenize
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from lm.data import formats, tokenized
from lm.data.formats import DataError, Errors

# Of a file longer than this, evenly spaced blocks are hashed for the fingerprint instead of all of it.
_WHOLE_HASH_BYTES = 1 << 26
_BLOCK_BYTES = 1 << 20
# Longer ones are no paths on any system, and a glob's time grows with the square.
_LONGEST_PATH = 4096
_PASSED_OVER = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
# These describe the machine on which Python was built.
_OF_THE_MACHINE = ("config-", "_sysconfigdata")


class Corpus(Protocol):
    """Numbered documents, readable in any order."""

    def __len__(self) -> int:
        """Number of documents."""
        ...

    def document_id(self, index: int) -> str:
        """Returns the id of a document, unique within the corpus and the same in every run."""
        ...

    def keys(self) -> np.ndarray:
        """Returns u64[N], the hash of each document's id: it decides the split."""
        ...

    def text(self, index: int) -> str | None:
        """Returns the text of a document, None for a corpus that was tokenised ahead."""
        ...

    def tokens(self, index: int) -> np.ndarray | None:
        """Returns i32[N], the ids of a document that was tokenised ahead, None for text."""
        ...

    def tokenizer_fingerprint(self) -> str | None:
        """Returns the fingerprint of the tokenizer that made `tokens`, None for text."""
        ...

    def fingerprint(self) -> str:
        """Returns a hash over names, sizes and contents."""
        ...


def hash_keys(name: str, numbers: np.ndarray) -> np.ndarray:
    """Returns u64[N], one well-mixed hash for each (name, number): blake2b of the name, then splitmix64."""
    base = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    with np.errstate(over="ignore"):
        mixed = np.uint64(base) + (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))


def split(keys: np.ndarray, validation_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns i64[N], i64[M]: the training and the validation documents of a corpus, in corpus order.

    A document is held out if its key is in the lowest `validation_fraction` of all possible keys. So that
    a small corpus has both sides, the one with the lowest key always is, and the one with the highest never;
    a single document is trained on. With 0.0 none is held out, with 1.0 all are.
    """
    held_out = keys.astype(np.float64) < validation_fraction * 2.0**64
    if 0 < validation_fraction < 1 and len(keys):
        held_out[np.argmin(keys)] = True
        held_out[np.argmax(keys)] = False
    elif validation_fraction == 1:
        held_out[:] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


class TextCorpus:
    """Documents of several opened files, one after another; ids are `name#number`."""

    def __init__(self, names: Sequence[str], texts: Sequence[formats.Texts], paths: Sequence[str]) -> None:
        self._names, self._texts, self._paths = names, texts, paths
        self._ends = list(itertools.accumulate(len(one) for one in texts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _locate(self, index: int) -> tuple[int, int]:
        file = bisect.bisect_right(self._ends, index)
        return file, index - (self._ends[file - 1] if file else 0)

    def document_id(self, index: int) -> str:
        """Returns `name#number` of a document."""
        file, number = self._locate(index)
        return f"{self._names[file]}#{number}"

    def keys(self) -> np.ndarray:
        """Returns u64[N], the hash of each document's id."""
        hashes = [hash_keys(name, np.arange(len(texts))) for name, texts in zip(self._names, self._texts, strict=True)]
        return np.concatenate(hashes) if hashes else np.zeros(0, np.uint64)

    def text(self, index: int) -> str:
        """Returns the text of a document."""
        file, number = self._locate(index)
        return self._texts[file][number]

    def tokens(self, index: int) -> None:
        """Returns None: this corpus is text."""

    def tokenizer_fingerprint(self) -> None:
        """Returns None: this corpus is text."""

    def fingerprint(self) -> str:
        """Returns a hash over names, sizes and contents."""
        digest = hashlib.blake2b(digest_size=16)
        for name, path in zip(self._names, self._paths, strict=True):
            digest.update(f"{name}\0{pathlib.Path(path).stat().st_size}\0".encode())
            digest.update(_hash_file(path))
        return digest.hexdigest()


def _hash_file(path: str) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    size = pathlib.Path(path).stat().st_size
    with open(path, "rb") as file:
        if size <= _WHOLE_HASH_BYTES:
            digest.update(file.read())
        else:
            for start in np.linspace(0, size - _BLOCK_BYTES, _WHOLE_HASH_BYTES // _BLOCK_BYTES, dtype=np.int64):
                file.seek(int(start))
                digest.update(file.read(_BLOCK_BYTES))
    return digest.digest()


class _Module:
    """One Python source file as one text."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> str:
        # The file says its own encoding (PEP 263).
        with tokenize.open(self._path) as file:
            return file.read()


class _Topics:
    """The chapters of the language reference that `help()` shows."""

    def __init__(self) -> None:
        from pydoc_data.topics import topics

        self._texts = [text for _, text in sorted(topics.items())]

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> str:
        return self._texts[index]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StandardLibrary:
    """Real text that every machine has: Python's own library (one document a module, no tests) and its manual.

    About 13 MB of source with docstrings and 0.5 MB of English prose. It differs between Python versions;
    the fingerprint in the run's record says which one was read.

    Attributes:
      weight: share of the rows that this source gives, relative to the other sources.
    """

    weight: float = 1.0

    def problems(self) -> list[str]:
        """Returns one sentence for each reason why this source cannot be read."""
        return (
            [] if self._root.is_dir() else [f"data.sources: {self._root} has no standard library: name files instead"]
        )

    @property
    def _root(self) -> pathlib.Path:
        return pathlib.Path(sysconfig.get_paths()["stdlib"])

    def open(self) -> TextCorpus:
        """Opens the corpus."""
        topics_file = self._root / "pydoc_data" / "topics.py"
        modules = []
        for folder, folders, files in os.walk(self._root):
            folders[:] = sorted(name for name in set(folders) - _PASSED_OVER if not name.startswith(_OF_THE_MACHINE))
            names = sorted(name for name in files if name.endswith(".py") and not name.startswith(_OF_THE_MACHINE))
            modules += [pathlib.Path(folder, name) for name in names]
        modules = [path for path in modules if path != topics_file and path.stat().st_size]
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        names = [f"python{version}/{path.relative_to(self._root).as_posix()}" for path in modules]
        texts: list[formats.Texts] = [_Module(str(path)) for path in modules]
        return TextCorpus(
            [*names, f"python{version}/topics"], [*texts, _Topics()], [*map(str, modules), str(topics_file)]
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Files:
    """The user's own files: plain text, JSONL, Parquet, ArrayRecord, and .gz or .zst of the first two.

    A JSON line, Parquet row or record is one document. A text file is one document, or several of about
    16 KiB that end at line ends. The suffix decides how a file is read; an unknown one is plain text.

    Attributes:
      paths: files, folders (all files below them) and globs (`**` goes down folders).
      text_field: field or column that holds the text, for JSONL and Parquet.
      errors: `strict` stops at invalid UTF-8, `replace` reads each bad byte as U+FFFD.
      weight: share of the rows that this source gives, relative to the other sources.
    """

    paths: tuple[str, ...] = ()
    text_field: str = "text"
    errors: Errors = "strict"
    weight: float = 1.0

    def problems(self) -> list[str]:
        """Returns one sentence for each reason why this source cannot be read."""
        try:
            self._find()
        except DataError as error:
            return [f"data.source: {error}"]
        return []

    def _find(self) -> list[str]:
        found: set[str] = set()
        for pattern in self.paths:
            if len(pattern) > _LONGEST_PATH:
                raise DataError(f"{pattern[:80]}...: {len(pattern)} characters are no path")
            if "\0" in pattern:
                raise DataError(f"{pattern!r}: no path has a zero byte")
            # Unlike pathlib's, it leaves the home of nobody as it is.
            path = pathlib.Path(os.path.expanduser(pattern))
            # Unlike pathlib, these take a name that no file can have for what it is: not there.
            if os.path.isdir(path):
                matches = glob.glob(f"{glob.escape(str(path))}/**", recursive=True)
            else:
                matches = [str(path)] if os.path.exists(path) else glob.glob(str(path), recursive=True)
            matches = [match for match in matches if pathlib.Path(match).is_file()]
            if not matches:
                raise DataError(f"{pattern}: no such file, folder or match for a glob")
            found.update(map(os.path.abspath, matches))
        if not found:
            raise DataError("Files has no paths")
        return sorted(found)

    def open(self) -> TextCorpus:
        """Opens the corpus.

        Raises:
          DataError: nothing matches, a file cannot be read, or there is no text at all.
        """
        paths = self._find()
        root = os.path.commonpath([os.path.dirname(path) for path in paths])
        # Names are relative to what all files share: the same data elsewhere has the same ids.
        names = [pathlib.Path(path).relative_to(root).as_posix() for path in paths]
        corpus = TextCorpus(names, [formats.open_texts(path, self.text_field, self.errors) for path in paths], paths)
        if not len(corpus):
            raise DataError(f"{', '.join(self.paths)}: empty, there is no document in {len(paths)} file(s)")
        return corpus


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenized:
    """A folder that `python -m lm.prepare --tokenize` wrote: token ids, memory-mapped, never tokenised again.

    Attributes:
      directory: the folder.
      weight: share of the rows that this source gives, relative to the other sources.
    """

    directory: str = ""
    weight: float = 1.0

    def problems(self) -> list[str]:
        """Returns one sentence for each reason why this source cannot be read."""
        if not tokenized.is_tokenized(self.directory):
            missing = f"no {tokenized.INDEX}, this is not a folder that lm.prepare --tokenize wrote"
            return [f"data.source: {self.directory}: {missing}"]
        return []

    def open(self) -> tokenized.TokenizedCorpus:
        """Opens the corpus; raises `DataError` if the folder is not whole."""
        return tokenized.TokenizedCorpus(self.directory)


Source = StandardLibrary | Files | Tokenized


def parse_source(paths: str, text_field: str, errors: Errors) -> tuple[Source, ...]:
    """Returns the sources that a comma-separated list of files, folders and globs names."""
    parts = [part.strip() for part in paths.split(",") if part.strip()]
    ready = [part for part in parts if tokenized.is_tokenized(part)]
    text = tuple(part for part in parts if part not in ready)
    sources: list[Source] = [Tokenized(directory=part) for part in ready]
    return tuple(sources + ([Files(paths=text, text_field=text_field, errors=errors)] if text or not ready else []))
