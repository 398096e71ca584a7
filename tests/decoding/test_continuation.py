"""Text in, text out, with the byte tokenizer."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from lm import models, parallel
from lm.data.tokenizers import ByteTokenizer
from lm.decoding import (
    Decoder,
    DecodingError,
    Sampling,
    build_decoder,
    complete_texts,
    encode_prompts,
    fit_max_tokens,
    stream_text,
)
from lm.document import Traits

BYTES = ByteTokenizer(0)
CAUSAL = Traits(layouts=frozenset({"decoder"}))
TEXTS = ["Once upon", "", "naïve \N{GRINNING FACE}", "a\nb"]


@functools.cache
def make():
    config = models.Decoder(
        vocab_size=BYTES.size + 9,
        num_layers=1,
        model_dim=16,
        num_heads=2,
        mlp_dim=16,
        max_length=40,
        initializer=models.NormalInitializer(stddev=0.5),
    )
    model = config.build()
    return model, model.init(jax.random.key(0))


@pytest.fixture(autouse=True)
def _mesh():
    mesh = parallel.build_mesh(parallel.MeshConfig(), jax.devices()[:1])
    with parallel.use(mesh, parallel.DEFAULT_RULES):
        yield


def build(traits=CAUSAL, **settings):
    return build_decoder(make()[0], BYTES, traits, Sampling(**settings), max_tokens=12)


def test_prompts_begin_with_bos_and_hold_the_text():
    prompts = encode_prompts(make()[0], BYTES, TEXTS, range(4))
    for i, text in enumerate(TEXTS):
        row = prompts.tokens[i, : prompts.lengths[i]]
        assert row[0] == BYTES.specials.bos
        assert BYTES.decode(row[1:]) == text


def test_streamed_at_once_alone_and_in_batches_are_the_same():
    model, params = make()
    decoder = build(temperature=1.0)
    whole = list(complete_texts(decoder, params, BYTES, TEXTS, seed=3))
    assert list(complete_texts(decoder, params, BYTES, TEXTS, seed=3, batch_size=3)) == whole
    assert len(set(whole)) == 4
    for i, text in enumerate(TEXTS):
        assert "".join(stream_text(decoder, params, BYTES, text, row=i, seed=3)) == whole[i]
    assert model.config.vocab_size > BYTES.size


def test_eos_ends_the_text_and_is_not_shown():
    """A model whose every row says eos at once gives no text."""
    _, params = make()
    decoder = dataclasses.replace(build(temperature=0), stop_ids=tuple(range(BYTES.size)))
    assert list(complete_texts(decoder, params, BYTES, TEXTS)) == [""] * 4
    assert build().stop_ids == (BYTES.specials.eos,)
    assert build().num_ids == BYTES.size


def test_a_prefix_objective_makes_the_prompt_bidirectional():
    assert not build().bidirectional_prompt
    assert build(dataclasses.replace(CAUSAL, bidirectional=True)).bidirectional_prompt


def test_what_does_not_generate_is_an_error():
    with pytest.raises(DecodingError, match="left to right"):
        build(Traits(layouts=frozenset({"encoder"}), autoregressive=False))


def test_fit_max_tokens():
    model, params = make()
    # bos, 9 bytes and the tokens made but the last, which nothing reads, are max_length 40.
    assert fit_max_tokens(model, BYTES, ["Once upon"], most=256) == 31
    assert fit_max_tokens(model, BYTES, ["Once upon", ""], most=8) == 8
    assert fit_max_tokens(model, BYTES, ["x" * 99], most=8) == 1
    decoder = dataclasses.replace(build(), max_tokens=31)
    assert len(list(complete_texts(decoder, params, BYTES, ["Once upon"]))) == 1
    with pytest.raises(DecodingError, match="max_length"):
        list(complete_texts(dataclasses.replace(decoder, max_tokens=32), params, BYTES, ["Once upon"]))


def test_rows_fill_up_the_mesh():
    """Three prompts on four devices, with parameters in shards, are what they are on one."""
    model, params = make()
    decoder = build(temperature=1.0)
    expected = list(complete_texts(decoder, params, BYTES, TEXTS[:3], seed=1))
    mesh = parallel.build_mesh(parallel.MeshConfig(data=1, fsdp=4), jax.devices()[:4])
    table = parallel.DEFAULT_RULES.parameters
    placed = jax.tree.map(
        lambda x, axes: jax.device_put(x, jax.sharding.NamedSharding(mesh, parallel.spec(axes, table))),
        params,
        model.axes(),
    )
    with parallel.use(mesh, parallel.DEFAULT_RULES):
        assert encode_prompts(model, BYTES, TEXTS[:3], range(3)).tokens.shape[0] == 4
        # The programs differ by mesh, which an equal decoder does not show.
        fresh = Decoder(**{field.name: getattr(decoder, field.name) for field in dataclasses.fields(decoder)})
        got = list(complete_texts(fresh, placed, BYTES, TEXTS[:3], seed=1))
    assert got == expected
    assert np.unique(got).size > 1
