"""GLM's blanks: prompts end in one, and what fills it stands where training had it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm import models, parallel
from lm.batch import Batch
from lm.data.tokenizers import ByteTokenizer
from lm.decoding import (
    DecodingError,
    Sampling,
    build_decoder,
    choose_frame,
    complete_texts,
    encode_prompts,
    fit_max_tokens,
    stream_text,
)
from lm.objectives import GLM, Causal, Component, Mixture, SuffixBlank
from lm.objectives.glm import arrange_blanks

BYTES = ByteTokenizer(0)
FRAME = choose_frame(GLM(blanks=SuffixBlank()).traits)
MAX_TOKENS = 6


@functools.cache
def make():
    config = models.Decoder(
        vocab_size=BYTES.size,
        num_layers=2,
        model_dim=16,
        num_heads=2,
        mlp_dim=16,
        max_length=32,
        num_block_positions=12,
        positions=models.Learned(),
        initializer=models.NormalInitializer(stddev=0.5),
    )
    model = config.build()
    return model, model.init(jax.random.key(0))


@pytest.fixture(autouse=True)
def _mesh():
    mesh = parallel.build_mesh(parallel.MeshConfig(), jax.devices()[:1])
    with parallel.use(mesh, parallel.DEFAULT_RULES):
        yield


def build(max_tokens=MAX_TOKENS, frame=FRAME):
    return build_decoder(make()[0], BYTES, frame, Sampling(temperature=0), max_tokens)


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params, batch):
    return model.apply(params, batch).logits


def recompute(text, behind):
    """Fills the blank before `behind` greedily, laid out by the objective itself and read again for each token."""
    model, params = make()
    made = []
    allowed = (BYTES.token_bytes > 0) | (np.arange(BYTES.size) == BYTES.specials.eop)
    for _ in range(MAX_TOKENS):
        # The token to be made is the last target; what stands for it is in no input but one after it.
        whole = np.concatenate([text, made, [99], behind]).astype(np.int32)
        blank = np.array([[len(text), len(whole) - len(behind)]])
        example = arrange_blanks(whole, blank, np.zeros(1, np.int64), BYTES.specials)
        size, width = len(example.inputs) - 1, 24

        def row(values, size=size, width=width):
            return jnp.asarray(np.pad(values[:size], (0, width - size))[None])

        batch = Batch(
            inputs=row(example.inputs),
            targets=row(example.targets),
            weights=row(example.weights),
            segment_ids=row(np.ones(size, np.int32)),
            positions=row(example.positions),
            bidirectional=row(example.bidirectional),
            block_positions=row(example.block_positions),
        )
        logits = np.asarray(_logits(model, params, batch))[0, size - 1]
        made.append(int(np.where(allowed, logits, -np.inf).argmax()))
        if made[-1] == BYTES.specials.eop:
            break
    return made


@settings(max_examples=6, deadline=None)
@given(texts=st.lists(st.text("abcdefg", max_size=8), min_size=3, max_size=3), suffix=st.text("abc", max_size=5))
def test_cached_is_what_the_objective_lays_out(texts, suffix):
    model, params = make()
    made = build().generate(params, encode_prompts(model, BYTES, texts, range(3), FRAME, suffix))
    behind = BYTES.encode(suffix)
    assert [made.row(i).tolist() for i in range(3)] == [recompute(BYTES.encode(text), behind) for text in texts]


def test_a_prompt_is_the_part_that_training_saw():
    """Text and mask, seen both ways, then the start of the blank at the mask's place."""
    text = BYTES.encode("abc")
    prompts = encode_prompts(make()[0], BYTES, ["abc"], [0], FRAME)
    prompt = prompts.tokens[0, : prompts.lengths[0]].tolist()
    example = arrange_blanks(np.append(text, 99), np.array([[3, 4]]), np.zeros(1, np.int64), BYTES.specials)
    assert prompt == example.inputs[:5].tolist()
    assert prompts.sources.tolist() == [example.bidirectional.sum()]


def test_the_end_of_the_blank_ends_the_text_and_is_not_shown():
    _, params = make()
    assert build().stop_ids == (BYTES.specials.eop,)
    assert BYTES.specials.eos in build().banned_ids
    # Where all logits are alike, the lowest id that may be made is the end of the blank.
    flat = {**params, "tokens": {"embedding": params["tokens"]["embedding"] * 0}}
    assert list(complete_texts(build(), flat, BYTES, ["ab"], frame=FRAME)) == [""]
    assert "".join(stream_text(build(), flat, BYTES, "ab", frame=FRAME)) == ""


def test_a_blank_is_no_longer_than_the_second_positions_reach():
    model, params = make()
    # Of 12 second positions 0 is outside, 1 the start, and ten are left for made tokens that are read; one more is not.
    assert fit_max_tokens(model, BYTES, ["ab"], 99, FRAME) == 11
    list(complete_texts(build(11), params, BYTES, ["ab"], frame=FRAME))
    with pytest.raises(DecodingError, match="at most 11"):
        list(complete_texts(build(12), params, BYTES, ["ab"], frame=FRAME))


def test_a_causal_part_of_a_mixture_has_second_positions_of_zero():
    """As `Mixture` gives to examples that have none."""
    mixture = Mixture(components=(Component(name="glm", objective=GLM()), Component(name="lm", objective=Causal())))
    model, params = make()
    frame = choose_frame(mixture.traits, "lm")
    made = build(frame=frame).generate(params, encode_prompts(model, BYTES, ["abc"], [0], frame)).row(0)
    tokens = np.asarray([BYTES.specials.bos, *BYTES.encode("abc"), *made[:-1]], np.int32)[None]
    zeros, places = np.zeros_like(tokens), np.arange(tokens.shape[1], dtype=np.int32)[None]
    flags = zeros.astype(bool)
    batch = Batch(tokens, tokens, zeros.astype(np.float32), zeros + 1, places, flags, block_positions=zeros)
    allowed = (BYTES.token_bytes > 0) | (np.arange(BYTES.size) == BYTES.specials.eos)
    logits = np.where(allowed, np.asarray(_logits(model, params, batch))[0, 3:], -np.inf)
    assert logits.argmax(-1).tolist() == made.tolist()
