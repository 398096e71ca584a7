"""The data of a comparison: random ids, the same for every contender. Imports no framework."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Rows:
    """Unpadded rows of random ids.

    Attributes:
      batch: rows.
      length: tokens of a row.
      vocab_size: ids are below it.
      encoder_length: tokens of the encoder's row, or None.
    """

    batch: int
    length: int
    vocab_size: int
    encoder_length: int | None = None

    @property
    def size(self) -> int:
        """Tokens of a batch, the encoder's included."""
        return self.batch * (self.length + (self.encoder_length or 0))

    def tokens(self, name: str) -> np.ndarray:
        """Draws i32[batch, length] for "inputs", "targets" or "encoder_inputs"."""
        length = self.encoder_length if name == "encoder_inputs" else self.length
        seed = ["inputs", "targets", "encoder_inputs"].index(name)
        return np.random.default_rng(seed).integers(1, self.vocab_size, (self.batch, length)).astype(np.int32)
