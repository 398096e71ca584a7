"""Shardings follow operations as a partitioner's do; checked by hand, and by random programs against eight devices."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lm.scaling import program
from lm.scaling.spread import Value, join, multiply, propagate, reshape

SIZES = {"data": 2, "fsdp": 2, "tensor": 2}
B, F, T = ("data", "fsdp"), ("fsdp",), ("tensor",)


def test_an_axis_divides_one_dimension_only():
    assert join([((), F), (F, ())]) == (F, ())
    assert join([((), ()), (F, T)]) == (F, T)


@pytest.mark.parametrize(
    ("old", "new", "spec", "expected"),
    [
        ((8, 4, 6), (32, 6), (B, (), T), (B, T)),
        ((32, 6), (8, 4, 6), (B, T), (B, (), T)),
        ((8, 6), (8, 2, 3), ((), T), ((), T, ())),
        ((8, 6), (1, 8, 6), (B, T), ((), B, T)),
        ((6, 4), (3, 8), (T, ()), ((), ())),  # three parts cannot be halved
    ],
)
def test_a_division_stays_with_the_leading_dimension(old, new, spec, expected):
    assert reshape(spec, old, new, SIZES) == expected


def test_a_parameter_divided_over_the_rows_devices_is_gathered():
    x, w = Value((8, 16, 32), 4, (B, (), ())), Value((32, 64), 4, (F, T))
    product = multiply(x, w, (((2,), (0,)), ((), ())), SIZES)
    assert product.right.spec == ((), T)
    assert (product.spec, product.partial, product.summed) == ((B, (), T), (), 32)


def test_a_stream_divided_by_its_length_is_gathered_and_heads_are_not():
    x, w = Value((8, 16, 32), 4, (B, T, ())), Value((32, 64), 4, (F, T))
    product = multiply(x, w, (((2,), (0,)), ((), ())), SIZES, "right", kept=T)
    assert (product.left.spec, product.right.spec) == ((B, (), ()), ((), T))
    assert product.spec == (B, (), T)


def test_what_begins_whole_is_divided_as_its_parts():
    whole, part = Value((4, 8, 16), 4, ((), (), ())), Value((1, 8, 16), 4, ((), B, ()))
    assert propagate("dynamic_update_slice", {}, [whole, part], whole.shape, SIZES) == ((), B, ())


def test_a_sum_is_scattered_to_what_it_is_added_to():
    x, w = Value((8, 16, 64), 4, (B, (), T)), Value((64, 32), 4, (T, ()))
    cost = _count(lambda x, w, stream: x @ w + stream, x, w, Value((8, 16, 32), 4, (B, T, ())))
    assert cost.collectives == {("reduce-scatter", T): (1, 2 * 16 * 32 * 4)}


def test_a_sum_over_divided_numbers_is_owed():
    x, w = Value((8, 16, 64), 4, (B, (), T)), Value((64, 32), 4, (T, ()))
    product = multiply(x, w, (((2,), (0,)), ((), ())), SIZES)
    assert (product.spec, product.partial, product.summed) == ((B, (), ()), T, 32)


def _count(function, *arguments, parameters=None):
    mesh = AbstractMesh((2, 2, 2), tuple(SIZES), axis_types=(AxisType.Auto,) * 3)
    with jax.sharding.use_abstract_mesh(mesh):
        closed = jax.make_jaxpr(function)(*(jnp.zeros(value.shape) for value in arguments))
    setting = program.Setting(SIZES, parameters or {})
    return program.count(closed, [value.spec for value in arguments], setting)


def test_a_layer_divided_by_heads_is_summed_once_forward():
    x, up, down = Value((8, 32), 4, (B, ())), Value((32, 64), 4, ((), T)), Value((64, 32), 4, (T, ()))
    cost = _count(lambda x, up, down: jnp.tanh(x @ up) @ down, x, up, down)
    assert cost.collectives == {("all-reduce", T): (1, 2 * 32 * 4)}
    assert cost.flops == 2 * (2 * 32 * 64) * 2 / 2


def test_gradients_are_scattered_to_their_parameters():
    x, w = Value((8, 32), 4, (B, ())), Value((32, 64), 4, (F, ()))
    cost = _count(lambda x, w: jax.grad(lambda w: jnp.sum((x @ w) ** 2))(w), x, w, parameters={(32, 64): (F, ())})
    whole = 32 * 64 * 4
    assert cost.collectives[("all-gather", F)] == (1, whole)
    assert cost.collectives[("reduce-scatter", F)] == (1, whole)
    # Replicas that hold the same shard sum it afterwards.
    assert cost.collectives[("all-reduce", ("data",))] == (1, whole // 2)


def test_a_loop_costs_its_body_times_its_length():
    x, w = Value((8, 32), 4, (B, ())), Value((5, 32, 32), 4, ((), F, ()))
    function = lambda x, w: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]  # noqa: E731
    cost = _count(function, x, w, parameters={(32, 32): (F, ())})
    assert cost.collectives == {("all-gather", F): (5, 5 * 32 * 32 * 4)}
    assert cost.flops == 5 * 2 * 2 * 32 * 32


def test_collectives_of_shard_map_are_read_as_they_stand():
    def exchange(x):
        return jax.lax.psum(jax.lax.all_gather(x, "tensor", axis=0, tiled=True), "data")

    def function(x):
        return jax.shard_map(exchange, in_specs=P(("data", "tensor")), out_specs=P(None), check_vma=False)(x)

    cost = _count(function, Value((8, 32), 4, (("data", "tensor"), ())))
    assert cost.collectives == {
        ("all-gather", T): (1, 4 * 32 * 4),
        ("all-reduce", ("data",)): (1, 4 * 32 * 4),
    }


def test_a_constraint_gathers_what_it_takes_away():
    mesh = AbstractMesh((2, 2, 2), tuple(SIZES), axis_types=(AxisType.Auto,) * 3)
    place = NamedSharding(mesh, P("data"))
    cost = _count(lambda x: jax.lax.with_sharding_constraint(x, place) + 1, Value((8, 32), 4, (B, ())))
    assert cost.collectives == {("all-gather", F): (1, 4 * 32 * 4)}
