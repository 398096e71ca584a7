"""Operations against XLA's own count of an unrolled program, and against the formula 6 N D."""

import dataclasses

import jax
import pytest

from lm import models, parallel
from lm.models import accounting

DECODER = models.Decoder(
    vocab_size=512, num_layers=2, model_dim=128, num_heads=4, num_kv_heads=2, mlp_dim=384, max_length=128
)
# A capacity that even routing fills: XLA counts the rows of experts, filled or not.
MIXTURE = models.MixtureOfExperts(
    num_experts=4,
    num_selected=2,
    dim=256,
    shared=models.SharedExpert(dim=64, gated=True),
    dispatch=models.Capacity(factor=1.0),
)
FACTORISED = models.Encoder(
    vocab_size=512,
    num_layers=2,
    model_dim=128,
    num_heads=4,
    mlp_dim=512,
    embedding_dim=64,
    head_transform=models.HeadTransform(),
    share_layers=True,
)
LATENT = models.Latent(query_rank=64, kv_rank=32, nope_dim=32, rotary_dim=16, value_dim=32)


def xla_flops(config, batch):
    """Operations of loss and gradient, by XLA, with layers written out (a loop's body is counted once)."""
    model = dataclasses.replace(config, scan_layers=False).build()
    params = jax.eval_shape(model.init, jax.random.key(0))

    def loss(params, batch):
        return model.apply(params, batch).logits.var()

    return jax.jit(jax.grad(loss)).lower(params, batch).compile().cost_analysis()["flops"]


@pytest.mark.parametrize(
    ("config", "encoder"),
    [
        (DECODER, None),
        (dataclasses.replace(DECODER, tied_embeddings=False, positions=models.Learned()), None),
        (models.Encoder(vocab_size=512, num_layers=2, model_dim=128, num_heads=4, mlp_dim=512), None),
        (models.EncoderDecoder(vocab_size=512, num_layers=2, model_dim=128, num_heads=4, mlp_dim=512), 96),
        (dataclasses.replace(DECODER, mlp=MIXTURE, first_layers=(models.Layer(mlp=models.Mlp()),)), None),
        (dataclasses.replace(DECODER, layers=(models.Layer(window=16), models.Layer())), None),
        (dataclasses.replace(DECODER, attention=LATENT, num_kv_heads=None), None),
        (FACTORISED, None),
    ],
    ids=["decoder", "untied", "encoder", "encdec", "mixture", "window", "latent", "factorised"],
)
def test_agrees_with_xla(config, encoder, make_batch):
    """Within 3 %, once the half of causal attention that XLA computes and masks is added."""
    length = 64
    batch = make_batch([[length]], encoder=None if encoder is None else [[encoder]])
    counted = config.flops_per_token(length, encoder) * length
    for _, layers, repeats in config.runs(config.decoder_depth):
        for layer in layers:
            keys = length - accounting.mean_keys(length, layer.window, causal=True)
            counted += 3 * repeats * config.attention.flops(config, keys) * length
    assert counted == pytest.approx(xla_flops(config, batch), rel=0.03)


def test_six_n_d():
    """6 N D for the matrices, and 6 N H (T + 1) a layer and token for causal attention (12 N H T, halved)."""
    config = dataclasses.replace(DECODER, tied_embeddings=False)
    matrices = 2 * (128 * 128 * 2 + 2 * 128 * 64 + 3 * 128 * 384) + 128 * 512
    assert config.flops_per_token(100) == pytest.approx(6 * matrices + 2 * 6 * 4 * 32 * 101)


def test_a_window_caps_the_keys():
    for window in (1, 3, 10, 20):
        keys = [min(i + 1, window) for i in range(10)]
        assert accounting.mean_keys(10, window, causal=True) == pytest.approx(sum(keys) / 10)


def test_shared_layers_count_each_time():
    config = models.Encoder(vocab_size=64, num_layers=4, model_dim=32, num_heads=4, mlp_dim=64)
    shared = dataclasses.replace(config, share_layers=True)
    assert shared.flops_per_token(16) == config.flops_per_token(16)
    assert shared.num_parameters() < config.num_parameters()


def test_of_experts_only_the_selected_are_active():
    config = dataclasses.replace(DECODER, mlp=MIXTURE)
    expert = 3 * 128 * 256
    idle = 2 * 2 * expert
    assert config.num_parameters() - config.num_active_parameters() == idle
    more = dataclasses.replace(config, mlp=dataclasses.replace(MIXTURE, num_experts=64))
    router = 2 * 128 * 60
    assert more.num_active_parameters() - config.num_active_parameters() == router
    assert more.flops_per_token(16) - config.flops_per_token(16) == pytest.approx(6 * router)


def test_dense_models_are_all_active_and_sequences_are_their_tokens():
    assert DECODER.num_active_parameters() == DECODER.num_parameters()
    assert DECODER.flops_per_example(100) == 100 * DECODER.flops_per_token(100)


def test_a_cache_on_cpus_is_float32():
    """Where the mesh has CPUs: of bfloat16, XLA would convert the whole to write one slot."""
    config = dataclasses.replace(DECODER, dtype="bfloat16")
    assert {leaf.dtype.name for leaf in config.attention.init_cache(config, 1, 2).values()} == {"float32"}
    with parallel.shapes_only():
        assert {leaf.dtype.name for leaf in config.attention.init_cache(config, 1, 2).values()} == {"bfloat16"}


def test_bytes_of_cache():
    """2 K H a layer for keys and values; DeepSeek-V3 has 512 + 64 numbers a layer (DeepSeek-V2, section 2.1.4)."""
    assert DECODER.cache_bytes_per_token() == 2 * 2 * 2 * 32 * 4
    assert dataclasses.replace(DECODER, dtype="bfloat16").cache_bytes_per_token() == 2 * 2 * 2 * 32 * 2
    latent = models.Latent(kv_rank=512, rotary_dim=64)
    assert dataclasses.replace(DECODER, attention=latent).cache_bytes_per_token() == 2 * (512 + 64) * 4
    assert models.Encoder(vocab_size=8).cache_bytes_per_token() == 0
    params = DECODER.build().init_cache({}, 3, 5)["layers"]
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(params)) == 15 * DECODER.cache_bytes_per_token()
