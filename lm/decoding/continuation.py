"""Text in, text out: prompts as their objective laid out documents, and continuations as text.

Knows a tokenizer and a decoder, no file and no terminal. Law: the continuation of a text is the same
alone, in a batch, at once or streamed.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lm import parallel
from lm.decoding.loop import Decoder
from lm.decoding.prompts import DecodingError, Prompts, pad_prompts
from lm.decoding.sampling import Sampling
from lm.decoding.text import TextStream
from lm.document import Traits, Vocabulary


def build_decoder(
    model: Any, vocabulary: Vocabulary, traits: Traits, sampling: Sampling, max_tokens: int = 128
) -> Decoder:
    """Builds the decoder of a model that was trained by an objective with these traits; it stops at eos.

    Raises:
      DecodingError: the model does not generate.
    """
    if model.config.decoder_depth == 0:
        raise DecodingError("this model has no decoder, so it cannot generate; use a Decoder or an EncoderDecoder")
    if not traits.autoregressive:
        raise DecodingError("the run's objective teaches to fill in hidden tokens, not to generate from left to right")
    if model.config.num_block_positions:
        raise DecodingError("this model fills blanks by their second positions (GLM), which continuing a text has not")
    eos = vocabulary.specials.eos
    return Decoder(
        model=model,
        sampling=sampling,
        max_tokens=max_tokens,
        stop_ids=() if eos is None else (eos,),
        num_ids=vocabulary.size,
        # What a prefix LM was shown both ways is the prompt; an encoder's decoder has no prompt.
        bidirectional_prompt=traits.bidirectional and model.config.encoder_depth == 0,
    )


def encode_prompts(model: Any, vocabulary: Vocabulary, texts: Sequence[str], rows: Sequence[int]) -> Prompts:
    """Encodes prompts: bos and the text; with an encoder, it reads the text and eos, and the decoder bos.

    Call inside `lm.parallel.use(mesh, rules)`: rows are repeated until they divide over the mesh.

    Args:
      model: of the run.
      vocabulary: of the run.
      texts: one prompt each; may be empty.
      rows: keys of their randomness.

    Raises:
      DecodingError: no texts, or the tokenizer lacks a special token that is needed.
    """
    specials = vocabulary.specials
    mesh, rules = parallel.current()
    shards = math.prod(mesh.shape[axis] for axis in rules.activations["batch"])
    extra = -len(texts) % shards
    texts, rows = [*texts, *[texts[-1]] * extra], [*rows, *[rows[-1]] * extra]
    if specials.bos is None:
        raise DecodingError("the tokenizer has no 'bos' token to begin with")
    encoded = [vocabulary.encode(text) for text in texts]
    if model.config.encoder_depth == 0:
        return pad_prompts([np.concatenate([[specials.bos], tokens]) for tokens in encoded], rows=rows)
    if specials.eos is None:
        raise DecodingError("the tokenizer has no 'eos' token to end the encoder's input with")
    encoder_prompts = [np.concatenate([tokens, [specials.eos]]) for tokens in encoded]
    return pad_prompts([[specials.bos]] * len(texts), encoder_prompts=encoder_prompts, rows=rows, smallest=1)


def _without_stop(decoder: Decoder, tokens: np.ndarray) -> np.ndarray:
    return tokens[~np.isin(tokens, decoder.stop_ids)]


def stream_text(
    decoder: Decoder, params: Any, vocabulary: Vocabulary, text: str, *, row: int = 0, seed: int = 0
) -> Iterator[str]:
    """Yields the continuation of `text` in pieces of whole characters, as they are made."""
    prompts = encode_prompts(decoder.model, vocabulary, [text], [row])
    written = TextStream(vocabulary.decode)
    for tokens in decoder.stream(params, prompts, seed):
        yield written.push(_without_stop(decoder, tokens[0]))
    yield written.close()


def complete_texts(
    decoder: Decoder,
    params: Any,
    vocabulary: Vocabulary,
    texts: Sequence[str],
    *,
    batch_size: int = 16,
    seed: int = 0,
) -> Iterator[str]:
    """Yields the continuation of each text, in order; text i has the randomness of row i."""
    for start in range(0, len(texts), batch_size):
        batch = texts[start : start + batch_size]
        prompts = encode_prompts(decoder.model, vocabulary, batch, range(start, start + len(batch)))
        made = decoder.generate(params, prompts, seed)
        for i in range(len(batch)):
            yield vocabulary.decode(_without_stop(decoder, made.row(i)))


def fit_max_tokens(model: Any, vocabulary: Vocabulary, texts: Sequence[str], most: int) -> int:
    """Returns how many tokens can be made for each text within the model's max_length: 1 to `most`."""
    longest = 0 if model.config.encoder_depth else max(len(vocabulary.encode(text)) for text in texts)
    return max(1, min(most, model.config.max_length - longest))
