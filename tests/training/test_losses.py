"""Token losses against the formulas in float64, and the chunked form against the whole one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.experiment import LossConfig
from lm.models.products import contract
from lm.training.losses import chunked_cross_entropy, cross_entropy


def _random(seed=0, shape=(3, 7, 11)):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=shape).astype(np.float32) * 3
    targets = rng.integers(0, shape[-1], shape[:-1]).astype(np.int32)
    weights = rng.integers(0, 2, shape[:-1]).astype(np.float32)
    return logits, targets, weights


def _formula(logits, targets, weights, z_loss=0.0, smoothing=0.0):
    """The definition, in float64."""
    logits = logits.astype(np.float64)
    size = logits.shape[-1]
    log_z = np.log(np.exp(logits).sum(-1))
    log_p = logits - log_z[..., None]
    nll = -np.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    q = np.full_like(logits, smoothing / (size - 1))
    np.put_along_axis(q, targets[..., None], 1 - smoothing, -1)
    entropy = -(q * np.log(q + 1e-20)).sum(-1) if smoothing else 0.0
    loss = -(q * log_p).sum(-1) - entropy + z_loss * log_z**2
    return (loss * weights).sum(), (nll * weights).sum()


@pytest.mark.parametrize(("z_loss", "smoothing"), [(0.0, 0.0), (1e-2, 0.0), (0.0, 0.1), (1e-2, 0.1)])
def test_cross_entropy_is_the_formula(z_loss, smoothing):
    logits, targets, weights = _random()
    got = cross_entropy(logits, targets, weights, LossConfig(z_loss=z_loss, label_smoothing=smoothing))
    loss, nll = _formula(logits, targets, weights, z_loss, smoothing)
    np.testing.assert_allclose(got.loss, loss, rtol=1e-6)
    np.testing.assert_allclose(got.nll, nll, rtol=1e-6)
    assert got.weight == weights.sum()


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="its XLA makes exponentials with the maximum, elsewhere")
def test_loss_and_its_gradient_hold_one_array_of_the_logits_size():
    """XLA:CPU makes exponentials and gradient in the logits' memory: all have the product's shape."""
    hidden, table = jnp.zeros((4, 32, 16)), jnp.zeros((1000, 16))
    targets, weights = jnp.zeros((4, 32), jnp.int32), jnp.ones((4, 32))

    def loss(hidden: jax.Array, table: jax.Array) -> jax.Array:
        logits = contract("BTD,VD->BTV", hidden, table, jnp.dtype(jnp.float32))
        return cross_entropy(logits, targets, weights, LossConfig()).loss

    memory = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, table).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 1.5 * 4 * 32 * 1000 * 4


def test_z_loss_known_answer():
    """facts/objectives, section 1.4: V = 4, zero logits: nll 1.386294, z 1.921812e-4."""
    zero = jnp.zeros((1, 1, 4))
    got = cross_entropy(zero, jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1)), LossConfig(z_loss=1e-4))
    np.testing.assert_allclose(got.nll, 1.386294, rtol=1e-6)
    np.testing.assert_allclose(got.loss - got.nll, 1.921812e-4, rtol=1e-3)


def test_label_smoothing_known_answer():
    """The subtracted constant for V = 10, e = .1 is .544805 (T5X), so a perfect prediction costs 0."""
    probabilities = np.full(10, 0.1 / 9)
    probabilities[3] = 0.9
    logits = jnp.log(jnp.asarray(probabilities))[None, None]
    got = cross_entropy(logits, jnp.full((1, 1), 3), jnp.ones((1, 1)), LossConfig(label_smoothing=0.1))
    np.testing.assert_allclose(got.loss, 0.0, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 100])
def test_chunked_equals_whole(chunk):
    _, targets, weights = _random()
    rng = np.random.default_rng(1)
    hidden = jnp.asarray(rng.normal(size=(3, 7, 5)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(5, 11)), jnp.float32)

    def loss(hidden, kernel, chunk):
        config = LossConfig(chunk=chunk, z_loss=1e-3, label_smoothing=0.1)
        total = chunked_cross_entropy(lambda h: h @ kernel, hidden, jnp.asarray(targets), jnp.asarray(weights), config)
        return total.loss, total

    whole, whole_sums = jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, kernel, None)
    parts, part_sums = jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, kernel, chunk)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), whole, parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), whole_sums, part_sums)


def test_chunked_never_holds_all_logits():
    """The compiled program has no array of [B, T, V]."""
    hidden, kernel = jnp.zeros((2, 64, 8)), jnp.zeros((8, 999))
    targets, weights = jnp.zeros((2, 64), jnp.int32), jnp.ones((2, 64))

    def loss(hidden, kernel, chunk):
        return chunked_cross_entropy(lambda h: h @ kernel, hidden, targets, weights, LossConfig(chunk=chunk)).loss

    def text(chunk):
        return jax.jit(jax.grad(lambda h, k: loss(h, k, chunk), (0, 1))).lower(hidden, kernel).compile().as_text()

    assert "64,999]" in text(None) or "64,999" in text(None)
    assert "64,999" not in text(16)


def test_the_gradient_over_the_vocabulary_is_that_of_the_formula():
    """Derived step by step by jax, from logsumexp and a lookup; with smoothing and z-loss, weights not 0 or 1."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.standard_normal((2, 3, 11)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 11, (2, 3)), jnp.int32)
    weights = jnp.asarray(rng.random((2, 3)), jnp.float32)
    config = LossConfig(label_smoothing=0.1, z_loss=0.01)

    def formula(logits):
        log_z = jax.nn.logsumexp(logits, axis=-1)
        log_p = logits - log_z[..., None]
        smooth = jnp.where(jax.nn.one_hot(targets, 11, dtype=bool), 0.9, 0.1 / 10)
        return jnp.sum(weights * (-jnp.sum(smooth * log_p, axis=-1) + 0.01 * log_z**2))

    found = jax.grad(lambda logits: cross_entropy(logits, targets, weights, config).loss)(logits)
    np.testing.assert_allclose(found, jax.grad(formula)(logits), rtol=1e-5, atol=1e-6)
