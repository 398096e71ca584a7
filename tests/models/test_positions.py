"""Schemes against their formulas; scalings against the functions of `transformers`; only differences matter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import models


def test_rotation_sees_differences_only():
    """Products of rotated queries and keys depend on the difference of positions (Su et al., section 3.4)."""
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))
    rotary = models.Rotary(fraction=0.75)

    def product(i, j):
        return float(jnp.sum(rotary.rotate(q, jnp.asarray([[i]])) * rotary.rotate(k, jnp.asarray([[j]]))))

    assert product(3, 1) == pytest.approx(product(103, 101), abs=1e-4)
    assert product(3, 1) != pytest.approx(product(4, 1), abs=1e-3)
    np.testing.assert_array_equal(rotary.rotate(q, jnp.asarray([[7]]))[..., 12:], q[..., 12:])


def test_ntk_stretches_the_longest_wavelength_by_its_factor():
    plain, _ = models.Rotary().frequencies(64)
    scaled, _ = models.Rotary(scaling=models.NtkScaling(factor=4.0)).frequencies(64)
    assert scaled[0] == plain[0]
    assert plain[-1] / scaled[-1] == pytest.approx(4.0)


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_equals_transformers(truncate):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 256,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": truncate,
    }
    config = transformers.LlamaConfig(hidden_size=64, num_attention_heads=1, rope_parameters=scaling)
    expected, factor = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    ours = models.YarnScaling(
        factor=8.0, original_max_length=256, beta_fast=16.0, beta_slow=2.0, truncate=truncate
    ).frequencies(10_000.0, 64)
    np.testing.assert_allclose(ours[0], expected.numpy(), rtol=1e-6)
    assert ours[1] == pytest.approx(factor)


def test_sinusoids_of_the_paper():
    """PE(pos, 2i) = sin(pos / 10000^(2i/d)), PE(pos, 2i+1) = cos of the same (Vaswani et al., section 3.5)."""
    waves = models.Sinusoidal(interleaved=True).encode(jnp.asarray([[5, 9]]), 8)
    for i in range(4):
        np.testing.assert_allclose(waves[0, :, 2 * i], np.sin(np.array([5, 9]) / 10000 ** (2 * i / 8)), atol=1e-6)
        np.testing.assert_allclose(waves[0, :, 2 * i + 1], np.cos(np.array([5, 9]) / 10000 ** (2 * i / 8)), atol=1e-6)
    halves = models.Sinusoidal().encode(jnp.asarray([[5, 9]]), 8)
    np.testing.assert_array_equal(halves, jnp.concatenate([waves[..., 0::2], waves[..., 1::2]], axis=-1))


@pytest.mark.parametrize("causal", [True, False])
def test_buckets_equal_transformers(causal):
    pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = np.arange(-300, 300)
    expected = T5Attention._relative_position_bucket(torch.tensor(distance), not causal, 32, 128).numpy()
    np.testing.assert_array_equal(models.Bucketed().buckets(jnp.asarray(distance), causal), expected)


def test_alibi_slopes():
    """8 heads: 1/2 ... 1/256; 12 heads: those of 8, then every second of 16 (Press et al., section 3)."""
    np.testing.assert_allclose(models.Alibi().slopes(8), 2.0 ** -np.arange(1, 9))
    np.testing.assert_allclose(models.Alibi().slopes(12)[8:], 2.0 ** -np.array([0.5, 1.5, 2.5, 3.5]))


def test_shaw_equals_the_definition():
    """Scores and results with a vector for each clipped distance, a pair at a time (Shaw et al., equations 3 to 5)."""
    from lm.models.attention import Chunked, Layout, Plain, RelativeVectors, Scoring, Side

    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, 7, 2, 4)) for _ in range(3))
    tables = rng.normal(size=(2, 7, 4))
    places = jnp.arange(7)[None]
    side = Side(jnp.ones_like(places), places, places > 99, places[0])
    scheme = models.Relative(max_distance=3)
    relative = RelativeVectors(*map(jnp.asarray, tables.astype(np.float32)), scheme.relative_rows)
    expected = np.zeros_like(q)
    for n, i in np.ndindex(2, 7):
        rows = np.clip(np.arange(7) - i, -3, 3) + 3
        scores = (k[0, :, n] + tables[0, rows]) @ q[0, i, n] * 0.5
        weights = np.where(np.arange(7) <= i, np.exp(scores), 0)
        expected[0, i, n] = weights / weights.sum() @ (v[0, :, n] + tables[1, rows])
    arguments = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    for kernel in (Plain(), Chunked(chunk=3)):
        out = kernel.attend(*arguments, Layout(side, side, True), Scoring(scale=0.5, relative=relative))
        np.testing.assert_allclose(out, expected, atol=1e-5)
