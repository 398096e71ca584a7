"""What the collectives of the sequence do to positions and heads, and that they undo each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lm import parallel

LENGTH = P(None, "context")


def on_ring(size, function, x, out_spec=LENGTH):
    """Runs a function of shards of the second axis on a ring of `size` devices."""
    mesh = parallel.build_mesh(parallel.MeshConfig(data=1, context=size), jax.devices()[:size])
    with parallel.use(mesh, parallel.DEFAULT_RULES):
        return jax.jit(parallel.by_shards(function, (LENGTH,), out_spec))(x)


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_each_device_is_dealt_an_early_and_a_late_chunk(size):
    chunks = jnp.arange(2 * size)[None, :]
    dealt = np.asarray(on_ring(size, lambda x: parallel.deal(x, 1), chunks))[0].reshape(size, 2)
    assert [sorted(pair) for pair in dealt.tolist()] == [[i, 2 * size - 1 - i] for i in range(size)]
    back = on_ring(size, lambda x: parallel.undeal(parallel.deal(x, 1), 1), chunks)
    np.testing.assert_array_equal(back, chunks)


def test_a_shift_goes_once_around():
    x = jnp.arange(8)[None, :]
    once = on_ring(4, parallel.shift, x)
    np.testing.assert_array_equal(once[0], [6, 7, 0, 1, 2, 3, 4, 5])


def test_heads_and_positions_are_exchanged():
    x = jnp.arange(2 * 8 * 4 * 3).reshape(2, 8, 4, 3)
    heads = on_ring(4, parallel.to_heads, x, P(None, None, "context"))
    np.testing.assert_array_equal(heads, x)
    np.testing.assert_array_equal(on_ring(4, lambda x: parallel.to_length(parallel.to_heads(x)), x), x)


def test_gradients_of_what_is_shared_are_summed():
    mesh = parallel.build_mesh(parallel.MeshConfig(data=2, context=4))
    with parallel.use(mesh, parallel.DEFAULT_RULES):
        specs = (P("data", "context"), P())
        scaled = parallel.by_shards(lambda x, scale: x * scale[None, None], specs, specs[0])
        x = jnp.arange(16.0).reshape(2, 8)
        assert jax.jit(jax.grad(lambda scale: scaled(x, scale).sum()))(jnp.float32(2.0)) == x.sum()


def test_an_axis_that_its_devices_do_not_divide_is_kept_whole():
    mesh = parallel.build_mesh(parallel.MeshConfig(data=2, context=2, tensor=2))
    with parallel.use(mesh, parallel.DEFAULT_RULES):
        found = parallel.activation_spec((4, 6, 3, 8), "batch", "length", "activation_heads", None)
    assert found == P(("data", "fsdp", "expert", "stage"), ("context",), None, None)


def test_it_works_inside_a_stage():
    """Within code that already has the `stage` axis in its hands, as a pipeline has."""
    mesh = parallel.build_mesh(parallel.MeshConfig(data=1, context=2, stage=2), jax.devices()[:4])

    def stage(x):
        return parallel.by_shards(parallel.shift, (LENGTH,), LENGTH)(x) * (1 + jax.lax.axis_index("stage"))

    x = jnp.arange(8).reshape(2, 4)
    with parallel.use(mesh, parallel.DEFAULT_RULES):
        run = jax.shard_map(stage, in_specs=P("stage"), out_specs=P("stage"), axis_names={"stage"})
        np.testing.assert_array_equal(jax.jit(run)(x), [[2, 3, 0, 1], [12, 14, 8, 10]])
