"""Attention over a divided sequence equals attention on one device: values, and gradients of all that is learned."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import parallel
from lm.models import Chunked, Decoder, Gather, Plain, Relative, Ring, Ulysses
from lm.models.attention import Layout, RelativeVectors, Scoring
from lm.models.context_parallel import Heads, attend
from lm.parallel import DEFAULT_RULES
from tests.models.test_attention import SCORINGS, make_side

RNG = np.random.default_rng(0)
TABLES = (jnp.asarray(RNG.normal(size=(7, 8)), jnp.float32) for _ in range(2))
RELATIVE = Scoring(scale=0.3, relative=RelativeVectors(*TABLES, Relative(max_distance=3).relative_rows))
BY_TWO = parallel.MeshConfig(data=2, tensor=2, context=2)
BY_FOUR = parallel.MeshConfig(data=1, fsdp=2, context=4)
# way, kernel, mesh, scoring, causal, window
CASES = {
    "ring, plain": (Ring(), Plain(), BY_TWO, SCORINGS["plain"], True, None),
    "ring, window, soft cap": (Ring(), Plain(), BY_FOUR, SCORINGS["soft_cap"], True, 3),
    "ring, chunks, sinks": (Ring(), Chunked(chunk=3), BY_TWO, SCORINGS["sinks"], True, None),
    "ring, bias": (Ring(), Plain(), BY_FOUR, SCORINGS["bias"], True, None),
    "ring not dealt, bias": (Ring(zigzag=False), Plain(), BY_TWO, SCORINGS["bias"], True, None),
    "ring, relative vectors": (Ring(), Plain(), BY_TWO, RELATIVE, True, None),
    "ring both ways, window": (Ring(), Plain(), BY_FOUR, SCORINGS["sinks"], False, 4),
    "ring both ways, bias": (Ring(), Plain(), BY_TWO, SCORINGS["bias"], False, None),
    "exchange, window, soft cap": (Ulysses(), Plain(), BY_FOUR, SCORINGS["soft_cap"], True, 3),
    "exchange, sinks": (Ulysses(), Plain(), BY_TWO, SCORINGS["sinks"], True, None),
    "exchange, chunks, bias": (Ulysses(), Chunked(chunk=3), BY_FOUR, SCORINGS["bias"], True, None),
    "exchange both ways, bias": (Ulysses(), Plain(), BY_TWO, SCORINGS["bias"], False, None),
    "exchange, relative vectors": (Ulysses(), Plain(), BY_FOUR, RELATIVE, True, None),
    "gathered, bias": (Gather(), Plain(), BY_TWO, SCORINGS["bias"], True, None),
}


def make_arrays(length=16):
    q = RNG.normal(size=(4, length, 4, 8))
    k, v = RNG.normal(size=(2, 4, length, 2, 8))
    segments = [[1] * 5 + [2] * 9 + [0] * 2, [1] * 16, [1] * 10 + [2] * 6, [0] * 16]
    side = make_side(segments, RNG.integers(0, 2, (4, length)))
    return tuple(jnp.asarray(x, jnp.float32) for x in (q, k, v)), side


def run(mesh, way, kernel, arrays, layout, scoring):
    """Returns a mean, its gradients and the result."""

    # On the host, since what the room's mesh of one device has touched stays there.
    arrays, layout, scoring = jax.device_get((arrays, layout, scoring))

    def mean(arrays, scoring, layout):
        out = attend(way, kernel, arrays, layout, scoring)
        return jnp.mean(jnp.sin(out) * jnp.arange(1.0, 9.0)[None, None, None]), out

    with parallel.use(mesh, DEFAULT_RULES):
        return jax.device_get(jax.jit(jax.value_and_grad(mean, argnums=(0, 1), has_aux=True))(arrays, scoring, layout))


def compare(case, arrays, queries, keys):
    way, kernel, mesh, scoring, causal, window = case
    layout = Layout(queries, keys, causal, window)
    one = parallel.build_mesh(parallel.MeshConfig(data=1), jax.devices()[:1])
    expected = run(one, way, Plain(), arrays, layout, scoring)
    got = run(parallel.build_mesh(mesh), way, kernel, arrays, layout, scoring)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6, rtol=2e-5), got, expected)


@pytest.mark.parametrize("name", CASES)
def test_a_divided_sequence_changes_nothing(name):
    arrays, side = make_arrays()
    compare(CASES[name], arrays, side, side)


def shapes_on_a_ring(num_shards, arrays, of):
    """Returns the shapes of what `of` makes of a ring's attention and its gradient, without computing them."""
    _, side = make_arrays()
    mesh = parallel.build_mesh(parallel.MeshConfig(data=1, context=num_shards), jax.devices()[:num_shards])

    def ring(*arrays):
        return attend(Ring(), Chunked(chunk=3), arrays, Layout(side, side, True), SCORINGS["soft_cap"])

    with parallel.use(mesh, DEFAULT_RULES):
        return jax.tree.leaves(jax.eval_shape(lambda *arrays: of(*jax.vjp(ring, *arrays)), *arrays))


def test_a_ring_keeps_what_a_device_has_of_its_own():
    """Not what came by: the whole ring keeps as much on four devices as on two, and as much as is there."""
    (q, k, v), _ = make_arrays()
    result_and_normalizers = q.nbytes + 4 * q[..., 0].size
    # Four words tell where each position stands.
    places = 4 * 4 * q[:, :, 0, 0].size
    expected = q.nbytes + k.nbytes + v.nbytes + result_and_normalizers + places
    for num_shards in (2, 4):
        kept = shapes_on_a_ring(num_shards, (q, k, v), lambda out, back: back)
        assert sum(x.size * x.dtype.itemsize for x in kept) == expected


def test_gradients_of_a_ring_are_in_the_dtype_of_its_arrays():
    arrays = [x.astype(jnp.bfloat16) for x in make_arrays()[0]]
    assert {x.dtype for x in shapes_on_a_ring(2, arrays, lambda out, back: back(out))} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("way", [Ring(), Ulysses()], ids=["ring", "exchange"])
def test_cross_attention_reads_a_divided_source_of_another_length(way):
    (q, k, v), keys = make_arrays()
    queries = make_side([[1] * 3 + [2] * 5, [1] * 8, [1] * 4 + [3] * 4, [2] * 8])
    compare((way, Plain(), BY_FOUR, SCORINGS["plain"], False, None), (q[:, :8], k, v), queries, keys)


def test_what_cannot_be_divided_is_told():
    heads, lengths = Heads(queries=4, keys=2), {"sequence_length": 18}
    assert Ring(zigzag=False).problems(Plain(), 0.0, heads, lengths, 2) == []
    (line,) = Ring().problems(Plain(), 0.0, heads, lengths, 2)
    assert line == (
        "config.data.sequence_length 18 does not divide into 4 pieces, 2 for each device of mesh.context 2: make it a"
        " multiple of 4"
    )
    assert Ulysses().problems(Plain(), 0.0, heads, {}, 4) == []
    (line,) = Ulysses().problems(Plain(), 0.0, heads, {}, 8)
    assert "mesh.context 8" in line
    assert "4 query heads" in line
    (line,) = Ring().problems(Plain(), 0.1, heads, {}, 2)
    assert "dropout_rate 0.1" in line
    assert Gather().problems(Plain(), 0.1, heads, {}, 2) == []


def test_dropped_attention_weights_are_refused_where_they_would_be_wrong():
    arrays, side = make_arrays()
    scoring = dataclasses.replace(SCORINGS["plain"], dropout_rate=0.5, key=jax.random.key(0))
    mesh = parallel.build_mesh(BY_TWO)
    with parallel.use(mesh, DEFAULT_RULES), pytest.raises(ValueError, match=r"dropout_rate 0.5.*Gather"):
        attend(Ring(), Plain(), arrays, Layout(side, side, True), scoring)


def test_a_cache_is_read_under_a_divided_sequence(make_batch):
    """A prompt of odd length and one more token, on a mesh of two by two, as without cache on one device."""
    config = Decoder(vocab_size=50, num_layers=1, model_dim=16, num_heads=4, num_kv_heads=2, mlp_dim=24, max_length=16)
    model = config.build()
    params, batch = jax.device_get((model.init(jax.random.key(0)), make_batch([[6], [6]])))
    expected = jax.device_get(model.apply(params, batch).logits)

    def decode(params, batch):
        first, last = (jax.tree.map(lambda x, part=part: x[:, part], batch) for part in (slice(5), slice(5, 6)))
        prompt = model.apply(params, first, cache=model.init_cache(params, 2, 8))
        return prompt.logits, model.apply(params, last, cache=prompt.cache).logits

    with parallel.use(parallel.build_mesh(parallel.MeshConfig(data=2, context=2), jax.devices()[:4]), DEFAULT_RULES):
        prompt, last = jax.device_get(jax.jit(decode)(params, batch))
    np.testing.assert_allclose(np.concatenate([prompt, last], axis=1), expected, atol=2e-5)
