"""The smallest objectives that the tests of the data need; the real ones live in lm/objectives."""

import dataclasses

import numpy as np

from lm.batch import Document, Example, Lengths, SpecialTokens
from lm.document import Context


@dataclasses.dataclass(frozen=True)
class Chunks:
    """Next-token prediction on consecutive chunks of a document; every token is a target once."""

    def examples(self, document: Document, context: Context) -> list[Example]:
        specials, size = context.vocabulary.specials, context.lengths.tokens
        found = []
        for start in range(0, len(document.tokens), size):
            targets = document.tokens[start : start + size]
            inputs = np.concatenate([[specials.bos], targets[:-1]])
            found.append(Example(inputs, targets, np.ones(len(targets), np.float32)))
        return found

    def problems(self, specials: SpecialTokens, lengths: Lengths) -> list[str]:
        return []


@dataclasses.dataclass(frozen=True)
class Copy:
    """The encoder reads a random part of the document, the decoder repeats it: randomness and two lengths."""

    def examples(self, document: Document, context: Context) -> list[Example]:
        rng = context.rng(7)
        most = min(len(document.tokens), context.lengths.tokens, context.lengths.encoder)
        if not most:
            return []
        part = document.tokens[: int(rng.integers(1, most + 1))]
        other = context.sample_document(rng).tokens[:1]
        inputs = np.concatenate([[context.vocabulary.specials.bos], part[:-1]])
        source = np.concatenate([part[: most - 1], other])
        return [Example(inputs, part, np.ones(len(part), np.float32), encoder_inputs=source)]

    def problems(self, specials: SpecialTokens, lengths: Lengths) -> list[str]:
        return []


@dataclasses.dataclass(frozen=True)
class Places:
    """Two positions that say the epoch and the index of the document."""

    def examples(self, document: Document, context: Context) -> list[Example]:
        place = np.asarray([context.epoch, context.index])
        return [Example(place, place, np.ones(2, np.float32))]

    def problems(self, specials: SpecialTokens, lengths: Lengths) -> list[str]:
        return []
