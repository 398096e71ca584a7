"""What `python -m lm.prepare` does: trains a tokenizer, shows one, tokenises a corpus ahead, shows rows.

Owns the steps and their reports. Knows no flags; the objective of the rows shown is an argument. Law: an
output folder appears whole at the end, or not at all.
"""

import functools
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import numpy as np

from lm.batch import SpecialTokens
from lm.data import tokenized
from lm.data.config import DataConfig
from lm.data.documents import load_tokenizer
from lm.data.formats import DataError
from lm.data.pipeline import train_batches
from lm.data.sources import Corpus, Source
from lm.data.tokenizers import Tokenizer
from lm.document import Objective

T = TypeVar("T")
# Id, key and token ids of a document.
Encoded = tuple[str, int, np.ndarray]
# Documents that a worker encodes at a time.
_BLOCK = 64
# Folder inside a tokenised corpus for the tokenizer that made its ids.
TOKENIZER_FOLDER = "tokenizer"


def train_tokenizer(config: DataConfig, output: str) -> Tokenizer:
    """Trains the configured tokenizer on the training documents and writes it to a new folder.

    Raises:
      DataError: the folder exists, the text cannot be read, or it does not support the vocabulary.
    """
    with tokenized.new_folder(output) as folder:
        return load_tokenizer(config.tokenizer, config, folder)


def _with_progress(items: Iterable[T], total: int) -> Iterator[T]:
    """Yields items, and on a terminal says how many are done."""
    shown = time.monotonic()
    for number, item in enumerate(items):
        yield item
        if sys.stderr.isatty() and time.monotonic() - shown > 1:
            shown = time.monotonic()
            print(f"\r{number + 1:,} of {total:,} documents", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)


class _Encoder:
    """Encodes ranges of a corpus; each worker process opens its own."""

    def __init__(self, source: Source, tokenizer: Tokenizer) -> None:
        self._source, self._tokenizer = source, tokenizer

    def __getstate__(self) -> dict[str, Any]:
        return {"_source": self._source, "_tokenizer": self._tokenizer}

    @functools.cached_property
    def _corpus(self) -> tuple[Corpus, np.ndarray]:
        corpus = self._source.open()
        return corpus, corpus.keys()

    def __call__(self, places: range) -> list[Encoded]:
        """Returns id, key and token ids of documents."""
        (corpus, keys), found = self._corpus, []
        for place in places:
            text = corpus.text(place)
            if text is None:
                raise DataError("the input is tokenised already")
            found.append((corpus.document_id(place), int(keys[place]), self._tokenizer.encode(text)))
        return found


_worker_encoder: _Encoder | None = None


def _start_worker(encoder: _Encoder) -> None:
    # A pool pickles what it sends with each task; the encoder goes once.
    global _worker_encoder
    _worker_encoder = encoder


def _encode_in_worker(places: range) -> list[Encoded]:
    assert _worker_encoder is not None
    return _worker_encoder(places)


def _encode(encoder: _Encoder, num_documents: int, num_workers: int) -> Iterator[Encoded]:
    """Yields all documents in order, whatever the number of workers."""
    blocks = [range(start, min(start + _BLOCK, num_documents)) for start in range(0, num_documents, _BLOCK)]
    if not num_workers:
        for block in blocks:
            yield from encoder(block)
        return
    with multiprocessing.get_context("spawn").Pool(num_workers, _start_worker, (encoder,)) as pool:
        for found in pool.imap(_encode_in_worker, blocks):
            yield from found


def tokenize(config: DataConfig, tokenizer: Tokenizer | None, output: str, num_workers: int = 0) -> str:
    """Tokenises all documents of one source into a new folder, with the tokenizer beside them.

    Args:
      config: the source, and the tokenizer to train where none is given.
      tokenizer: a trained one, or None.
      output: a folder that does not exist; `Tokenized` reads it.
      num_workers: processes that encode; 0 is this one. The result is the same.

    Returns:
      A report in one line.

    Raises:
      DataError: the folder exists, or the text cannot be read.
    """
    (source,) = config.chosen_sources
    corpus = source.open()
    with tokenized.new_folder(output) as folder:
        if tokenizer is None:
            tokenizer = load_tokenizer(config.tokenizer, config, folder / TOKENIZER_FOLDER)
        else:
            tokenizer.save(folder / TOKENIZER_FOLDER)
        start = time.monotonic()
        fingerprints = {"tokenizer": tokenizer.fingerprint, "source": corpus.fingerprint()}
        encoded = _encode(_Encoder(source, tokenizer), len(corpus), num_workers)
        documents = _with_progress(encoded, len(corpus))
        index = tokenized.write(folder, documents, tokenizer.size, fingerprints)
    num_tokens = sum(shard["tokens"] for shard in index["shards"])
    seconds = time.monotonic() - start
    return (
        f"{len(corpus):,} documents, {num_tokens:,} tokens in {len(index['shards'])} shard(s), "
        f"{num_tokens / seconds:,.0f} tokens/s -> {os.path.abspath(output)}"
    )


def _describe_specials(specials: SpecialTokens) -> str:
    single = ("pad", "bos", "eos", "unk", "mask", "cls", "sep", "sop", "eop")
    parts = [f"{name} {getattr(specials, name)}" for name in single if getattr(specials, name) is not None]
    for name in ("modes", "fim", "sentinels"):
        ids = getattr(specials, name)
        if len(ids) > 3:
            parts.append(f"{name} {ids[0]} to {ids[-1]}")
        elif ids:
            parts.append(f"{name} {', '.join(map(str, ids))}")
    return "; ".join(parts)


def describe_tokenizer(tokenizer: Tokenizer, text: str) -> list[str]:
    """Returns lines that show a tokenizer: its size and special ids, and what it makes of a text."""
    lines = [
        f"{tokenizer.size:,} ids, {int((tokenizer.token_bytes > 0).sum()):,} of them text, "
        f"the longest {int(tokenizer.token_bytes.max())} bytes; fingerprint {tokenizer.fingerprint[:12]}",
        f"special ids: {_describe_specials(tokenizer.specials)}",
    ]
    if not text:
        return lines
    ids = tokenizer.encode(text)
    num_bytes = len(text.encode())
    lossless = tokenizer.decode(ids) == text
    return [
        *lines,
        f"ids:    {' '.join(map(str, ids.tolist()))}",
        f"pieces: {' '.join(map(repr, tokenizer.pieces(ids)))}",
        f"{num_bytes} bytes in {len(ids)} tokens: {num_bytes / max(1, len(ids)):.2f} bytes per token",
        f"round trip: {'exact' if lossless else f'NOT exact, gives {tokenizer.decode(ids)!r}'}",
    ]


def describe_rows(config: DataConfig, objective: Objective, tokenizer: Tokenizer, num_rows: int) -> list[str]:
    """Returns lines that show the first rows of training, each segment decoded.

    Args:
      config: the settings.
      objective: makes the examples.
      tokenizer: of the corpus.
      num_rows: how many rows.
    """
    batches = train_batches(config, objective, tokenizer, num_rows)
    batch, lines = next(batches), []
    ids = iter(batches.document_ids())
    for number, segments in enumerate(batch.segment_ids):
        filled = int(np.count_nonzero(segments))
        lines.append(f"row {number}: {segments.max()} segment(s), {filled} of {len(segments)} positions filled")
        for segment in range(1, int(segments.max()) + 1):
            where = segments == segment
            lines.append(f"  segment {segment}, {int(where.sum())} positions, from {next(ids)}")
            lines.append(f"    inputs  {_shorten(tokenizer.decode(batch.inputs[number][where]))}")
            lines.append(f"    targets {_shorten(tokenizer.decode(batch.targets[number][where]))}")
    batches.close()
    return lines


def _shorten(text: str, most: int = 90) -> str:
    return repr(text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}")
