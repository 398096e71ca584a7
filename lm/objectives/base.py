"""What an objective is: a pure, host-side function from a document to training examples.

An objective is a frozen dataclass of its settings with a method `examples`. It knows no model, no
mesh and no packing, and imports no jax. Law: the examples are a function of (document, settings,
lengths, seed, epoch, index) only, never of worker, process or call order.
"""

import itertools

import numpy as np

from lm.batch import SpecialTokens
from lm.document import Context as Context
from lm.document import Layout as Layout
from lm.document import Objective as Objective
from lm.document import Traits as Traits
from lm.document import Vocabulary as Vocabulary

# What a generator is for. Two draws of one objective that must be independent have two purposes.
CORRUPTION = 0
CHOICE = 1


def find_missing(specials: SpecialTokens, *names: str) -> list[str]:
    """Returns a sentence for each special token in `names` that the tokenizer lacks."""
    return [
        f"the tokenizer has no {name!r} token, which this objective needs: add it to the tokenizer's special tokens"
        for name in names
        if getattr(specials, name) is None
    ]


def cut(tokens: np.ndarray, limit: int, minimum: int = 1) -> list[np.ndarray]:
    """Cuts `tokens` into consecutive pieces of `limit`, the last one shorter but of at least `minimum` tokens.

    The last piece but one gives up what the last lacks. A document of fewer than `minimum` tokens gives nothing.

    Raises:
      ValueError: if `limit` is below `minimum`, or no piece can give up enough.
    """
    if limit < minimum or (minimum > 1 and limit < 2 * minimum - 1):
        raise ValueError(f"pieces of at most {limit} tokens cannot always have {minimum}: raise the lengths")
    if len(tokens) < minimum:
        return []
    bounds = [*range(0, len(tokens), limit), len(tokens)]
    if len(bounds) > 2 and bounds[-1] - bounds[-2] < minimum:
        bounds[-2] = bounds[-1] - minimum
    return [tokens[start:end] for start, end in itertools.pairwise(bounds)]
