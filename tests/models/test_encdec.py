"""Laws of encoder-decoders: cross attention stays inside the segment, the cache keeps the encoder's result."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import models

T5 = models.EncoderDecoder(
    vocab_size=50,
    num_layers=2,
    num_encoder_layers=3,
    model_dim=16,
    num_heads=4,
    mlp_dim=24,
    max_length=32,
    positions=models.Bucketed(num_buckets=8, max_distance=16),
    attention=models.MultiHead(scale=1.0),
    mlp=models.Mlp(activation="relu", gated=False),
    scale_logits=True,
    initializer=models.FanInInitializer(),
)
VASWANI = dataclasses.replace(
    T5,
    positions=models.Sinusoidal(),
    norm=models.LayerNorm(),
    norm_placement="post",
    attention=models.MultiHead(qk_norm="head", use_qkv_bias=True),
    scale_embeddings=True,
    tied_embeddings=False,
)
every_model = pytest.mark.parametrize("config", [T5, VASWANI], ids=["t5", "vaswani"])


@pytest.fixture(name="make_case")
def _make_case(make_batch, shake):
    def make_case(config, rows, encoder, **options):
        model = config.build()
        return model, shake(model.init(jax.random.key(0))), make_batch(rows, encoder=encoder, **options)

    return make_case


@every_model
def test_packed_pairs_do_not_see_each_other(config, make_case):
    model, params, batch = make_case(config, [[3, 5]], [[6, 4]])
    apply = jax.jit(model.apply)
    before = apply(params, batch).logits
    first = batch._replace(encoder_inputs=jnp.where(batch.encoder_segment_ids == 1, 7, batch.encoder_inputs))
    after = apply(params, first).logits
    np.testing.assert_array_equal(before[:, 3:], after[:, 3:])
    assert (before[:, :3] != after[:, :3]).all(axis=-1).all()
    second = batch._replace(inputs=jnp.where(batch.segment_ids == 2, 7, batch.inputs))
    np.testing.assert_array_equal(before[:, :3], apply(params, second).logits[:, :3])


@every_model
def test_the_decoder_is_causal_and_reads_all_of_the_encoder(config, make_case):
    model, params, batch = make_case(config, [[6]], [[5]])
    apply = jax.jit(model.apply)
    before = apply(params, batch).logits[0]
    later = apply(params, batch._replace(inputs=batch.inputs.at[0, 4].set(7))).logits[0]
    same = np.asarray(before == later).all(axis=-1)
    assert same[:4].all()
    assert not same[4:].any()
    source = apply(params, batch._replace(encoder_inputs=batch.encoder_inputs.at[0, 4].set(7))).logits[0]
    assert not np.asarray(before == source).all(axis=-1).any()


@every_model
def test_cached_equals_uncached(config, make_case):
    """Ragged sources and targets; the encoder is read once."""
    model, params, batch = make_case(config, [[8], [6], [8]], [[5], [7], [2]])
    full = jax.jit(model.apply)(params, batch).logits
    cache = model.init_cache(params, 3, 8, batch)
    decoder = batch._replace(encoder_inputs=None, encoder_segment_ids=None, encoder_positions=None)
    step = jax.jit(lambda token, cache: model.apply(params, token, cache=cache))
    logits = []
    for start, stop in [(0, 3), (3, 4), (4, 5), (5, 8)]:
        part = jax.tree.map(lambda x, start=start, stop=stop: x[:, start:stop], decoder)
        output = step(part, cache)
        cache = output.cache
        logits.append(output.logits)
    tokens = np.asarray(batch.segment_ids) != 0
    np.testing.assert_allclose(jnp.concatenate(logits, axis=1)[tokens], full[tokens], atol=2e-5)


def test_a_batch_without_a_source_is_refused(make_case):
    model, params, batch = make_case(T5, [[3]], [[3]])
    with pytest.raises(ValueError, match="no encoder_inputs"):
        model.apply(params, batch._replace(encoder_inputs=None, encoder_segment_ids=None))
    with pytest.raises(ValueError, match="needs a batch"):
        model.init_cache(params, 1, 3)


def test_deep_norm_weights():
    """Wang et al. 2022, figure 2: the constants of each tower."""
    config = dataclasses.replace(T5, norm_placement="deep", num_encoder_layers=6, num_layers=12)
    alpha, beta = config.deep_norm(causal=True)
    assert (alpha, beta) == pytest.approx(((3 * 12) ** 0.25, (12 * 12) ** -0.25))
    alpha, beta = config.deep_norm(causal=False)
    mixed = (6**4 * 12) ** (1 / 16)
    assert (alpha, beta) == pytest.approx((0.81 * mixed, 0.87 / mixed))
    params = dataclasses.replace(config, num_layers=2, num_encoder_layers=2).build().init(jax.random.key(0))
    block = params["decoder"]["stack"]["layers"]["block_0"]
    deviations = [float(jnp.std(block["attention"][name]["kernel"])) for name in ("value", "key")]
    assert deviations[0] / deviations[1] == pytest.approx(24**-0.25, rel=0.1)


def test_what_cannot_work_is_said():
    assert T5.problems() == []
    config = dataclasses.replace(
        T5,
        parallel_block=True,
        num_block_positions=3,
        share_layers=True,
        attention=models.Latent(),
        positions=models.Bucketed(num_buckets=6, max_distance=2),
    )
    problems = "\n".join(config.problems())
    for name in (
        "parallel_block",
        "num_block_positions",
        "share_layers",
        "attention: latent",
        "positions: latent",
        "positions.num_buckets",
        "positions.max_distance",
    ):
        assert f"config.model.{name}" in problems
