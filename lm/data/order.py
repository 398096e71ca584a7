"""The order of documents: a shuffle for each epoch, cut into windows.

Owns which documents window `g` has. Knows no text and no row. Law: window `g` is a closed form of (seed,
number of documents, window size, g), and the windows of one epoch hold every document exactly once.
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np


@functools.lru_cache(maxsize=64)
def _shuffled(num_documents: int, seed: tuple[int, ...], epoch: int) -> Callable[[int], int]:
    """Returns Grain's index shuffle for one epoch: a permutation computed index by index."""
    # Grain imports jax when it is installed, and settings must be checked before that.
    import grain

    # Grain's own sequence, seed + epoch, would give seed 1 the orders of seed 0, one epoch later.
    key = int(np.random.SeedSequence([*seed, epoch]).generate_state(1)[0])
    order = grain.MapDataset.range(num_documents).shuffle(seed=key)
    return lambda place: int(order[place] or 0)


@dataclasses.dataclass(frozen=True)
class Windows:
    """The endless sequence of windows of a source.

    Attributes:
      num_documents: of the source's side of the split.
      size: documents in a window; the last window of an epoch may have fewer.
      seed: of the order, with the source's number: two sources are not shuffled alike.
      shuffle: whether epochs are shuffled; otherwise documents come in corpus order.
    """

    num_documents: int
    size: int
    seed: tuple[int, ...]
    shuffle: bool

    @property
    def per_epoch(self) -> int:
        """Number of windows in an epoch."""
        return -(-self.num_documents // self.size)

    def places(self, window: int) -> tuple[int, range]:
        """Returns the epoch of a window, and its documents' places in the epoch's order."""
        epoch, number = divmod(window, self.per_epoch)
        return epoch, range(number * self.size, min((number + 1) * self.size, self.num_documents))

    def document(self, epoch: int, place: int) -> int:
        """Returns the document at a place of an epoch's order."""
        return _shuffled(self.num_documents, self.seed, epoch)(place) if self.shuffle else place
