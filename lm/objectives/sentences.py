"""Where sentences end, told from tokens alone, so that tokenised corpora have sentences too.

Knows the vocabulary's text of each token, no objective. Law: the sentences in a row are the tokens.

With one token per character, "Ah. So be it." has the sentences "Ah." and " So be it.".
"""

import itertools

import numpy as np

from lm.objectives.base import Vocabulary

# The last three are the full-width forms.
TERMINATORS = (".", "!", "?", "\n", "\u3002", "\uff01", "\uff1f")


def split_sentences(tokens: np.ndarray, vocabulary: Vocabulary) -> list[np.ndarray]:
    """Returns the sentences of `tokens`: i32[N] in consecutive slices, none empty.

    A sentence ends after a token whose text ends with a terminator, if the next token begins a word.
    """
    if len(tokens) == 0:
        return []
    places = np.flatnonzero(vocabulary.starts_word[tokens[1:]])  # Of the last tokens of words.
    ids, inverse = np.unique(tokens[places], return_inverse=True)
    ends = np.array([vocabulary.decode([token]).rstrip(" ").endswith(TERMINATORS) for token in ids.tolist()], bool)
    bounds = [0, *(places[ends[inverse]] + 1).tolist(), len(tokens)]
    return [tokens[start:end] for start, end in itertools.pairwise(bounds)]
