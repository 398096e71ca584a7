"""A vocabulary of one id per character, with every special token, so that tests need no tokenizer.

The text characters are printable ASCII and 800 ideographs. A space, and every third ideograph, begins a word.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from lm.batch import Document, Lengths, SpecialTokens
from lm.objectives.base import Context

SENTINELS = 120
SPECIALS = SpecialTokens(
    pad=0,
    bos=1,
    eos=2,
    unk=3,
    mask=4,
    cls=5,
    sep=6,
    modes=(7, 8, 9),
    fim=(10, 11, 12),
    sop=13,
    eop=14,
    sentinels=tuple(range(15, 15 + SENTINELS)),
)
TEXT_START = 15 + SENTINELS
ALPHABET = ["\n"] + [chr(c) for c in range(32, 127)] + [chr(0x4E00 + k) for k in range(800)]


@dataclasses.dataclass(frozen=True)
class Characters:
    """One id per character; satisfies the protocol `Vocabulary`."""

    specials: SpecialTokens = SPECIALS

    @property
    def size(self) -> int:
        return TEXT_START + len(ALPHABET)

    @property
    def token_bytes(self) -> np.ndarray:
        return np.array([0] * TEXT_START + [len(c.encode()) for c in ALPHABET], np.int32)

    @property
    def starts_word(self) -> np.ndarray:
        begins = [c in " \n" or (ord(c) >= 0x4E00 and ord(c) % 3 == 0) for c in ALPHABET]
        return np.array([False] * TEXT_START + begins)

    def encode(self, text: str) -> np.ndarray:
        return np.array([TEXT_START + ALPHABET.index(c) for c in text], np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return "".join(ALPHABET[i - TEXT_START] if i >= TEXT_START else f"<{i}>" for i in np.asarray(ids).tolist())


VOCABULARY = Characters()
SENTENCES = (
    "The house stands on a hill. It has three floors! Who lives there? Nobody knows. "
    "A road leads up to it, and a smaller one down. In winter both are white. The postman comes twice a week."
)
OTHER = "Rivers run to the sea. Ships follow them. Some never return. The sea keeps what it likes. So it is."


def make_document(text: str, name: str = "corpus/0") -> Document:
    return Document(name, text, VOCABULARY.encode(text))


def make_distinct(length: int, offset: int = 96, name: str = "corpus/0") -> Document:
    """Returns a document whose tokens are all different, so that a token tells where it came from."""
    tokens = np.arange(TEXT_START + offset, TEXT_START + offset + length, dtype=np.int32)
    assert tokens.size == 0 or tokens[-1] < VOCABULARY.size
    return Document(name, VOCABULARY.decode(tokens), tokens)


def make_context(
    tokens: int = 64, encoder: int | None = None, seed: int = 0, epoch: int = 0, index: int = 0, vocabulary=VOCABULARY
) -> Context:
    pool = [make_document(OTHER, "corpus/1"), make_distinct(300, 300, "corpus/2")]
    return Context(
        vocabulary=vocabulary,
        lengths=Lengths(tokens, encoder),
        seed=seed,
        epoch=epoch,
        index=index,
        sample_document=lambda rng: pool[rng.integers(len(pool))],
    )
