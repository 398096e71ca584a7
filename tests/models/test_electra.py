"""The pair shares its embeddings, its losses are what the paper says, and gradients stay apart."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import models

CONFIG = models.Electra(
    vocab_size=50,
    num_layers=2,
    model_dim=16,
    num_heads=4,
    mlp_dim=24,
    max_length=32,
    generator_dim=8,
    generator_heads=2,
    generator_mlp_dim=12,
    generator_layers=1,
    norm=models.LayerNorm(),
    norm_placement="post",
    positions=models.Learned(),
    num_token_types=2,
    embedding_norm=True,
)


@pytest.fixture(name="case")
def _case(make_batch, shake):
    model = CONFIG.build()
    batch = make_batch([[6, 5], [9]])
    rng = np.random.default_rng(0)
    masked = (rng.random(batch.inputs.shape) < 0.3) & (np.asarray(batch.segment_ids) != 0)
    original = batch.inputs
    batch = batch._replace(
        targets=original, inputs=jnp.where(masked, 49, original), weights=jnp.asarray(masked, jnp.float32)
    )
    return model, shake(model.init(jax.random.key(0))), batch, original


def test_the_discriminator_is_an_encoder_of_its_own(case):
    model, params, batch, original = case
    output = model.apply(params, batch)
    made = model.generator.apply(model.generator_params(params), batch)
    np.testing.assert_array_equal(output.logits, made.logits)
    samples = jax.random.categorical(jax.random.key(0), made.logits, axis=-1)
    filled = jnp.where(batch.weights > 0, samples, original)
    seen = model.discriminator.apply(params["discriminator"], batch._replace(inputs=filled))
    logits = np.asarray(model.class_logits(params, seen.hidden)[..., 0], np.float64)
    replaced = np.asarray(filled != original)
    assert replaced.any()
    tokens = np.asarray(batch.segment_ids) != 0
    nll = np.where(replaced, np.log1p(np.exp(-logits)), np.log1p(np.exp(logits)))[tokens]
    np.testing.assert_allclose(output.losses["discriminator"].sum, 50 * nll.sum(), rtol=1e-5)
    assert float(output.losses["discriminator"].weight) == tokens.sum()
    assert float(output.metrics["replaced"].sum) == replaced.sum()


def test_the_discriminator_has_no_head_for_tokens():
    assert set(CONFIG.build().parameters()["discriminator"]) == {"tokens", "encoder", "classifier"}
    # So nothing must bring its width back to that of a factorised table; the generator's head does.
    assert CONFIG.head_transform is None
    assert dataclasses.replace(CONFIG, embedding_dim=8).problems() == []
    kept = CONFIG.discriminator
    fields = {field.name: getattr(kept, field.name) for field in dataclasses.fields(kept)}
    saved = models.Encoder(**fields).flops_per_token(32) - kept.flops_per_token(32)
    assert saved == 3 * 2 * CONFIG.vocab_size * CONFIG.model_dim


def test_tokens_that_are_sampled_right_count_as_original(case):
    """Where the generator happens to draw the original token, nothing was replaced (section 3.1)."""
    model, params, batch, original = case
    sure = jax.nn.one_hot(0, 50) * 1e4
    params["generator"]["head"]["bias"] = sure
    batch = batch._replace(targets=jnp.where(batch.weights > 0, 0, original))
    assert float(model.apply(params, batch).metrics["replaced"].sum) == 0


def test_embeddings_are_shared_and_gradients_are_not(case):
    model, params, batch, _ = case
    assert set(params["generator"]) == {"encoder", "head"}
    assert not set(params["generator"]["encoder"]) & {"positions", "types", "embedding_norm"}
    gradient = jax.grad(lambda params: model.apply(params, batch).losses["discriminator"].sum)(params)
    assert all(not np.asarray(x).any() for x in jax.tree.leaves(gradient["generator"]))
    assert np.asarray(gradient["discriminator"]["tokens"]["embedding"]).any()
    gradient = jax.grad(lambda params: model.apply(params, batch).logits.var())(params)
    assert np.asarray(gradient["discriminator"]["tokens"]["embedding"]).any()
    assert not np.asarray(gradient["discriminator"]["classifier"]["pooler"]["kernel"]).any()


def test_chunked_logits_and_keys(case):
    model, params, batch, _ = case
    output = model.apply(params, batch, with_logits=False)
    assert output.logits is None
    np.testing.assert_allclose(model.logits(params, output.hidden), model.apply(params, batch).logits, atol=1e-5)
    losses = [model.apply(params, batch, key=jax.random.key(i)).losses["discriminator"].sum for i in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


def test_costs_are_those_of_both():
    pair = CONFIG.generator.flops_per_token(32) + CONFIG.discriminator.flops_per_token(32)
    assert CONFIG.flops_per_token(32) == pair
    shared = 50 * 16 + 32 * 16 + 2 * 16 + 2 * 16
    counts = CONFIG.generator.num_parameters() + CONFIG.discriminator.num_parameters()
    assert CONFIG.num_parameters() == counts - shared


def test_problems_of_the_generator_are_found():
    import dataclasses

    assert CONFIG.problems() == []
    assert "num_heads" in dataclasses.replace(CONFIG, generator_heads=3).problems()[0]
