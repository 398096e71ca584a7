"""Text from tokens as they come, never in the middle of a character.

Knows a tokenizer's `decode` and nothing else. Law: the pieces joined are the decoded whole.
"""

from collections.abc import Callable, Sequence

import numpy as np

# What `decode` writes for bytes that are no UTF-8, for now at least.
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Turns tokens, given a few at a time, into text that can be printed at once.

    Bytes that may be the beginning of a character are held back until the rest comes, or `close`.
    Only a window of tokens is decoded again, so the work is linear in the length of the text.
    """

    def __init__(self, decode: Callable[[Sequence[int] | np.ndarray], str]) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        # Text of tokens[:printed] is out; decoding starts one piece earlier, since a token's text may
        # depend on the one before it (SentencePiece drops the space of the first).
        self._start = 0
        self._printed = 0

    def push(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Returns the text that is certain now and was not returned before; may be empty."""
        pieces = []
        for token in tokens:
            self._tokens.append(int(token))
            known = self._decode(self._tokens[self._start : self._printed])
            text = self._decode(self._tokens[self._start :])
            if len(text) > len(known) and not text.endswith(REPLACEMENT):
                pieces.append(text[len(known) :])
                self._start, self._printed = self._printed, len(self._tokens)
        return "".join(pieces)

    def close(self) -> str:
        """Returns what was held back, with a replacement character for what never became one."""
        known = self._decode(self._tokens[self._start : self._printed])
        text = self._decode(self._tokens[self._start :])
        self._start = self._printed = len(self._tokens)
        return text[len(known) :]
