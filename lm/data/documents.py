"""The documents of one side of the split of one source, tokenised and cached.

Owns the way from an index to a `Document`, and the memory that keeps its tokens. Knows no order and no
row. Law: document `i` is the same whether it was cached or not.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Iterator

import numpy as np

from lm.batch import Document
from lm.data import tokenizers
from lm.data.config import DataConfig, TokenizerChoice
from lm.data.formats import DataError
from lm.data.sources import Corpus, split
from lm.document import Vocabulary

# What Python spends on a document besides its tokens and characters.
_OVERHEAD_BYTES = 400


class Cache:
    """Keeps documents until a budget is spent, and no more after that.

    Whoever passes over a corpus in cycles gains from keeping the first ones and nothing from keeping the
    latest: those are used again when they have long been dropped.
    """

    def __init__(self, num_bytes: int) -> None:
        self._left = num_bytes
        self._kept: dict[tuple[int, int], Document] = {}

    def get(self, key: tuple[int, int]) -> Document | None:
        """Returns what was kept under the key, or None."""
        return self._kept.get(key)

    def keep(self, key: tuple[int, int], document: Document) -> None:
        """Keeps a document if there is room."""
        size = document.tokens.nbytes + len(document.text or "") + _OVERHEAD_BYTES
        if size <= self._left:
            self._left -= size
            self._kept[key] = document


class Documents:
    """Numbered documents of one side of the split.

    Args:
      corpus: of the source.
      number: of the source in the mixture.
      indices: i64[N], the corpus's documents on this side.
      vocabulary: turns text into tokens.
      cache: shared by all sources.
    """

    def __init__(self, corpus: Corpus, number: int, indices: np.ndarray, vocabulary: Vocabulary, cache: Cache) -> None:
        self._corpus, self._number, self._indices = corpus, number, indices
        self._vocabulary, self._cache = vocabulary, cache

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Document:
        place = int(self._indices[index])
        document = self._cache.get((self._number, place))
        if document is None:
            document = self._read(place)
            self._cache.keep((self._number, place), document)
        return document

    def _read(self, place: int) -> Document:
        document_id, text = self._corpus.document_id(place), self._corpus.text(place)
        tokens = self._corpus.tokens(place) if text is None else self._vocabulary.encode(text)
        assert tokens is not None, "a corpus has text or tokens"
        # An objective that wrote into them would change the next epoch.
        tokens.setflags(write=False)
        return Document(f"{self._number}/{document_id}" if self._number else document_id, text, tokens)

    def sample(self, rng: np.random.Generator) -> Document:
        """Draws a document."""
        return self[int(rng.integers(len(self)))]


def open_corpora(config: DataConfig) -> list[Corpus]:
    """Opens every source; raises `DataError` if one cannot be read."""
    return [source.open() for source in config.chosen_sources]


def open_documents(config: DataConfig, vocabulary: Vocabulary, fingerprint: str, validation: bool) -> list[Documents]:
    """Returns the documents of each source on one side of the split.

    Args:
      config: the settings.
      vocabulary: the tokenizer.
      fingerprint: the tokenizer's, compared with that of corpora that were tokenised ahead.
      validation: which side.

    Raises:
      DataError: a source cannot be read, was tokenised by another tokenizer, or has nothing on this side.
    """
    cache = Cache(config.cache_megabytes << 20)
    found, sizes = [], 0
    for number, (source, corpus) in enumerate(zip(config.chosen_sources, open_corpora(config), strict=True)):
        made_by = corpus.tokenizer_fingerprint()
        if made_by not in (None, fingerprint):
            raise DataError(
                f"{source} was tokenised by another tokenizer ({made_by[:8]}, not {fingerprint[:8]}): set "
                "data.tokenizer to the Saved one in its folder tokenizer, or prepare it again"
            )
        training, held_out = split(corpus.keys(), config.validation_fraction)
        indices, sizes = held_out if validation else training, sizes + len(corpus)
        if not len(indices) and not validation:
            raise DataError(
                f"{source} has no training document: {len(corpus)} document(s), {len(held_out)} of them held out; "
                "add text, or set data.validation_fraction lower"
            )
        found.append(Documents(corpus, number, indices, vocabulary, cache))
    if validation and not any(len(documents) for documents in found):
        raise DataError(
            f"there is no validation document: data.validation_fraction is {config.validation_fraction}, and there "
            f"are {sizes} document(s); add text, or set it higher"
        )
    return found


class _TrainingText:
    """The training documents of all sources, in the order of their keys: random, and the same in every run."""

    def __init__(self, config: DataConfig) -> None:
        self._config = config

    def sample(self, num_bytes: int) -> Iterator[str]:
        """Yields documents until they have `num_bytes` bytes."""
        corpora = open_corpora(self._config)
        sides = [split(corpus.keys(), self._config.validation_fraction)[0] for corpus in corpora]
        keys = np.concatenate([corpus.keys()[side] for corpus, side in zip(corpora, sides, strict=True)])
        owners = np.repeat(np.arange(len(corpora)), [len(side) for side in sides])
        places = np.concatenate(sides)
        for number in np.argsort(keys, kind="stable"):
            text = corpora[owners[number]].text(int(places[number]))
            if text is not None:
                yield text
                num_bytes -= len(text.encode())
            if num_bytes <= 0:
                return


def load_tokenizer(
    choice: TokenizerChoice, config: DataConfig | None, directory: str | os.PathLike[str]
) -> tokenizers.Tokenizer:
    """Returns the tokenizer stored in `directory`; where there is none, builds it and stores it there.

    Args:
      choice: `DataConfig.tokenizer`.
      config: whose training documents a tokenizer is trained on; None only loads.
      directory: the run's own folder for its tokenizer. Several processes may call this at once on one
        file system: training is deterministic and files appear whole.

    Raises:
      DataError: it is not there and `config` is None, or it cannot be trained, read or written.
    """
    if config is None or pathlib.Path(directory, tokenizers.DESCRIPTION).is_file():
        return tokenizers.load(directory)
    tokenizer = choice.build(_TrainingText(config))
    tokenizer.save(directory)
    return tokenizer


def fingerprint(config: DataConfig) -> str:
    """Returns a hash over the sources' names, sizes and contents, for the run's record."""
    found = [corpus.fingerprint() for corpus in open_corpora(config)]
    return hashlib.blake2b(json.dumps(found).encode(), digest_size=16).hexdigest()
