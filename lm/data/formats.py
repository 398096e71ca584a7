"""Files of text, opened for random access: plain text, JSONL, Parquet, ArrayRecord, and gz or zst of them.

Owns how the bytes of one file become numbered texts, and what is said when they cannot. Knows no
corpus, no tokenizer and no split. Only an index of offsets is held in memory; what has no random access
(compressed files, Parquet) is unpacked once into an unnamed temporary file. Law: text `i` of a file is
the same in every run, and every error names the file and the place in it.
"""

import codecs
import functools
import gzip
import json
import os
import pathlib
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from typing import IO, Any, Literal, Protocol

import numpy as np

from lm.config import UserError

Errors = Literal["strict", "replace"]

COMPRESSED = (".gz", ".zst")
# Documents of a long text file end at the first line end after this many bytes: a single file still
# gives a split, a shuffle and examples of bounded cost.
DOCUMENT_BYTES = 16384
_CHUNK = 1 << 24


class DataError(UserError, ValueError):
    """What is wrong with the user's data, in one sentence that names the file and the place."""


class Texts(Protocol):
    """The numbered texts of one file."""

    def __len__(self) -> int:
        """Number of texts."""
        ...

    def __getitem__(self, index: int) -> str:
        """Returns text `index`; raises `DataError` if it cannot be read."""
        ...


def decode(raw: bytes, path: str, offset: int, errors: Errors) -> str:
    """Returns `raw` as text; `offset` is where it begins in the file.

    Raises:
      DataError: the bytes are not UTF-8 and `errors` is "strict"; says file and byte offset.
    """
    try:
        return raw.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not valid UTF-8 at byte {offset + error.start} (0x{raw[error.start]:02x}): "
            "convert the file, or set errors='replace' to read each bad byte as U+FFFD"
        ) from None


def _decompress(path: str) -> Iterator[bytes]:
    suffix = pathlib.Path(path).suffix
    if suffix == ".zst":
        try:
            import zstandard
        except ImportError:
            raise DataError(f"{path} needs the package zstandard: pip install zstandard") from None
        failures: tuple[type[Exception], ...] = (zstandard.ZstdError,)
        opened: Any = zstandard.open(path, "rb")
    else:
        failures = (OSError, EOFError, zlib.error)
        opened = gzip.GzipFile(path, "rb")
    try:
        with opened as stream:
            while chunk := stream.read(_CHUNK):
                yield chunk
    except failures as error:
        raise DataError(f"{path} is damaged or not a {suffix} file: {error}") from None


class _OnDisk:
    """The bytes of a plain file. No handle is kept: a folder may hold more files than a process may open."""

    def __init__(self, path: str) -> None:
        self._path, self.size = path, pathlib.Path(path).stat().st_size

    def read(self, start: int, stop: int) -> bytes:
        """Returns the bytes from `start` to `stop`."""
        with open(self._path, "rb") as file:
            return os.pread(file.fileno(), stop - start, start)


class _Unpacked:
    """The bytes of something that had to be unpacked, in one unnamed temporary file for the whole process."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        file = _temporary_file()
        self._start = file.seek(0, os.SEEK_END)
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        self._handle, self.size = file.fileno(), file.tell() - self._start

    def read(self, start: int, stop: int) -> bytes:
        """Returns the bytes from `start` to `stop`."""
        return os.pread(self._handle, stop - start, self._start + start)


@functools.cache
def _temporary_file() -> IO[bytes]:
    return tempfile.TemporaryFile()


def _open_bytes(path: str) -> _OnDisk | _Unpacked:
    """Opens a file, unpacking it first when it is compressed; refuses a binary one."""
    try:
        data = _Unpacked(_decompress(path)) if path.endswith(COMPRESSED) else _OnDisk(path)
        head = data.read(0, min(data.size, 8192))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    if b"\0" in head:
        raise DataError(
            f"{path} looks like a binary file (it has a NUL byte): name the text files alone, for example with a glob"
        )
    return data


def _chunks(data: _OnDisk | _Unpacked, start: int = 0, size: int = _CHUNK) -> Iterator[tuple[int, bytes]]:
    for offset in range(start, data.size, size):
        yield offset, data.read(offset, min(offset + size, data.size))


def _text_start(data: _OnDisk | _Unpacked) -> int:
    """Returns 3 if the file begins with a byte order mark, which is no part of the text, else 0."""
    return 3 if data.read(0, min(3, data.size)) == codecs.BOM_UTF8 else 0


def _line_ends(data: _OnDisk | _Unpacked) -> np.ndarray:
    """Returns i64[N], the offset just after each newline, and the end of the data if it has no last one."""
    ends = [np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10) + (offset + 1) for offset, chunk in _chunks(data)]
    found = np.concatenate(ends).astype(np.int64) if ends else np.zeros(0, np.int64)
    if data.size and (not len(found) or found[-1] != data.size):
        found = np.append(found, data.size)
    return found


class PlainText:
    """A text file; a long one is cut at line ends, so that the texts joined are the file."""

    def __init__(self, path: str, errors: Errors, document_bytes: int = DOCUMENT_BYTES) -> None:
        self._path, self._data = path, _open_bytes(path)
        self._errors: Errors = errors
        bounds = [_text_start(self._data)]
        while bounds[-1] < self._data.size:
            bounds.append(self._end(bounds[-1] + document_bytes))
        self._bounds = np.asarray(bounds, np.int64)

    def _end(self, at_least: int) -> int:
        for offset, chunk in _chunks(self._data, at_least - 1, DOCUMENT_BYTES):
            if (newline := chunk.find(b"\n")) >= 0:
                return offset + newline + 1
        return self._data.size

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, index: int) -> str:
        start, stop = (int(bound) for bound in self._bounds[index : index + 2])
        return decode(self._data.read(start, stop), self._path, start, self._errors)


def _json_text(raw: str, place: str, field: str, errors: Errors) -> str:
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is not valid JSON: {error}") from None
    if not isinstance(record, dict):
        raise DataError(f"{place} is not a JSON object, it is a {type(record).__name__}")
    if field not in record:
        raise DataError(f"{place} has no field {field!r} (it has {', '.join(record) or 'none'}): set text_field")
    text = record[field]
    if not isinstance(text, str):
        raise DataError(f"{place}: field {field!r} is not a string, it is a {type(text).__name__}: set text_field")
    try:
        # JSON can spell half a surrogate pair, which no UTF-8 text contains.
        return text.encode("utf-8", errors).decode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: character {error.start} of {field!r} is a lone surrogate: correct it, or set errors='replace'"
        ) from None


class JsonLines:
    """A file with one JSON object a line; empty lines are passed over."""

    def __init__(self, path: str, field: str, errors: Errors) -> None:
        self._path, self._field, self._data = path, field, _open_bytes(path)
        self._errors: Errors = errors
        ends = _line_ends(self._data)
        starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]]) if len(ends) else ends
        if len(starts):
            starts[0] = _text_start(self._data)
        # A line of at most two bytes is "\n" or "\r\n", or too short for an object anyway.
        filled = np.ones(len(starts), np.bool_)
        for line in np.flatnonzero(ends - starts <= 2):
            filled[line] = bool(self._data.read(starts[line], ends[line]).strip())
        filled = np.flatnonzero(filled)
        self._lines, self._starts, self._ends = filled + 1, starts[filled], ends[filled]

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> str:
        start, stop = int(self._starts[index]), int(self._ends[index])
        raw = decode(self._data.read(start, stop), self._path, start, self._errors)
        return _json_text(raw, f"{self._path}:{self._lines[index]}", self._field, self._errors)


class Parquet:
    """The text column of a Parquet file."""

    def __init__(self, path: str, field: str, errors: Errors) -> None:
        self._path, self._field = path, field
        self._errors: Errors = errors
        lengths: list[int] = []
        self._data = _Unpacked(self._unpack(lengths))
        self._bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])

    def _unpack(self, lengths: list[int]) -> Iterator[bytes]:
        try:
            import pyarrow as arrow
            from pyarrow import parquet
        except ImportError:
            raise DataError(f"{self._path} needs the package pyarrow: pip install pyarrow") from None
        try:
            with parquet.ParquetFile(self._path) as file:
                columns = file.schema_arrow.names
                if self._field not in columns:
                    shown = ", ".join(columns)
                    raise DataError(f"{self._path} has no column {self._field!r} (it has {shown}): set text_field")
                for batch in file.iter_batches(columns=[self._field]):
                    for value in batch.column(0).cast(arrow.large_binary()).to_pylist():
                        if value is None:
                            place = f"{self._path}: row {len(lengths)} of column {self._field!r}"
                            raise DataError(f"{place} is null: drop such rows")
                        lengths.append(len(value))
                        yield value
        except (arrow.ArrowException, OSError) as error:
            raise DataError(f"{self._path} cannot be read as Parquet: {error}") from None

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, index: int) -> str:
        raw = self._data.read(int(self._bounds[index]), int(self._bounds[index + 1]))
        return decode(raw, f"{self._path}, row {index},", 0, self._errors)


class ArrayRecord:
    """An ArrayRecord file whose records are UTF-8 text, or JSON objects if it is named *.jsonl.array_record."""

    def __init__(self, path: str, field: str | None, errors: Errors) -> None:
        try:
            from array_record.python import array_record_module  # pyright: ignore it has no types
        except ImportError:
            raise DataError(f"{path} needs the package array_record: pip install array_record") from None
        self._path, self._field = path, field
        self._errors: Errors = errors
        try:
            self._reader = array_record_module.ArrayRecordReader(path, "readahead_buffer_size:0,max_parallelism:0")
        except (RuntimeError, ValueError, OSError) as error:
            raise DataError(f"{path} cannot be read as ArrayRecord: {error}") from None
        if not self._reader.ok():
            raise DataError(f"{path} is damaged or not an ArrayRecord file")

    def __len__(self) -> int:
        return self._reader.num_records()

    def __getitem__(self, index: int) -> str:
        place = f"{self._path}, record {index},"
        try:
            record = self._reader.read([index])[0]
        except (RuntimeError, ValueError, IndexError) as error:
            raise DataError(f"{place} cannot be read: {error}") from None
        text = decode(record, place, 0, self._errors)
        return text if self._field is None else _json_text(text, place, self._field, self._errors)


@functools.lru_cache(maxsize=4096)
def _open_version(path: str, version: tuple[int, int], field: str, errors: Errors) -> Texts:
    del version  # part of the key: a file that changed is opened anew
    suffixes = pathlib.Path(path.removesuffix(".gz").removesuffix(".zst")).suffixes
    last = suffixes[-1].lower() if suffixes else ""
    if last in (".jsonl", ".ndjson"):
        return JsonLines(path, field, errors)
    if last == ".parquet":
        return Parquet(path, field, errors)
    if last in (".array_record", ".arrayrecord"):
        return ArrayRecord(path, field if ".jsonl" in suffixes else None, errors)
    return PlainText(path, errors)


def open_texts(path: str, field: str, errors: Errors) -> Texts:
    """Opens a file by its suffix (before .gz or .zst); an unknown one is plain text. Unchanged files are opened once.

    Args:
      path: the file.
      field: the field or column that has the text, for the formats that have fields.
      errors: what to do with invalid UTF-8.

    Raises:
      DataError: the file is missing, damaged, binary or has no such column.
    """
    try:
        status = pathlib.Path(path).stat()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    return _open_version(path, (status.st_size, status.st_mtime_ns), field, errors)
