"""Laws of the loop: cached equals recomputed, rows are apart, chunks equal one go, stops stop."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm import models, parallel
from lm.batch import Batch
from lm.decoding import Decoder, DecodingError, Sampling, pad_prompts

VOCAB, WIDTH, MAX_TOKENS = 31, 8, 6
GREEDY = Sampling(temperature=0)

SMALL = {
    "vocab_size": VOCAB,
    "num_layers": 2,
    "model_dim": 16,
    "num_heads": 4,
    "mlp_dim": 32,
    "max_length": WIDTH + MAX_TOKENS,
    # Wide enough that no two logits come close.
    "initializer": models.NormalInitializer(stddev=0.5),
}
CONFIGS = {
    "rotary_gqa": models.Decoder(**SMALL, num_kv_heads=2),
    "learned": models.Decoder(**SMALL, positions=models.Learned(), norm=models.LayerNorm(), tied_embeddings=False),
    "window": models.Decoder(**SMALL, layers=(models.Layer(window=3), models.Layer())),
}


@pytest.fixture(autouse=True)
def _mesh():
    mesh = parallel.build_mesh(parallel.MeshConfig(), jax.devices()[:1])
    with parallel.use(mesh, parallel.DEFAULT_RULES):
        yield


@functools.cache
def make(name):
    model = CONFIGS[name].build()
    return model, model.init(jax.random.key(0))


def decoder(model, **changes):
    return Decoder(**({"model": model, "sampling": GREEDY, "max_tokens": MAX_TOKENS} | changes))


def prompts_of(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, length).tolist() for length in lengths]


def pad(prompts, **settings):
    return pad_prompts(prompts, smallest=WIDTH, **settings)


@functools.partial(jax.jit, static_argnums=0)
def full_log_probs(model, params, tokens, lengths, bidirectional):
    """f32[B, T, V] without a cache; the rows are `lengths` long."""
    slots = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    real = slots < lengths[:, None]
    positions = jnp.where(real, slots, 0)
    zeros = jnp.zeros(tokens.shape)
    batch = Batch(tokens, tokens, zeros, real.astype(jnp.int32), positions, bidirectional)
    return jax.nn.log_softmax(model.apply(params, batch).logits, axis=-1)


def recompute(model, params, prompts, is_prefix=False):
    """Greedy decoding by reading everything again for each token."""
    tokens = np.zeros((len(prompts), WIDTH + MAX_TOKENS), np.int32)
    lengths = np.asarray([len(p) for p in prompts], np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    bidirectional = is_prefix & (np.arange(tokens.shape[1])[None] < lengths[:, None])
    made = []
    for step in range(MAX_TOKENS):
        every = np.asarray(full_log_probs(model, params, tokens, lengths + step, bidirectional))
        last = every[np.arange(len(prompts)), lengths + step - 1]
        tokens[np.arange(len(prompts)), lengths + step] = last.argmax(1)
        made.append((last.argmax(1), last.max(1)))
    chosen, log_probs = zip(*made, strict=True)
    return np.stack(chosen, 1), np.stack(log_probs, 1)


@pytest.mark.parametrize("is_prefix", [False, True], ids=["causal", "prefix"])
@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=5, deadline=None)
@given(lengths=st.tuples(*[st.integers(1, WIDTH)] * 3), seed=st.integers(0, 99))
def test_cached_equals_recomputed(name, is_prefix, lengths, seed):
    model, params = make(name)
    prompts = prompts_of(*lengths, seed=seed)
    out = decoder(model, bidirectional_prompt=is_prefix).generate(params, pad(prompts))
    tokens, log_probs = recompute(model, params, prompts, is_prefix)
    np.testing.assert_array_equal(out.tokens, tokens)
    np.testing.assert_allclose(out.log_probs, log_probs, atol=2e-4)
    assert out.lengths.tolist() == [MAX_TOKENS] * 3
    assert not out.done.any()


@pytest.mark.parametrize("is_prefix", [False, True], ids=["causal", "prefix"])
def test_a_prompt_is_read_by_the_kernel_of_training_where_none_sees_ahead(is_prefix):
    """`Blocked` leaves out what lies ahead: right for causal prompts, wrong for a prefix that sees itself."""
    model, params = make("rotary_gqa")
    blocked = dataclasses.replace(model.config, attention=models.MultiHead(kernel=models.Blocked(blocks=2))).build()
    prompts = pad(prompts_of(WIDTH, 3))
    plain, other = (
        decoder(m, bidirectional_prompt=is_prefix).start(params, prompts, jax.random.key(0)) for m in (model, blocked)
    )
    for kept, expected in zip(jax.tree.leaves(other), jax.tree.leaves(plain), strict=True):
        if jnp.issubdtype(kept.dtype, jax.dtypes.prng_key):
            continue
        np.testing.assert_allclose(kept, expected, atol=1e-5)
    lowered = Decoder.start.lower(decoder(blocked, bidirectional_prompt=is_prefix), params, prompts, jax.random.key(0))
    # Scores of half of the queries with half of the keys, and not with the cache's slots.
    assert (f"tensor<2x2x2x{WIDTH // 2}x{WIDTH // 2}xf32>" in lowered.as_text()) == (not is_prefix)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_row_does_not_depend_on_the_rows_beside_it(name):
    model, params = make(name)
    prompts = prompts_of(3, 8, 1, 5)
    sampler = decoder(model, sampling=Sampling(temperature=1.5, top_p=0.95))
    together = sampler.generate(params, pad(prompts), seed=7)
    turned = sampler.generate(params, pad(prompts[::-1], rows=[3, 2, 1, 0]), seed=7)
    np.testing.assert_array_equal(turned.tokens[::-1], together.tokens)
    for i, prompt in enumerate(prompts):
        alone = sampler.generate(params, pad([prompt], rows=[i]), seed=7)
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[i])
        np.testing.assert_allclose(alone.log_probs[0], together.log_probs[i], atol=2e-4)


def test_randomness_is_keyed_by_seed_row_and_step():
    """With a model that says the same of everything, only the keys tell rows and steps apart."""
    model, params = make("rotary_gqa")
    flat = jax.tree.map(jnp.zeros_like, params)
    sampler = decoder(model, sampling=Sampling())
    prompts = [[1, 2, 3]] * 4
    out = sampler.generate(flat, pad(prompts, rows=[0, 1, 2, 0]), seed=1)
    np.testing.assert_array_equal(out.tokens[0], out.tokens[3])
    assert len({tuple(row) for row in out.tokens.tolist()}) == 3
    assert all(len(set(row)) > 1 for row in out.tokens.tolist())
    np.testing.assert_array_equal(sampler.generate(flat, pad(prompts, rows=[0, 1, 2, 0]), seed=1).tokens, out.tokens)
    assert (sampler.generate(flat, pad(prompts), seed=2).tokens != out.tokens).any()
    np.testing.assert_allclose(out.log_probs, -np.log(VOCAB), rtol=1e-5)


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_streaming_yields_what_generating_gives(chunk):
    model, params = make("rotary_gqa")
    prompts = pad(prompts_of(3, 8, 1))
    sampler = decoder(model, sampling=Sampling(top_k=20), stop_ids=tuple(range(10)))
    whole = sampler.generate(params, prompts, seed=3)
    parts = list(sampler.stream(params, prompts, seed=3, chunk=chunk))
    assert all(len(piece) <= chunk for part in parts for piece in part)
    for i in range(3):
        np.testing.assert_array_equal(np.concatenate([part[i] for part in parts]), whole.row(i))
    assert len(parts) == 1 + -(-(whole.lengths.max() - 1) // chunk)


def test_a_stop_ends_its_row_and_no_other():
    model, params = make("rotary_gqa")
    prompts = pad(prompts_of(3, 8, 1))
    free = decoder(model).generate(params, prompts)
    stop = int(free.tokens[0, 2])
    first = [row.index(stop) if stop in row else None for row in free.tokens.tolist()]
    out = decoder(model, stop_ids=(stop,)).generate(params, prompts)
    assert out.lengths[0] <= 3
    for i, at in enumerate(first):
        length = MAX_TOKENS if at is None else at + 1
        assert out.lengths[i] == length
        assert out.done[i] == (at is not None)
        np.testing.assert_array_equal(out.row(i), free.tokens[i, :length])
        np.testing.assert_allclose(out.log_probs[i, :length], free.log_probs[i, :length], atol=1e-5)
        assert not out.tokens[i, length:].any()
        assert not out.log_probs[i, length:].any()


def test_the_loop_ends_when_every_row_has():
    model, params = make("rotary_gqa")
    everything = decoder(model, stop_ids=tuple(range(VOCAB)))
    prompts = pad(prompts_of(3, 8))
    state = everything.advance(params, everything.start(params, prompts, jax.random.key(0)), np.int32(MAX_TOKENS))
    assert int(state.step) == 1
    assert state.lengths.tolist() == [1, 1]


def test_log_probs_are_the_models_own_whatever_the_sampling():
    model, params = make("learned")
    prompts = prompts_of(4, 7)
    sampler = decoder(model, sampling=Sampling(temperature=0.7, top_k=5))
    out = sampler.generate(params, pad(prompts), seed=5)
    for i, prompt in enumerate(prompts):
        row = np.zeros((1, WIDTH + MAX_TOKENS), np.int32)
        total = len(prompt) + MAX_TOKENS
        row[0, :total] = [*prompt, *out.tokens[i]]
        every = full_log_probs(model, params, row, np.asarray([total], np.int32), np.zeros(row.shape, bool))
        expected = np.asarray(every)[0, np.arange(len(prompt) - 1, total - 1), out.tokens[i]]
        np.testing.assert_allclose(out.log_probs[i], expected, atol=2e-4)


@pytest.mark.parametrize(
    "sampling", [GREEDY, Sampling(temperature=5.0), Sampling(top_k=3), Sampling(top_p=0.5)], ids=repr
)
def test_ids_beyond_the_vocabulary_are_never_made(sampling):
    model, params = make("rotary_gqa")
    out = decoder(model, sampling=sampling, num_ids=5).generate(params, pad(prompts_of(3, 8, 1, 4)))
    assert out.tokens.max() < 5
    assert np.isfinite(out.log_probs).all()


def test_small_temperature_is_greedy():
    model, params = make("learned")
    prompts = pad(prompts_of(4, 7))
    cold = decoder(model, sampling=Sampling(temperature=1e-6)).generate(params, prompts, seed=9)
    np.testing.assert_array_equal(cold.tokens, decoder(model).generate(params, prompts).tokens)


def test_one_compilation_serves_all_prompts_of_one_padded_shape():
    model, params = make("rotary_gqa")
    before = Decoder.start._cache_size(), Decoder.advance._cache_size()
    fresh = decoder(model, stop_ids=(VOCAB - 1,), sampling=Sampling(top_k=3))
    for lengths in ((1, 1), (8, 2), (5, 7)):
        fresh.generate(params, pad(prompts_of(*lengths)), seed=lengths[0])
        # An equal decoder, made again, is the same program; so is a stream.
        list(dataclasses.replace(fresh).stream(params, pad(prompts_of(*lengths)), chunk=lengths[1]))
    assert (Decoder.start._cache_size(), Decoder.advance._cache_size()) == (before[0] + 1, before[1] + 1)


def test_padding_beyond_a_table_of_positions_is_harmless():
    """Seven tokens padded to 16, in a model that has 14 positions."""
    model, params = make("learned")
    prompts = prompts_of(7, 2)
    wide = decoder(model).generate(params, pad_prompts(prompts, smallest=16))
    np.testing.assert_array_equal(wide.tokens, decoder(model).generate(params, pad(prompts)).tokens)
    assert np.isfinite(wide.log_probs).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 100}, "max_length 14"),
        ({"sampling": Sampling(top_k=0)}, "top_k"),
    ],
    ids=str,
)
def test_what_cannot_work_is_an_error(changes, message):
    model, params = make("learned")
    with pytest.raises(DecodingError, match=message):
        decoder(model, **changes).generate(params, pad(prompts_of(3)))
    with pytest.raises(DecodingError, match=message):
        next(decoder(model, **changes).stream(params, pad(prompts_of(3))))
