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
from lm.document import PLAIN, Frame, Traits, Vocabulary


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


def encode_prompts(
    model: Any, vocabulary: Vocabulary, texts: Sequence[str], rows: Sequence[int], frame: Frame = PLAIN
) -> Prompts:
    """Encodes prompts with the special tokens around them that training had; the encoder, if any, reads the text.

    Call inside `lm.parallel.use(mesh, rules)`: rows are repeated until they divide over the mesh.

    Args:
      model: of the run.
      vocabulary: of the run.
      texts: one prompt each; may be empty.
      rows: keys of their randomness.
      frame: of the objective that the model was trained by.

    Raises:
      DecodingError: no texts, or the tokenizer lacks a special token that is needed.
    """
    start, before, after = _special_ids(vocabulary, frame)
    mesh, rules = parallel.current()
    shards = math.prod(mesh.shape[axis] for axis in rules.activations["batch"])
    extra = -len(texts) % shards
    texts, rows = [*texts, *[texts[-1]] * extra], [*rows, *[rows[-1]] * extra]
    sources = [np.concatenate([before, vocabulary.encode(text), after]).astype(np.int32) for text in texts]
    if model.config.encoder_depth == 0:
        return pad_prompts([np.concatenate([start, source]) for source in sources], rows=rows)
    return pad_prompts([start + before] * len(texts), encoder_prompts=sources, rows=rows, smallest=1)


def _special_ids(vocabulary: Vocabulary, frame: Frame) -> tuple[list[int], list[int], list[int]]:
    """Returns the ids of the frame's start, before and after."""
    parts = ((frame.start,), frame.before, frame.after)
    for name in (name for names in parts for name in names):
        if getattr(vocabulary.specials, name) is None:
            raise DecodingError(f"the tokenizer has no {name!r} token to put around a prompt, as training did")
    start, before, after = ([getattr(vocabulary.specials, name) for name in names] for names in parts)
    return start, before, after


def _text_of(decoder: Decoder, vocabulary: Vocabulary, tokens: np.ndarray) -> np.ndarray:
    """Returns the tokens without those that only begin (one stack makes the bos of BART's targets) or end a target."""
    bos = vocabulary.specials.bos
    return tokens[~np.isin(tokens, [*decoder.stop_ids, *([] if bos is None else [bos])])]


def stream_text(
    decoder: Decoder,
    params: Any,
    vocabulary: Vocabulary,
    text: str,
    *,
    row: int = 0,
    seed: int = 0,
    frame: Frame = PLAIN,
) -> Iterator[str]:
    """Yields the continuation of `text` in pieces of whole characters, as they are made."""
    prompts = encode_prompts(decoder.model, vocabulary, [text], [row], frame)
    written = TextStream(vocabulary.decode)
    for tokens in decoder.stream(params, prompts, seed):
        yield written.push(_text_of(decoder, vocabulary, tokens[0]))
    yield written.close()


def complete_texts(
    decoder: Decoder,
    params: Any,
    vocabulary: Vocabulary,
    texts: Sequence[str],
    *,
    batch_size: int = 16,
    seed: int = 0,
    frame: Frame = PLAIN,
) -> Iterator[str]:
    """Yields the continuation of each text, in order; text i has the randomness of row i."""
    for start in range(0, len(texts), batch_size):
        batch = texts[start : start + batch_size]
        prompts = encode_prompts(decoder.model, vocabulary, batch, range(start, start + len(batch)), frame)
        made = decoder.generate(params, prompts, seed)
        for i in range(len(batch)):
            yield vocabulary.decode(_text_of(decoder, vocabulary, made.row(i)))


def fit_max_tokens(model: Any, vocabulary: Vocabulary, texts: Sequence[str], most: int, frame: Frame = PLAIN) -> int:
    """Returns how many tokens can be made for each text within the model's max_length: 1 to `most`."""
    around = len(frame.before) + len(frame.after)
    longest = 0 if model.config.encoder_depth else around + max(len(vocabulary.encode(text)) for text in texts)
    return max(1, min(most, model.config.max_length - longest))
