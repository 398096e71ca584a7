"""The settings of the data, and what is wrong with them before anything is read.

Owns `DataConfig`. Knows no reader and no iterator. Law: `problems()` touches no device, imports no jax and
reads no text; with no problem, what remains are errors in the data themselves (`DataError`).
"""

import dataclasses

from lm.batch import Lengths
from lm.data.formats import Errors
from lm.data.hugging_face import HuggingFace
from lm.data.sources import Source, StandardLibrary, Tokenized, parse_source
from lm.data.tokenizers import Bytes, Saved, SentencePiece

TokenizerChoice = Bytes | SentencePiece | HuggingFace | Saved


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which text is read, in what order, and how it is laid into rows.

    Attributes:
      source: files, folders and globs of your own text, comma-separated; empty means what `sources` says.
      text_field: field or column that holds the text in the files of `source`.
      errors: for the files of `source`: `strict` stops at invalid UTF-8, `replace` reads each bad byte as U+FFFD.
      sources: the sources of a mixture, each with its weight; not read when `source` is set.
      tokenizer: bytes, SentencePiece trained on the training text, a tokenizer.json, or a stored one.
      sequence_length: positions in a row, T.
      encoder_length: positions in an encoder row, S; None without an encoder.
      seed: of the order of documents and of every random choice an objective makes.
      validation_fraction: share of the documents held out, by the hash of their ids.
      window: documents packed together; more of them waste fewer positions and cost more work on resuming.
      shuffle_rows: a training row is drawn among as many of its lane's next rows, so that the parts of a long
        document do not follow one another; 1 keeps their order.
      packing: whether several examples share a row; otherwise each has a row of its own.
      num_epochs: training ends after so many passes; None never ends.
      prefetch: batches made ahead of time.
      num_workers: processes that make them; 0 is a thread of the program's own process.
      cache_megabytes: text and tokens kept in memory, so that later epochs neither read nor tokenise again.
    """

    source: str = ""
    text_field: str = "text"
    errors: Errors = "strict"
    sources: tuple[Source, ...] = (StandardLibrary(),)
    tokenizer: TokenizerChoice = Bytes()
    sequence_length: int = 1024
    encoder_length: int | None = None
    seed: int = 0
    validation_fraction: float = 0.05
    window: int = 64
    shuffle_rows: int = 128
    packing: bool = True
    num_epochs: int | None = None
    prefetch: int = 2
    num_workers: int = 0
    cache_megabytes: int = 512

    @property
    def lengths(self) -> Lengths:
        """The longest example that fits a row."""
        return Lengths(self.sequence_length, self.encoder_length)

    @property
    def chosen_sources(self) -> tuple[Source, ...]:
        """The sources that are read."""
        return parse_source(self.source, self.text_field, self.errors) if self.source else self.sources

    def problems(self) -> list[str]:
        """Returns one plain sentence for each reason why these settings cannot work; empty if none."""
        least = {"sequence_length": 1, "encoder_length": 1, "seed": 0, "window": 1, "shuffle_rows": 1, "num_epochs": 1}
        least |= {"prefetch": 0, "num_workers": 0, "cache_megabytes": 0}
        problems = [
            f"data.{name} is {value}, it must be {bound} or more"
            for name, bound in least.items()
            if (value := getattr(self, name)) is not None and value < bound
        ]
        if not 0 <= self.validation_fraction <= 1:
            problems.append(f"data.validation_fraction is {self.validation_fraction}, it must be from 0 to 1")
        if self.num_workers and not self.prefetch:
            problems.append("data.num_workers needs data.prefetch of 1 or more: workers make batches ahead of time")
        if not self.chosen_sources:
            problems.append("data.sources is empty: name a source, or set data.source to files")
        return problems + self._source_problems() + self.tokenizer.problems()

    def _source_problems(self) -> list[str]:
        sources = self.chosen_sources
        problems = [problem for source in sources for problem in source.problems()]
        weights = [source.weight for source in sources]
        if any(not 0 < weight < float("inf") for weight in weights):
            problems.append(f"data.sources: the weights are {weights}, each must be more than 0")
        if self.num_epochs is not None and len(set(weights)) > 1:
            problems.append(
                f"data.num_epochs {self.num_epochs} passes over every document equally often, which clashes with the "
                f"weights {weights}: make them equal, or set num_epochs to none"
            )
        ready = [source.directory for source in sources if isinstance(source, Tokenized)]
        if ready and len(ready) == len(sources) and isinstance(self.tokenizer, SentencePiece):
            problems.append(
                f"data.tokenizer cannot be trained: {', '.join(ready)} has no text; use the Saved tokenizer in "
                f"{ready[0]}/tokenizer, which made its ids"
            )
        return problems
