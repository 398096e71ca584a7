"""What objectives share: the names of the contract in `lm.document`, special tokens, and the cut of documents.

An objective is a frozen dataclass of its settings with a method `examples`. It knows no model, no
mesh and no packing, and imports no jax. Law: the examples are a function of (document, settings,
lengths, seed, epoch, index) only, never of worker, process or call order.
"""

import numpy as np

from lm.batch import SpecialTokens
from lm.document import Context as Context
from lm.document import Frame as Frame
from lm.document import Layout as Layout
from lm.document import Objective as Objective
from lm.document import Traits as Traits
from lm.document import Vocabulary as Vocabulary

# What a generator is for. Two draws of one objective that must be independent have two purposes.
CORRUPTION = 0
CHOICE = 1


def special(specials: SpecialTokens, name: str) -> int:
    """Returns the id of the special token `name`.

    Raises:
      ValueError: if the tokenizer lacks it, where `problems` was not asked before.
    """
    token = specials.find(name)
    if token is None:
        raise ValueError(find_missing(specials, name)[0])
    return token


def find_missing(specials: SpecialTokens, *names: str) -> list[str]:
    """Returns a sentence for each special token in `names` that the tokenizer lacks."""
    return [
        f"the tokenizer has no {name!r} token, which this objective needs: add it to the tokenizer's special tokens"
        for name in names
        if specials.find(name) is None
    ]


def take(limit: int, remaining: int, minimum: int) -> int:
    """Returns how many of `remaining` tokens the next piece takes: at most `limit`, and never so that fewer
    than `minimum` are left over.
    """
    return remaining if remaining <= limit else min(limit, remaining - minimum)


def cut(tokens: np.ndarray, limit: int, minimum: int = 1) -> list[np.ndarray]:
    """Cuts `tokens` into consecutive pieces of `limit`, the last one shorter but of at least `minimum` tokens.

    The last piece but one gives up what the last lacks. A document of fewer than `minimum` tokens gives nothing.

    Raises:
      ValueError: if `limit` is too small for that.
    """
    if limit < 2 * minimum - 1:
        raise ValueError(f"pieces of at most {limit} tokens cannot always have {minimum}: raise the lengths")
    pieces = []
    while len(tokens) >= minimum:
        size = take(limit, len(tokens), minimum)
        pieces.append(tokens[:size])
        tokens = tokens[size:]
    return pieces
