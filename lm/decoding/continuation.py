"""Text in, text out: prompts as their objective laid out documents, and continuations as text.

Knows a tokenizer and a decoder, no file and no terminal. Law: the continuation of a text is the same
alone, in a batch, at once or streamed.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lm import parallel
from lm.batch import MODES, SpecialTokens
from lm.decoding.loop import Decoder
from lm.decoding.prompts import DecodingError, Prompts, pad_prompts
from lm.decoding.sampling import Sampling
from lm.decoding.text import TextStream
from lm.document import PLAIN, Frame, Traits, Vocabulary


def choose_frame(
    traits: Traits, component: str | None = None, mode: str | None = None, *, fill_in: bool = False
) -> Frame:
    """Returns how prompts are laid out for a model that was trained by an objective with these traits.

    Args:
      traits: of the objective.
      component: which component of a mixture to prompt as; None is the first that will do.
      mode: which of UL2's modes announces the prompt; None is the objective's own choice.
      fill_in: whether the answer is to be followed by a suffix.

    Raises:
      DecodingError: the objective does not generate, has no such component or mode, or does not fill in.
    """
    frames = dict(traits.frames)
    if not traits.autoregressive and not frames:
        raise DecodingError("the run's objective teaches to fill in hidden tokens, not to generate from left to right")
    if component is not None and component not in frames:
        there = f"those that generate are {', '.join(frames)}" if frames else "it is no mixture of objectives"
        raise DecodingError(f"the run's objective has no component {component!r} to prompt as; {there}")
    roots = [traits.frame, *frames.values()] if component is None else [frames[component]]
    found = [frame for root in roots for frame in (root, *root.others)]
    if mode is not None:
        modes = [known for known in MODES if known in {frame.mode for frame in found}]
        found = [frame for frame in found if frame.mode == mode]
        if not found:
            there = f"there are {', '.join(modes)}" if modes else "no mode token announced its examples"
            raise DecodingError(f"the run's objective has no mode {mode!r} to prompt in; {there}")
    if fill_in:
        found = [frame for frame in found if frame.between is not None]
        if not found:
            asked = "" if mode is None else f" in mode {mode!r}"
            raise DecodingError(f"the run's objective never fills in before a suffix{asked}: give a prompt alone")
    return found[0]


def build_decoder(
    model: Any, vocabulary: Vocabulary, frame: Frame, sampling: Sampling, max_tokens: int = 128
) -> Decoder:
    """Builds the decoder of a model that was trained on examples framed so; it makes text, and stops at its end.

    Raises:
      DecodingError: the model does not generate.
    """
    if model.config.decoder_depth == 0:
        raise DecodingError("this model has no decoder, so it cannot generate; use a Decoder or an EncoderDecoder")
    ends = (vocabulary.specials.find(name) for name in frame.end)
    stop_ids = tuple(end for end in ends if end is not None)
    others = np.setdiff1d(np.flatnonzero(vocabulary.token_bytes == 0), stop_ids)
    return Decoder(
        model=model,
        sampling=sampling,
        max_tokens=max_tokens,
        stop_ids=stop_ids,
        num_ids=vocabulary.size,
        banned_ids=tuple(others.tolist()),
        # What a prefix LM was shown both ways is the prompt; an encoder's decoder has no prompt.
        bidirectional_prompt=frame.bidirectional and model.config.encoder_depth == 0,
        strides=frame.strides,
    )


def encode_prompts(
    model: Any,
    vocabulary: Vocabulary,
    texts: Sequence[str],
    rows: Sequence[int],
    frame: Frame = PLAIN,
    suffix: str = "",
) -> Prompts:
    """Encodes prompts with the special tokens around them that training had; the encoder, if any, reads the text.

    Call inside `lm.parallel.use(mesh, rules)`: rows are repeated until they divide over the mesh.

    Args:
      model: of the run.
      vocabulary: of the run.
      texts: one prompt each; may be empty.
      rows: keys of their randomness.
      frame: of the objective that the model was trained by.
      suffix: what follows the gap after each text; needs a frame that fills in.

    Raises:
      DecodingError: no texts, the tokenizer lacks a special token that is needed, or the frame has no gap.
    """
    if suffix and frame.between is None:
        raise DecodingError("a frame without a gap has no place for a suffix; choose one that fills in")
    start, before, between, after, answer = (
        _ids(vocabulary.specials, names)
        for names in (frame.start, frame.before, frame.between or (), frame.after, frame.answer)
    )
    mesh, rules = parallel.current()
    shards = math.prod(mesh.shape[axis] for axis in rules.activations["batch"])
    extra = -len(texts) % shards
    texts, rows = [*texts, *[texts[-1]] * extra], [*rows, *[rows[-1]] * extra]
    behind = vocabulary.encode(suffix)
    pairs = [(vocabulary.encode(text), behind) for text in texts]
    if frame.suffix_first:
        pairs = [(second, first) for first, second in pairs]
    sources = [np.concatenate([before, a, between, b, after]).astype(np.int32) for a, b in pairs]
    if model.config.encoder_depth == 0:
        whole = [np.concatenate([start, source, answer]) for source in sources]
        gaps = np.array([len(start) + len(before) + len(a) for a, _ in pairs], np.int32)
        return pad_prompts(whole, rows=rows, num_answer=len(answer))._replace(gaps=gaps)
    return pad_prompts([start + answer] * len(texts), encoder_prompts=sources, rows=rows, smallest=1)


def _ids(specials: SpecialTokens, names: Sequence[str]) -> list[int]:
    """Returns the ids of special tokens by their names."""
    found = []
    for name in names:
        token = specials.find(name)
        if token is None:
            raise DecodingError(f"the tokenizer has no {name!r} token to put around a prompt, as training did")
        found.append(token)
    return found


def _text_of(decoder: Decoder, tokens: np.ndarray) -> np.ndarray:
    """Returns the tokens without that which ends a target."""
    return tokens[~np.isin(tokens, decoder.stop_ids)]


def stream_text(
    decoder: Decoder,
    params: Any,
    vocabulary: Vocabulary,
    text: str,
    *,
    row: int = 0,
    seed: int = 0,
    frame: Frame = PLAIN,
    suffix: str = "",
) -> Iterator[str]:
    """Yields what continues `text`, up to the suffix, in pieces of whole characters, as they are made."""
    prompts = encode_prompts(decoder.model, vocabulary, [text], [row], frame, suffix)
    written = TextStream(vocabulary.decode)
    for tokens in decoder.stream(params, prompts, seed):
        yield written.push(_text_of(decoder, tokens[0]))
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
    suffix: str = "",
) -> Iterator[str]:
    """Yields what continues each text, up to the suffix, in order; text i has the randomness of row i."""
    for start in range(0, len(texts), batch_size):
        batch = texts[start : start + batch_size]
        prompts = encode_prompts(decoder.model, vocabulary, batch, range(start, start + len(batch)), frame, suffix)
        made = decoder.generate(params, prompts, seed)
        for i in range(len(batch)):
            yield vocabulary.decode(_text_of(decoder, made.row(i)))


def fit_max_tokens(
    model: Any, vocabulary: Vocabulary, texts: Sequence[str], most: int, frame: Frame = PLAIN, suffix: str = ""
) -> int:
    """Returns how many tokens can be made for each text within the model's max_length: 1 to `most`."""
    marks = (*frame.start, *frame.before, *(frame.between or ()), *frame.after, *frame.answer)
    around = len(marks) + len(vocabulary.encode(suffix)) - 1
    longest = 0 if model.config.encoder_depth else around + max(len(vocabulary.encode(text)) for text in texts)
    room = model.config.max_length - longest
    if frame.strides[1]:
        room = min(room, (model.config.num_block_positions - 1) // frame.strides[1])
    return max(1, min(most, room))
