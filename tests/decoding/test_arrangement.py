"""Taken apart, a model says the same: logits, cached logits and generated tokens, for every kind of stack."""

import dataclasses

import jax
import numpy as np
import pytest

from lm import models, parallel
from lm.decoding import Decoder, Sampling, arrange, pad_prompts
from lm.decoding.arrangement import take_apart

SMALL = {
    "vocab_size": 31,
    "num_layers": 4,
    "model_dim": 16,
    "num_heads": 4,
    "mlp_dim": 32,
    "max_length": 16,
    # Wide enough that no two logits come close.
    "initializer": models.NormalInitializer(stddev=0.5),
}
EXPERTS = models.MixtureOfExperts(num_experts=4, num_selected=2)
CONFIGS = {
    "alike": models.Decoder(**SMALL),
    "first_and_rest": models.Decoder(
        **SMALL, first_layers=(models.Layer(mlp=EXPERTS),), layers=(models.Layer(window=3), models.Layer())
    ),
    "latent": models.Decoder(
        **SMALL, attention=models.Latent(query_rank=None, kv_rank=8, nope_dim=4, rotary_dim=4, value_dim=4)
    ),
    "two_towers": dataclasses.replace(
        models.EncoderDecoder(**SMALL, positions=models.Bucketed(num_buckets=8, max_distance=16)), num_encoder_layers=2
    ),
}


@pytest.fixture(autouse=True)
def _mesh():
    with parallel.use(parallel.build_mesh(parallel.MeshConfig(), jax.devices()[:1]), parallel.DEFAULT_RULES):
        yield


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in ("alike", "latent") else ()) for name in CONFIGS]
)
def test_generates_the_same_tokens(name):
    model = CONFIGS[name].build()
    params = model.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    sources = [rng.integers(1, 31, length).tolist() for length in (8, 5)]
    if model.config.encoder_depth:
        prompts = pad_prompts([[1], [2]], encoder_prompts=sources, smallest=8)
    else:
        prompts = pad_prompts(sources, smallest=8)

    def generate(model, params):
        return Decoder(model=model, sampling=Sampling(temperature=0), max_tokens=4).generate(params, prompts)

    before, after = generate(model, params), generate(*take_apart(model, params))
    np.testing.assert_array_equal(before.tokens, after.tokens)
    np.testing.assert_allclose(before.log_probs, after.log_probs, rtol=1e-4, atol=1e-5)


def test_rounds_what_products_round_and_nothing_else():
    model = dataclasses.replace(CONFIGS["first_and_rest"], dtype="bfloat16").build()
    params = model.init(jax.random.key(0))
    _, apart = take_apart(model, params)
    dtypes = {models.path_name(path): leaf.dtype for path, leaf in jax.tree_util.tree_leaves_with_path(apart)}
    assert (
        dtypes["tokens/embedding"]
        == dtypes["decoder/stack/layers/block_3/attention/out/kernel_summed_last"]
        == "bfloat16"
    )
    assert dtypes["decoder/stack/layers/block_0/mlp/router/kernel"] == dtypes["decoder/final_norm/scale"] == "float32"


def test_shared_layers_stay_as_they_are():
    model = dataclasses.replace(CONFIGS["alike"], share_layers=True).build()
    params = model.init(jax.random.key(0))
    assert arrange(model, params) == (model, params)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="XLA:CPU alone widens")
def test_no_table_is_kept_in_float32_beside_the_one_that_is_read():
    model = dataclasses.replace(CONFIGS["alike"], dtype="bfloat16", vocab_size=4096).build()
    model, params = take_apart(model, model.init(jax.random.key(0)))
    decoder = Decoder(model=model, max_tokens=6, sampling=Sampling(temperature=0))
    state = jax.eval_shape(decoder.start, params, pad_prompts([[1, 2, 3]], smallest=8), jax.random.key(0))
    compiled = Decoder.advance.lower(decoder, params, state, np.int32(6)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * params["tokens"]["embedding"].size
