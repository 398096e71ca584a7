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
    choose_frame,
    complete_texts,
    encode_prompts,
    fit_max_tokens,
    stream_text,
)
from lm.document import PLAIN
from lm.objectives import UL2, Causal, Component, MaskedLM, Mixture, PrefixLM, TextToText
from lm.objectives.ul2 import suffix

BYTES = ByteTokenizer(0)
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


def build(frame=PLAIN, **settings):
    return build_decoder(make()[0], BYTES, frame, Sampling(**settings), max_tokens=12)


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
    assert build(choose_frame(PrefixLM().traits)).bidirectional_prompt
    assert not build(choose_frame(PrefixLM(format=TextToText(prefix="causal")).traits)).bidirectional_prompt


def test_what_does_not_generate_is_an_error():
    with pytest.raises(DecodingError, match="left to right"):
        choose_frame(MaskedLM().traits)


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


def test_nothing_but_text_and_its_end_is_made():
    """With all ids alike, every one that may be made is: the bytes, and eos."""
    model, params = make()
    decoder = dataclasses.replace(build(temperature=1.0), max_tokens=24)
    flat = jax.tree.map(np.zeros_like, params)
    prompts = encode_prompts(model, BYTES, ["a"] * 64, range(64))
    tokens = decoder.generate(flat, prompts).tokens
    made = set(tokens[tokens > 0].tolist())
    text = set(np.flatnonzero(BYTES.token_bytes > 0).tolist())
    assert made <= text | {BYTES.specials.eos}
    assert BYTES.specials.eos in made
    assert len(made) > 0.9 * len(text)


def test_a_mode_token_announces_the_prompt_as_in_training():
    objective = UL2(mode_tokens=True)
    traits, vocabulary = objective.traits, ByteTokenizer(2)
    specials, text = vocabulary.specials, vocabulary.encode("ab").tolist()
    first = specials.sentinels[0]
    sources = {"R": [*text, first], "S": text, "X": [*text, first]}
    answers = {"R": [first], "S": [], "X": [first]}
    for mode, token in zip("RSX", specials.modes, strict=True):
        prompts = encode_prompts(make()[0], vocabulary, ["ab"], [0], choose_frame(traits, mode=mode))
        row = prompts.tokens[0, : prompts.lengths[0]].tolist()
        assert row == [specials.bos, token, *sources[mode], specials.eos, *answers[mode]]
    assert choose_frame(traits).mode == "S"
    assert choose_frame(UL2(denoisers=tuple(d for d in objective.denoisers if d.mode != "S")).traits).mode == "R"
    assert choose_frame(UL2(mode_tokens=False).traits).mode is None
    # The mode counts among what the row must hold.
    frame = choose_frame(traits)
    decoder = build_decoder(make()[0], BYTES, frame, Sampling(), fit_max_tokens(make()[0], BYTES, ["ab"], 99, frame))
    prompts = encode_prompts(make()[0], BYTES, ["ab"], [0], frame)
    decoder.check(prompts)
    with pytest.raises(DecodingError, match="max_length"):
        dataclasses.replace(decoder, max_tokens=decoder.max_tokens + 1).check(prompts)


MIXTURE = Mixture(
    components=(
        Component(name="mlm", objective=MaskedLM()),
        Component(name="lm", objective=Causal()),
        Component(name="ul2", objective=UL2(denoisers=(suffix(0.5),))),
    )
)


def test_a_mixture_prompts_as_the_component_that_is_asked_for():
    assert choose_frame(MIXTURE.traits) == PLAIN
    assert choose_frame(MIXTURE.traits, "ul2").mode == "S"
    assert choose_frame(MIXTURE.traits, "ul2").bidirectional
    assert not choose_frame(MIXTURE.traits, "lm").bidirectional


@pytest.mark.parametrize(
    ("traits", "component", "mode", "words"),
    [
        (MIXTURE.traits, "glm", None, "no component 'glm' to prompt as; those that generate are lm, ul2"),
        (MIXTURE.traits, "mlm", None, "those that generate are lm, ul2"),
        (Causal().traits, "lm", None, "it is no mixture"),
        (Causal().traits, None, "S", "no mode 'S' to prompt in; no mode token announced its examples"),
        (MIXTURE.traits, "ul2", "X", "no mode 'X' to prompt in; there are S"),
        (UL2().traits, None, "s", "there are R, S, X"),
        (UL2(mode_tokens=False).traits, None, "R", "no mode token announced"),
    ],
)
def test_names_that_are_not_there_are_answered_by_those_that_are(traits, component, mode, words):
    with pytest.raises(DecodingError, match=words) as error:
        choose_frame(traits, component, mode)
    assert len(str(error.value).splitlines()) == 1


def test_a_tokenizer_without_the_modes_is_an_error():
    class Plain:
        specials = dataclasses.replace(BYTES.specials, modes=())
        encode = BYTES.encode

    with pytest.raises(DecodingError, match=r"no 'modes\[1\]' token"):
        encode_prompts(make()[0], Plain(), ["ab"], [0], choose_frame(UL2().traits))
