"""Operations against XLA's own count of an unrolled program, and against the formula 6 N D."""

import dataclasses

import jax
import pytest

from lm import models
from lm.models import accounting

DECODER = models.Decoder(
    vocab_size=512, num_layers=2, model_dim=128, num_heads=4, num_kv_heads=2, mlp_dim=384, max_length=128
)


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
    ],
    ids=["decoder", "untied", "encoder", "encdec"],
)
def test_agrees_with_xla(config, encoder, make_batch):
    """Within 3 %, once the half of causal attention that XLA computes and masks is added."""
    length = 64
    batch = make_batch([[length]], encoder=None if encoder is None else [[encoder]])
    counted = config.flops_per_token(length, encoder) * length
    if config.decoder_depth:
        keys = length - accounting.mean_keys(length, None, causal=True)
        counted += 3 * config.decoder_depth * config.attention.flops(config, keys) * length
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
