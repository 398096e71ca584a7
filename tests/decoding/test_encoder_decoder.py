"""The loop with a model that has an encoder: it reads once, and each row reads its own."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import models, parallel
from lm.batch import Batch, Document, Lengths
from lm.data.tokenizers import ByteTokenizer
from lm.decoding import Decoder, DecodingError, Sampling, complete_texts, encode_prompts, pad_prompts, stream_text
from lm.document import Context
from lm.models.transformer import Transformer
from lm.objectives import BART, PrefixLM, SpanCorruption

VOCAB, MAX_TOKENS = 31, 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoTowers(Transformer):
    """The least model with an encoder that a decoder reads."""

    @property
    def encoder_depth(self):
        return self.num_layers

    @property
    def decoder_depth(self):
        return self.num_layers


@functools.cache
def make(vocab_size=VOCAB):
    config = TwoTowers(
        vocab_size=vocab_size,
        num_layers=2,
        model_dim=16,
        num_heads=2,
        mlp_dim=16,
        max_length=32,
        initializer=models.NormalInitializer(stddev=0.5),
    )
    model = config.build()
    return model, model.init(jax.random.key(0))


@pytest.fixture(autouse=True)
def _mesh():
    mesh = parallel.build_mesh(parallel.MeshConfig(), jax.devices()[:1])
    with parallel.use(mesh, parallel.DEFAULT_RULES):
        yield


def sources(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, length).tolist() for length in lengths]


def greedy(model):
    return Decoder(model=model, sampling=Sampling(temperature=0), max_tokens=MAX_TOKENS)


def pad(encoder_prompts):
    return pad_prompts([[1]] * len(encoder_prompts), encoder_prompts=encoder_prompts, smallest=8)


@functools.partial(jax.jit, static_argnums=0)
def full_logits(model, params, tokens, length, prompts):
    """f32[B, T, V] without a cache, of the first `length` tokens."""
    slots = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    segment_ids = (slots < length).astype(jnp.int32)
    encoder_slots = jnp.broadcast_to(jnp.arange(prompts.encoder_tokens.shape[1])[None], prompts.encoder_tokens.shape)
    encoder_segment_ids = (encoder_slots < prompts.encoder_lengths[:, None]).astype(jnp.int32)
    batch = Batch(tokens, tokens, jnp.zeros(tokens.shape), segment_ids, slots, jnp.zeros(tokens.shape, bool))
    batch = batch._replace(
        encoder_inputs=prompts.encoder_tokens,
        encoder_segment_ids=encoder_segment_ids,
        encoder_positions=encoder_slots * encoder_segment_ids,
    )
    return model.apply(params, batch).logits


@pytest.mark.parametrize("seed", range(2))
def test_cached_equals_recomputed(seed):
    model, params = make()
    prompts = pad(sources(3, 8, 1, seed=seed))
    out = greedy(model).generate(params, prompts)
    tokens = np.zeros((3, 1 + MAX_TOKENS), np.int32)
    tokens[:, 0] = 1
    for step in range(MAX_TOKENS):
        tokens[:, step + 1] = np.asarray(full_logits(model, params, tokens, step + 1, prompts))[:, step].argmax(1)
    np.testing.assert_array_equal(out.tokens, tokens[:, 1:])
    assert len({tuple(row) for row in out.tokens.tolist()}) == 3


def test_the_encoder_reads_once():
    """After the start the encoder's parameters may be anything."""
    model, params = make()
    decoder, prompts = greedy(model), pad(sources(3, 8, 1))
    expected = decoder.generate(params, prompts)
    state = decoder.start(params, prompts, jax.random.key(0))
    spoiled = {**params, "encoder": jax.tree.map(lambda x: x * jnp.nan, params["encoder"])}
    state = decoder.advance(spoiled, state, np.int32(MAX_TOKENS))
    np.testing.assert_array_equal(state.tokens, expected.tokens)
    np.testing.assert_allclose(state.log_probs, expected.log_probs, rtol=1e-5)


def test_a_row_reads_its_own_source_only():
    model, params = make()
    texts = sources(3, 8, 5)
    together = greedy(model).generate(params, pad(texts))
    for i, text in enumerate(texts):
        np.testing.assert_array_equal(greedy(model).generate(params, pad([text])).tokens[0], together.tokens[i])


def test_text_goes_to_the_encoder():
    vocabulary = ByteTokenizer(2)
    model, params = make(vocabulary.size)
    frame, specials = SpanCorruption().traits.frame, vocabulary.specials
    first = specials.sentinels[0]
    prompts = encode_prompts(model, vocabulary, ["hello", ""], [0, 1], frame)
    assert prompts.tokens.tolist() == [[specials.bos, first]] * 2
    assert prompts.encoder_tokens[0, :7].tolist() == [*vocabulary.encode("hello"), first, specials.eos]
    assert prompts.encoder_lengths.tolist() == [7, 2]
    decoder = dataclasses.replace(greedy(model), num_ids=vocabulary.size)
    whole = list(complete_texts(decoder, params, vocabulary, ["hello", ""], frame=frame))
    assert "".join(stream_text(decoder, params, vocabulary, "hello", frame=frame)) == whole[0]


@pytest.mark.parametrize("objective", [PrefixLM(), SpanCorruption(), BART(mask_rate=0.0, permute_rate=0.0)])
def test_prompts_stand_where_sources_stood_in_training(objective):
    vocabulary = ByteTokenizer(100)
    text = "one two three four five six."
    document = Document("0", text, vocabulary.encode(text))
    model, _ = make(vocabulary.size)
    frame = objective.traits.frame
    context = Context(vocabulary, Lengths(64, 64), 0, 0, 0, lambda rng: document)
    (example,) = objective.examples(document, context)
    made = encode_prompts(model, vocabulary, [text], [0], frame)
    source = made.encoder_tokens[0, : made.encoder_lengths[0]]
    before, after = len(frame.before), len((*(frame.between or ()), *frame.after))
    assert source.tolist()[before : len(source) - after] == vocabulary.encode(text).tolist()
    assert source[:before].tolist() == example.encoder_inputs[:before].tolist()
    assert source[len(source) - after :].tolist() == example.encoder_inputs[-after:].tolist()
    begin = made.tokens[0, : made.lengths[0]].tolist()
    assert begin == example.inputs[: 1 + len(frame.answer)].tolist()
    # In one stack the same comes one after the other.
    (example,) = objective.examples(document, dataclasses.replace(context, lengths=Lengths(140)))
    alone = encode_prompts(SimpleNamespace(config=SimpleNamespace(encoder_depth=0)), vocabulary, [text], [0], frame)
    prompt = alone.tokens[0, : alone.lengths[0]].tolist()
    num_visible = int(example.bidirectional.sum())
    visible, hidden = example.inputs[:num_visible], example.inputs[num_visible:]
    assert prompt == [begin[0], *source, *begin[1:]]
    assert prompt[: 1 + before] == visible[: 1 + before].tolist()
    assert prompt[alone.sources[0] - after : alone.sources[0]] == visible[-after:].tolist()
    assert prompt[alone.sources[0] :] == hidden[: len(frame.answer)].tolist()


def test_a_source_that_is_too_long_is_an_error():
    model, params = make()
    with pytest.raises(DecodingError, match="encoder prompt of 40 tokens"):
        greedy(model).generate(params, pad(sources(40)))
