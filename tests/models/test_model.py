"""Laws of every model: causality, isolation of packed documents, cached = uncached, scan = loop, remat = plain."""

import dataclasses
import functools
import inspect

import hypothesis
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from lm import models
from lm.models.attention import Layout

SMALL = models.Decoder(
    vocab_size=50, num_layers=3, model_dim=16, num_heads=4, num_kv_heads=2, mlp_dim=24, max_length=32
)
# One decoder for each way in which a decoder may differ.
DECODERS = {
    "llama": SMALL,
    "gpt2": dataclasses.replace(
        SMALL,
        num_kv_heads=None,
        norm=models.LayerNorm(),
        positions=models.Learned(),
        attention=models.MultiHead(use_qkv_bias=True, use_output_bias=True),
        mlp=models.Mlp(activation="gelu_tanh", gated=False, use_bias=True),
    ),
    "multi_query_untied_post": dataclasses.replace(
        SMALL, num_kv_heads=1, tied_embeddings=False, norm_placement="post", positions=models.Sinusoidal()
    ),
    "qk_norm_soft_caps": dataclasses.replace(
        SMALL,
        attention=models.MultiHead(qk_norm="head", logit_softcap=2.0, sinks=True),
        final_logit_softcap=3.0,
        mlp=models.Mlp(activation="relu_squared", gated=False),
        norm_placement="sandwich",
    ),
    "parallel_alibi": dataclasses.replace(SMALL, parallel_block=True, positions=models.Alibi(), head_bias=True),
    "chunked_bucketed": dataclasses.replace(
        SMALL,
        attention=models.MultiHead(kernel=models.Chunked(chunk=4), scale=1.0),
        positions=models.Bucketed(num_buckets=8, max_distance=16),
        norm_placement="branch",
    ),
    "local_global": dataclasses.replace(
        SMALL,
        num_layers=6,
        first_layers=(models.Layer(mlp=models.Mlp(dim=40)),),
        layers=(models.Layer(window=3), models.Layer(positions=models.Rotary(theta=100.0, fraction=0.5))),
        norm_placement="deep",
    ),
    "latent": dataclasses.replace(
        SMALL, attention=models.Latent(query_rank=6, kv_rank=8, nope_dim=6, rotary_dim=4, value_dim=5)
    ),
    "shaw": dataclasses.replace(SMALL, positions=models.Relative(max_distance=3)),
}


@functools.cache
def compiled(model):
    return jax.jit(model.apply, static_argnames=("empty", "with_logits"))


def run(model, params, batch, **options):
    """Applies the model as a compiled program, kept for the whole file."""
    return compiled(model)(params, batch, **options)


every_decoder = pytest.mark.parametrize("config", DECODERS.values(), ids=DECODERS)


def some_decoders(*names):
    """Marks a costly law, which these decoders stand for."""
    return pytest.mark.parametrize("config", [DECODERS[name] for name in names], ids=names)


def make(config, shake):
    model = config.build()
    return model, shake(model.init(jax.random.key(0)))


@some_decoders("llama", "latent")
def test_causality_by_gradient(config, make_batch, shake):
    """No logit depends on a later token; every one depends on its own: by the gradient through the token table."""
    config = dataclasses.replace(config, tied_embeddings=False)
    model, params = make(config, shake)
    length = 6
    batch = make_batch([[length]])._replace(inputs=jnp.arange(1, length + 1)[None])

    def logits(table):
        return run(model, {**params, "tokens": {"embedding": table}}, batch).logits[0].sum(axis=-1)

    jacobian = jax.jacrev(lambda table: jnp.sin(logits(table)))(params["tokens"]["embedding"])[:, 1 : length + 1]
    depends = np.asarray(jnp.abs(jacobian).max(axis=-1) > 0)
    assert not np.triu(depends, 1).any()
    assert depends.diagonal().all()


@every_decoder
def test_a_bidirectional_prefix_is_seen_in_both_directions(config, make_batch, shake):
    model, params = make(config, shake)
    batch = make_batch([[8]], prefixes=[[5]])
    changed = batch._replace(inputs=batch.inputs.at[0, 4].set(batch.inputs[0, 4] % 48 + 1))
    same = np.asarray(run(model, params, batch).logits == run(model, params, changed).logits)[0].all(axis=-1)
    assert not same[:5].any()
    suffix = batch._replace(inputs=batch.inputs.at[0, 6].set(batch.inputs[0, 6] % 48 + 1))
    same = np.asarray(run(model, params, batch).logits == run(model, params, suffix).logits)[0].all(axis=-1)
    assert same[:6].all()
    assert not same[6:].any()


def logits_beside(model, params, batch, segment, run=run):
    """Logits of the other segments, for the batch and for the batch with one segment's tokens changed."""
    inside = batch.segment_ids == segment
    changed = batch._replace(inputs=jnp.where(inside, batch.inputs % 48 + 1, batch.inputs))
    outside = np.asarray(~inside & (batch.segment_ids != 0))
    return [np.asarray(run(model, params, b).logits)[outside] for b in (batch, changed)]


@every_decoder
def test_packed_documents_do_not_see_each_other(config, make_batch, shake):
    model, params = make(config, shake)
    batch = make_batch([[4, 5, 3]], length=14, prefixes=[[2, 2, 0]])
    for segment in (1, 2, 3):
        before, after = logits_beside(model, params, batch, segment)
        np.testing.assert_array_equal(before, after)


def test_the_isolation_test_fails_without_the_mask(make_batch, shake, monkeypatch):
    model, params = make(SMALL, shake)
    monkeypatch.setattr(Layout, "allowed", lambda layout: jnp.ones((1, 14, 14), jnp.bool_))
    batch, fresh = make_batch([[4, 5, 3]], length=14), inspect.unwrap(models.Model.apply)
    before, after = logits_beside(model, params, batch, 1, fresh)
    assert (before != after).any()


@every_decoder
def test_packed_equals_alone(config, make_batch, shake):
    model, params = make(config, shake)
    batch = make_batch([[4, 5, 3]], length=14)
    packed = run(model, params, batch).logits[0]
    alone = make_batch([[4], [5], [3]], length=5)
    starts = (0, 4, 9)
    tokens = jnp.stack([jax.lax.dynamic_slice(batch.inputs[0], (start,), (5,)) for start in starts])
    logits = run(model, params, alone._replace(inputs=tokens)).logits
    for row, (start, size) in enumerate(zip(starts, (4, 5, 3), strict=True)):
        np.testing.assert_allclose(packed[start : start + size], logits[row, :size], atol=1e-5)


@some_decoders("qk_norm_soft_caps", "chunked_bucketed")
def test_padding_is_finite_forward_and_backward(config, make_batch, shake):
    model, params = make(config, shake)
    batch = make_batch([[3], [0]], length=6)

    def loss(params):
        logits = run(model, params, batch).logits
        return jnp.sum(batch.weights[:, :, None] * logits**2) / batch.weights.sum()

    value, gradient = jax.value_and_grad(loss)(params)
    assert np.isfinite(value)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))


def decode(model, params, batch, lengths, prompts, steps, empty=False):
    """Prefills right-padded prompts of different lengths, then appends one token a row at a time."""
    num_rows, prompt_length = len(prompts), 6
    places = jnp.arange(prompt_length)[None, :]
    inside = (places < jnp.asarray(prompts)[:, None]).astype(jnp.int32)
    prefill = jax.tree.map(lambda x: x[:, :prompt_length], batch)
    prefill = prefill._replace(segment_ids=inside, inputs=prefill.inputs * inside)
    cache = model.init_cache(params, num_rows, prompt_length + steps)
    output = run(model, params, prefill, cache=cache, empty=empty)
    logits = [[output.logits[row, i] for i in range(prompts[row])] for row in range(num_rows)]
    for step in range(steps):
        at = jnp.asarray([prompt + step for prompt in prompts])[:, None]
        token = jax.tree.map(lambda x, at=at: jnp.take_along_axis(x, jnp.minimum(at, x.shape[1] - 1), axis=1), batch)
        token = token._replace(segment_ids=(at < jnp.asarray(lengths)[:, None]).astype(jnp.int32), positions=at)
        output = run(model, params, token, cache=output.cache)
        for row in range(num_rows):
            logits[row].append(output.logits[row, 0])
    return [jnp.stack(rows[:length]) for rows, length in zip(logits, lengths, strict=True)]


@every_decoder
@hypothesis.settings(max_examples=6, deadline=None, derandomize=True)
@hypothesis.given(prompts=st.lists(st.integers(1, 6), min_size=3, max_size=3), prefix=st.booleans())
def test_cached_equals_uncached(config, make_batch, shake, prompts, prefix):
    model, params = make(config, shake)
    steps = 4
    lengths = [prompt + steps for prompt in prompts]
    flags = [[prompt if prefix else 0] for prompt in prompts]
    batch = make_batch([[n] for n in lengths], length=10, prefixes=flags)
    full = run(model, params, batch).logits
    for row, cached in enumerate(decode(model, params, batch, lengths, prompts, steps, empty=not prefix)):
        np.testing.assert_allclose(cached, full[row, : lengths[row]], atol=2e-5, rtol=1e-5)


def loss_and_gradient(config, params, batch, key=None):
    model = config.build()

    def loss(params):
        return jnp.mean(jax.nn.logsumexp(run(model, params, batch, key=key).logits, axis=-1) ** 2)

    return jax.jit(jax.value_and_grad(loss))(params)


LOOPS = [
    ("llama", {"scan_layers": False}),
    ("llama", {"remat": "dots"}),
    ("local_global", {"remat": "full"}),
    ("local_global", {"remat": "dots_no_batch", "scan_layers": False}),
]


@pytest.mark.parametrize(("name", "changes"), LOOPS, ids=str)
def test_loop_and_remat_equal_the_scan(name, changes, make_batch, shake):
    """Forward, backward and dropout alike, on the same parameters."""
    # One run of layers is enough here: how runs follow each other is the same in every case.
    config = dataclasses.replace(DECODERS[name], dropout_rate=0.3, num_layers=4, first_layers=())
    other = dataclasses.replace(config, **changes)
    _, params = make(config, shake)
    batch = make_batch([[4, 5], [7]])
    expected = loss_and_gradient(config, params, batch, jax.random.key(3))
    got = loss_and_gradient(other, params, batch, jax.random.key(3))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-4), got, expected)


def test_dropout_depends_on_its_key_only(make_batch, shake):
    config = dataclasses.replace(SMALL, dropout_rate=0.5, attention=models.MultiHead(dropout_rate=0.5))
    model, params = make(config, shake)
    batch = make_batch([[6]])
    first, again, other, none = (
        run(model, params, batch, key=key).logits
        for key in (jax.random.key(1), jax.random.key(1), jax.random.key(2), None)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    assert not np.allclose(first, none)
    plain = run(model, params, batch).logits
    np.testing.assert_array_equal(none, plain)


@pytest.mark.parametrize("name", ["gpt2", "chunked_bucketed"])
def test_bfloat16_is_close_and_keeps_float32_where_it_must(name, make_batch, shake):
    model = DECODERS[name].build()
    low = dataclasses.replace(DECODERS[name], dtype="bfloat16")
    batch = make_batch([[5, 4], [9]])
    gradients = {config: jax.jit(functools.partial(loss_and_gradient, config)) for config in (low, DECODERS[name])}
    # Three draws: some weights magnify what is rounded (of eight, chunked_bucketed: 0.010 to 0.034; gpt2: 0.004).
    draws = [shake(model.init(jax.random.key(0)), seed, size=0.1) for seed in (1, 2, 3)]
    exact, output = run(model, draws[0], batch), run(low.build(), draws[0], batch)
    assert output.logits.dtype == jnp.float32
    assert output.hidden.dtype == jnp.bfloat16
    # Eight bits of mantissa: each of some ten roundings in a row is off by about 2^-9.
    error = jnp.sqrt(jnp.mean((exact.logits - output.logits) ** 2)) / jnp.std(exact.logits)
    assert float(error) < 0.03
    errors = []
    for params in draws:
        found, expected = (gradients[config](params, batch)[1] for config in (low, DECODERS[name]))
        assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(found))
        # All leaves together: alone, that of the keys' bias is zero, a softmax does not see what shifts all scores.
        found, expected = (jax.flatten_util.ravel_pytree(x)[0] for x in (found, expected))
        errors.append(float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected)))
    assert np.median(errors) < 0.03


@some_decoders("multi_query_untied_post", "qk_norm_soft_caps", "parallel_alibi")
def test_logits_may_be_computed_in_chunks(config, make_batch, shake):
    model, params = make(config, shake)
    batch = make_batch([[4, 5], [9]])
    whole = run(model, params, batch)
    hidden = run(model, params, batch, with_logits=False)
    assert hidden.logits is None
    chunks = [model.logits(params, hidden.hidden[:, i : i + 3]) for i in (0, 3, 6)]
    np.testing.assert_allclose(jnp.concatenate(chunks, axis=1), whole.logits, atol=1e-5)


def test_select_rows_of_a_cache(make_batch, shake):
    model, params = make(DECODERS["local_global"], shake)
    batch = make_batch([[4], [4], [4]])
    cache = run(model, params, batch, cache=model.init_cache(params, 3, 6)).cache
    rows = jnp.asarray([2, 0])
    chosen = jax.tree.map(lambda x: x[rows], batch)
    expected = run(model, params, chosen, cache=model.init_cache(params, 2, 6)).cache
    got = model.select_rows(cache, rows)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, expected)


def test_initial_values_depend_on_the_path_alone():
    """A wider or otherwise different model draws equal values for the parameters that it shares."""
    params = SMALL.build().init(jax.random.key(0))
    other = dataclasses.replace(SMALL, tied_embeddings=False, norm_placement="sandwich").build()
    shared = other.init(jax.random.key(0))
    np.testing.assert_array_equal(params["tokens"]["embedding"], shared["tokens"]["embedding"])
    kernels = [p["decoder"]["stack"]["layers"]["block_0"]["mlp"]["up"]["kernel"] for p in (params, shared)]
    np.testing.assert_array_equal(*kernels)
    jitted = jax.jit(SMALL.build().init)(jax.random.key(0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), jitted, params)


def test_without_a_mesh_the_model_refuses(make_batch, shake):
    from lm.parallel import axes

    model, params = make(SMALL, shake)
    scopes, axes._SCOPES[:] = list(axes._SCOPES), []
    try:
        with pytest.raises(RuntimeError, match="no mesh in force"):
            model.apply(params, make_batch([[3]]))
    finally:
        axes._SCOPES[:] = scopes
