"""Masks against the formula and the facts' known answer; kernels against each other and against float64."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.models.attention import Bias, Chunked, Layout, Plain, Scoring, Side


def make_side(segment_ids, bidirectional=None, slots=None):
    segment_ids = np.asarray(segment_ids, np.int32)
    positions = np.zeros_like(segment_ids)
    for row, ids in enumerate(segment_ids):
        for _, group in itertools.groupby(range(len(ids)), key=lambda i, ids=ids: ids[i]):
            group = list(group)
            positions[row, group] = np.arange(len(group))
    flags = np.zeros(segment_ids.shape, bool) if bidirectional is None else np.asarray(bidirectional, bool)
    slots = np.arange(segment_ids.shape[1]) if slots is None else slots
    return Side(*map(jnp.asarray, (segment_ids, positions, flags, slots)))


def test_prefix_mask_known_answer():
    """The table of a prefix LM with two packed segments, from the objectives' facts (section 1.1)."""
    side = make_side([[1, 1, 1, 1, 2, 2, 2, 0]], [[1, 1, 1, 0, 1, 1, 0, 0]])
    rows = ["".join(str(int(x)) for x in row) for row in Layout(side, side, causal=True).allowed()[0]]
    assert rows == ["11100000", "11100000", "11100000", "11110000", "00001100", "00001100", "00001110", "00000000"]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 2, 5])
def test_mask_equals_its_formula(causal, window):
    rng = np.random.default_rng(0)
    side = make_side([[1, 1, 1, 2, 2, 2, 2, 2, 0, 0], [3, 3, 3, 3, 3, 3, 3, 3, 3, 3]], rng.integers(0, 2, (2, 10)))
    allowed = Layout(side, side, causal, window).allowed()
    segments, positions, flags = map(np.asarray, side[:3])
    for b, i, j in np.ndindex(2, 10, 10):
        distance = positions[b, i] - positions[b, j]
        near = window is None or (distance < window if causal else abs(distance) <= window // 2)
        seen = (j <= i and near) or (flags[b, i] and flags[b, j]) if causal else near
        assert allowed[b, i, j] == (segments[b, i] == segments[b, j] != 0 and seen)


def make_inputs(length=11, heads=4, kv_heads=2, width=8, seed=0):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(2, length, heads, width)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, length, kv_heads, width)).astype(np.float32)
    side = make_side([[1] * 4 + [2] * 5 + [0] * 2, [1] * length], rng.integers(0, 2, (2, length)))
    return tuple(map(jnp.asarray, (q, k, v))), side


def reference(q, k, v, layout, scoring):
    """The definition, in float64, a head at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    allowed = np.asarray(layout.allowed())
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    bias = None if scoring.bias is None else np.asarray(scoring.bias.of(layout), np.float64)
    for b, n, i in np.ndindex(q.shape[0], q.shape[2], q.shape[1]):
        kv = n // (q.shape[2] // k.shape[2])
        scores = k[b, :, kv] @ q[b, i, n] * scoring.scale
        if scoring.soft_cap is not None:
            scores = scoring.soft_cap * np.tanh(scores / scoring.soft_cap)
        if bias is not None:
            scores = scores + bias[b, n, i]
        weights = np.where(allowed[b, i], np.exp(scores), 0)
        total = weights.sum() + (0 if scoring.sinks_N is None else np.exp(float(scoring.sinks_N[n])))
        if total > 0:
            out[b, i, n] = weights / total @ v[b, :, kv]
    return out


def wavy(columns, queries, keys, causal):
    """A bias with another sign for each direction, so that a mix-up of sides shows."""
    del causal
    distances = (keys[:, None, :] - 2 * queries[:, :, None]).astype(jnp.float32)
    return columns[0][None, :, None, None] * distances[:, None]


SCORINGS = {
    "plain": Scoring(scale=0.3),
    "soft_cap": Scoring(scale=1.0, soft_cap=0.7),
    "sinks": Scoring(scale=0.3, sinks_N=jnp.asarray([0.5, -1.0, 2.0, 0.0])),
    "bias": Scoring(scale=0.3, bias=Bias(jnp.sin(jnp.arange(1.0, 5.0))[None], wavy, True)),
}


@pytest.mark.parametrize("scoring", SCORINGS.values(), ids=SCORINGS)
@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 3), (False, None), (False, 4)])
def test_kernels_equal_the_definition(scoring, causal, window):
    (q, k, v), side = make_inputs()
    layout = Layout(side, side, causal, window)
    expected = reference(q, k, v, layout, scoring)
    for kernel in (Plain(), Chunked(chunk=4), Chunked(chunk=64)):
        np.testing.assert_allclose(kernel.attend(q, k, v, layout, scoring), expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("scoring", [SCORINGS["soft_cap"], SCORINGS["sinks"]], ids=["soft_cap", "sinks"])
def test_kernels_have_equal_gradients(scoring):
    (q, k, v), side = make_inputs()
    layout = Layout(side, side, True, None)

    def loss(qkv, sinks, kernel):
        sinks = None if scoring.sinks_N is None else sinks
        return jnp.sum(jnp.sin(kernel.attend(*qkv, layout, dataclasses.replace(scoring, sinks_N=sinks))))

    sinks = jnp.asarray([0.5, -1.0, 2.0, 0.0])
    plain = jax.grad(loss, argnums=(0, 1))((q, k, v), sinks, Plain())
    chunked = jax.grad(loss, argnums=(0, 1))((q, k, v), sinks, Chunked(chunk=4))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-6, rtol=1e-5), plain, chunked)


@pytest.mark.parametrize("kernel", [Plain(), Chunked(chunk=4)], ids=["plain", "chunked"])
def test_a_row_of_padding_reads_nothing(kernel):
    (q, k, v), side = make_inputs()
    side = side._replace(segment_ids=jnp.zeros_like(side.segment_ids))

    def attend(qkv):
        return kernel.attend(*qkv, Layout(side, side, True), Scoring(scale=1.0))

    assert not np.asarray(attend((q, k, v))).any()
    gradients = jax.grad(lambda qkv: jnp.sum(attend(qkv) ** 2 + attend(qkv)))((q, k, v))
    assert all(not np.asarray(x).any() for x in gradients)


def test_dropped_weights_keep_their_mean():
    (q, k, v), side = make_inputs()
    layout = Layout(side, side, True)
    keys = jax.random.split(jax.random.key(0), 400)
    outs = jax.vmap(lambda key: Plain().attend(q, k, v, layout, Scoring(scale=0.3, dropout_rate=0.4, key=key)))(keys)
    plain = Plain().attend(q, k, v, layout, Scoring(scale=0.3))
    assert float(jnp.abs(outs[0] - plain).max()) > 0.1
    np.testing.assert_allclose(outs.mean(axis=0), plain, atol=0.25)
