"""Sampling against a NumPy reference: the support, the distribution and the limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.decoding import Sampling
from lm.decoding.sampling import log_probability

VOCAB = 13


def reference(logits, temperature, top_k, top_p):
    """Probabilities in float64, for logits without ties (Holtzman et al., 2020, section 3.1)."""
    scaled = logits.astype(np.float64) / temperature
    order = np.argsort(-scaled)
    keep = np.zeros(len(logits), bool)
    keep[order[: top_k or len(logits)]] = True
    probability = np.where(keep, np.exp(scaled - scaled.max()), 0)
    probability /= probability.sum()
    if top_p is not None:
        mass = 0.0
        for token in order:
            keep[token] &= mass < top_p
            mass += probability[token]
        probability = np.where(keep, probability, 0)
        probability /= probability.sum()
    return probability


@functools.partial(jax.jit, static_argnums=0)
def probabilities(sampling, logits_BV):
    return jax.nn.softmax(sampling.filter(logits_BV), axis=1)


SETTINGS = [
    Sampling(),
    Sampling(temperature=0.5),
    Sampling(top_k=1),
    Sampling(top_k=4, temperature=2.0),
    Sampling(top_k=100),
    Sampling(top_p=0.3),
    Sampling(top_p=0.9, temperature=1.5),
    Sampling(top_p=1.0),
    Sampling(top_k=5, top_p=0.8),
]


@pytest.mark.parametrize("sampling", SETTINGS, ids=repr)
def test_distribution_equals_the_reference(sampling):
    logits = np.random.default_rng(0).normal(size=(50, VOCAB)).astype(np.float32) * 2
    expected = [reference(row, sampling.temperature, sampling.top_k, sampling.top_p) for row in logits]
    np.testing.assert_allclose(probabilities(sampling, jnp.asarray(logits)), expected, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), scale=st.floats(0.0, 30.0))
def test_the_most_likely_token_always_survives(seed, scale):
    logits = jnp.asarray(np.random.default_rng(seed).normal(size=(3, VOCAB)) * scale, jnp.float32)
    for sampling in (Sampling(top_p=1e-6), Sampling(top_k=1), Sampling(top_k=3, top_p=0.5)):
        probability = probabilities(sampling, logits)
        assert bool(jnp.isfinite(probability).all())
        assert bool((jnp.take_along_axis(probability, jnp.argmax(logits, 1)[:, None], 1) > 0).all())


def test_ties_at_the_edge_are_all_kept():
    logits = jnp.asarray([[3.0, 1.0, 1.0, 1.0, 0.0]])
    kept = np.isfinite(Sampling(top_k=2).filter(logits))
    np.testing.assert_array_equal(kept, [[True, True, True, True, False]])


def test_samples_follow_the_distribution():
    """Frequencies of 20000 draws, within five standard deviations."""
    sampling, count = Sampling(top_k=6, top_p=0.9, temperature=0.8), 20_000
    logits = np.random.default_rng(1).normal(size=VOCAB).astype(np.float32) * 2
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(count))
    tokens = jax.jit(sampling.sample)(jnp.broadcast_to(jnp.asarray(logits)[None], (count, VOCAB)), keys)
    expected = reference(logits, 0.8, 6, 0.9)
    frequency = np.bincount(tokens, minlength=VOCAB) / count
    assert (np.abs(frequency - expected) <= 5 * np.sqrt(expected * (1 - expected) / count)).all()


def test_small_temperature_is_greedy():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(40, VOCAB)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 40)
    greedy = Sampling(temperature=0).sample(logits, keys)
    np.testing.assert_array_equal(greedy, np.argmax(logits, 1))
    np.testing.assert_array_equal(Sampling(temperature=1e-5).sample(logits, keys), greedy)


@pytest.mark.parametrize("size", [1, 2, 13, 29 * 3, 120, 8192])
def test_greedy_takes_the_first_of_the_highest(size):
    """In vocabularies of one block and of many, with ties within a block and between blocks, and ids ruled out."""
    logits = np.random.default_rng(size).integers(0, 4, (64, size)).astype(np.float32)
    logits[:, : size // 3] = -np.inf
    logits[0] = -1.0
    keys = jax.random.split(jax.random.key(0), len(logits))
    greedy = jax.jit(Sampling(temperature=0).sample)(logits, keys)
    np.testing.assert_array_equal(greedy, np.argmax(logits, 1))


@pytest.mark.parametrize("size", [2, 13, 120])
@pytest.mark.parametrize("common", [0.0, 3e4])
def test_log_probability_is_that_of_the_softmax(size, common):
    """Whatever all logits have in common, and with whole blocks of -inf."""
    logits = (np.random.default_rng(size).normal(size=(5, size)) * 3 + common).astype(np.float32)
    logits[1:, : size // 2] = -np.inf
    ids = np.array([0, size - 1, size - 1, size // 2, 0])
    wide = logits.astype(np.float64) - logits.max(1, keepdims=True)
    expected = wide[np.arange(5), ids] - np.log(np.exp(wide).sum(1))
    np.testing.assert_allclose(jax.jit(log_probability)(logits, ids), expected, rtol=1e-6, atol=1e-6)


def test_a_rows_sample_depends_on_its_own_logits_and_key_only():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(8, VOCAB)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 8)
    sampling = Sampling(top_p=0.95)
    together = sampling.sample(logits, keys)
    np.testing.assert_array_equal(sampling.sample(logits[::-1], keys[::-1])[::-1], together)
    for i in range(8):
        assert sampling.sample(logits[i : i + 1], keys[i : i + 1])[0] == together[i]


@pytest.mark.parametrize(
    ("sampling", "field"),
    [
        (Sampling(temperature=-1), "temperature"),
        (Sampling(top_k=0), "top_k"),
        (Sampling(top_p=0.0), "top_p"),
        (Sampling(top_p=1.5), "top_p"),
    ],
    ids=repr,
)
def test_problems_name_the_field(sampling, field):
    assert any(field in problem for problem in sampling.problems())


@pytest.mark.parametrize("sampling", SETTINGS, ids=repr)
def test_good_settings_have_no_problems(sampling):
    assert sampling.problems() == []
