"""Every leaf of every rule's state has the axes of its parameter."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from lm.optim import Adafactor, build_optimizer, state_axes
from lm.optim.quantized import QuantizedState
from lm.parallel import DEFAULT_RULES, MeshConfig, build_mesh, spec

from .test_rules import AXES, ROWS, config, random_tree, rows


def flat_state_axes(state, params):
    return jax.tree.structure(state).flatten_up_to(state_axes(state, params, AXES))


@rows
@pytest.mark.parametrize("frozen", [(), ("embedder",)])
def test_leaves_shard_like_their_parameter(row, frozen):
    params = random_tree(0)
    optimizer = build_optimizer(config(row, frozen=frozen, weight_decay=0.1), 10, params, AXES)
    state = jax.eval_shape(optimizer.init, params)
    names = flat_state_axes(state, params)
    known = {
        (leaf.shape, axes)
        for leaf, axes in zip(jax.tree.leaves(params), jax.tree.structure(params).flatten_up_to(AXES), strict=True)
    }
    for leaf, axes in zip(jax.tree.leaves(state), names, strict=True):
        assert len(axes) == len(leaf.shape)
        if None not in axes and leaf.shape:
            assert (leaf.shape, axes) in known
        else:
            # Only what is averaged away, or smaller than any parameter, is whole everywhere.
            assert all(size <= 3 for size, name in zip(leaf.shape, axes, strict=True) if name is None)


def test_adafactors_factors_keep_the_names_that_remain():
    params = random_tree(0)
    optimizer = build_optimizer(config(ROWS["adafactor"]), 10, params, AXES)
    state = jax.eval_shape(optimizer.init, params)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    found = zip(paths, jax.tree.leaves(state), flat_state_axes(state, params), strict=True)
    query = {(leaf.shape, axes) for path, leaf, axes in found if "['query']['kernel']" in path}
    assert query == {
        ((2, 6, 1, 1), ("layers", "embed", None, None)),
        ((2, 1, 2, 4), ("layers", None, "heads", "head_dim")),
    }


def test_a_path_that_ends_another_path_is_not_confused():
    params = {"b": jnp.zeros((2,)), "a": {"b": jnp.zeros((3,))}}
    axes = {"b": ("norm",), "a": {"b": ("mlp",)}}
    named = state_axes({"mu": params}, params, axes)
    assert named == {"mu": axes}


@pytest.mark.parametrize("shape", [(5,), (6, 1), (3,), (0,)])
def test_a_leaf_that_fits_no_parameter_is_an_error(shape):
    params = {"b": jnp.zeros((6,))}
    with pytest.raises(ValueError, match="optimizer state"):
        state_axes({"mu": {"b": jnp.zeros(shape)}}, params, {"b": ("norm",)})


@pytest.mark.parametrize(("shape", "fits"), [((4, 2), True), ((4, 1), True), ((2, 2), False), ((4, 5), False)])
def test_only_scales_of_codes_may_divide_an_axis_and_only_the_last(shape, fits):
    params, axes = {"w": jnp.zeros((4, 64))}, {"w": ("embed", "mlp")}
    moment, scale = {"w": jnp.zeros((4, 64))}, {"w": jnp.zeros(shape)}
    state = QuantizedState(jnp.zeros([]), moment, moment, scale, scale)
    if fits:
        assert state_axes(state, params, axes).mean_scale == {"w": ("embed", None)}
        return
    with pytest.raises(ValueError, match=r"root_scale|mean_scale"):
        state_axes(state, params, axes)


def test_a_divisor_is_no_scale_under_another_field_or_a_parameters_name():
    params = {"mean_scale": {"w": jnp.zeros((64,))}}
    with pytest.raises(ValueError, match="optimizer state"):
        state_axes({"mu": {"mean_scale": {"w": jnp.zeros((2,))}}}, params, {"mean_scale": {"w": ("mlp",)}})


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_sharded_update_equals_single(name):
    """Two by two devices over embed and heads/mlp/vocab, against one device."""
    params, gradient = random_tree(0), random_tree(1)
    # vocab 11 does not divide: keep the table out of the tensor axis by evening it.
    optimizer = build_optimizer(config(ROWS[name], weight_decay=0.1, clip_norm=1.0), 10, params, AXES)
    mesh = build_mesh(MeshConfig(fsdp=2, tensor=2, data=1), jax.devices()[:4])
    table = dict(DEFAULT_RULES.parameters) | {"vocab": (), "experts": ()}

    def place(tree, axes):
        return jax.tree.map(
            lambda x, names: jax.device_put(x, jax.sharding.NamedSharding(mesh, spec(names, table))), tree, axes
        )

    state = optimizer.init(params)
    expected, _ = jax.jit(optimizer.update)(gradient, state, params)
    updates, _ = jax.jit(optimizer.update)(
        place(gradient, AXES), place(state, state_axes(state, params, AXES)), place(params, AXES)
    )
    for got, want in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
        assert jnp.abs(jax.device_get(got) - jax.device_get(want)).max() < 2e-6


def test_rows_cover_both_forms_of_adafactor():
    sizes = {row.rule.min_size_to_factor for row in ROWS.values() if isinstance(row.rule, Adafactor)}
    assert len(sizes) == 2
    assert dataclasses.is_dataclass(Adafactor)
