"""Clipping, masks, freezing and the learning rate, for every rule."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm.optim import AdamW, Average, Linear, OptimizerConfig, build_optimizer, parameter_paths

from .test_rules import AXES, ROWS, config, random_tree, rows

MATRICES = {
    "layers/query/kernel",
    "layers/out/kernel",
    "layers/up/kernel",
    "layers/experts/kernel",
}
TABLES = {"embedder/embedding"}
VECTORS = {"layers/query/bias", "layers/norm/scale", "norm/scale"}


def changed(params, updates):
    """Returns the paths with a non-zero update."""
    return {
        path
        for path, update in zip(jax.tree.leaves(parameter_paths(params)), jax.tree.leaves(updates), strict=True)
        if bool(jnp.any(update != 0))
    }


def update_once(settings, params, gradient):
    optimizer = build_optimizer(settings, 10, params, AXES)
    return jax.jit(optimizer.update)(gradient, optimizer.init(params), params)[0]


@rows
@pytest.mark.parametrize(
    ("decayed", "expected"),
    [("matrices", MATRICES), ("matrices_and_tables", MATRICES | TABLES), ("everything", MATRICES | TABLES | VECTORS)],
)
def test_decay_reaches_exactly_what_it_should(row, decayed, expected):
    """With a zero gradient only decay is left, and it is rate * decay * parameter."""
    params = random_tree(0)
    settings = config(row, weight_decay=0.5, decayed=decayed)
    updates = update_once(settings, params, jax.tree.map(jnp.zeros_like, params))
    assert changed(params, updates) == expected
    np.testing.assert_allclose(
        updates["layers"]["up"]["kernel"], -row.learning_rate * 0.5 * params["layers"]["up"]["kernel"], rtol=1e-6
    )


def test_not_decayed_takes_paths_away():
    params = random_tree(0)
    settings = config(ROWS["adamw"], weight_decay=0.5, not_decayed=(r"query", r"up/kernel$"))
    updates = update_once(settings, params, jax.tree.map(jnp.zeros_like, params))
    assert changed(params, updates) == {"layers/out/kernel", "layers/experts/kernel"}


@rows
def test_frozen_parameters_neither_move_nor_cost_nor_count(row):
    params, gradient = random_tree(0), random_tree(1)
    settings = config(row, weight_decay=0.5, clip_norm=1.0, frozen=("^layers/(query|experts)", "norm"))
    updates = update_once(settings, params, gradient)
    moving = {"embedder/embedding", "layers/out/kernel", "layers/up/kernel"}
    assert changed(params, updates) == moving
    # A gradient of what is frozen must not change the clipping of the rest.
    loud = {**gradient, "norm": {"scale": 1e6 * gradient["norm"]["scale"]}}
    again = update_once(settings, params, loud)
    jax.tree.map(np.testing.assert_array_equal, again, updates)
    state = jax.eval_shape(build_optimizer(settings, 10, params, AXES).init, params)
    assert not any("query" in jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(state))


@pytest.mark.parametrize("field", ["frozen", "not_decayed"])
def test_a_pattern_without_a_parameter_is_an_error(field):
    params = random_tree(0)
    settings = dataclasses.replace(OptimizerConfig(), **{field: ("quarry",)})
    with pytest.raises(ValueError, match=rf"optimizer.{field}: 'quarry'.*embedder/embedding"):
        build_optimizer(settings, 10, params, AXES)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_clipping_bounds_the_global_norm_and_leaves_small_gradients(scale):
    params, gradient = random_tree(0), jax.tree.map(lambda x: scale * x, random_tree(1))
    row = dataclasses.replace(ROWS["sgd"], rule=type(ROWS["sgd"].rule)(), learning_rate=1.0)
    updates = update_once(config(row, clip_norm=1.0), params, gradient)
    norm = float(optax.tree.norm(gradient))
    factor = min(1.0, 1.0 / norm)
    jax.tree.map(lambda u, g: np.testing.assert_allclose(u, -factor * g, rtol=1e-5), updates, gradient)
    np.testing.assert_allclose(float(optax.tree.norm(updates)), min(norm, 1.0), rtol=1e-5)


def test_updates_follow_the_logged_learning_rate():
    params = gradient = random_tree(0)
    row = dataclasses.replace(ROWS["sgd"], rule=type(ROWS["sgd"].rule)(), learning_rate=0.5)
    settings = config(row, schedule=Linear(warmup_steps=2))
    optimizer = build_optimizer(settings, 8, params, AXES)
    rate = settings.learning_rate_at(8)
    state = optimizer.init(params)
    for step in range(8):
        updates, state = optimizer.update(gradient, state, params)
        np.testing.assert_allclose(updates["norm"]["scale"], -rate(step) * gradient["norm"]["scale"], rtol=1e-6)
    np.testing.assert_allclose(rate(2), 0.5)


def test_equals_optax_adamw():
    params = random_tree(0)
    settings = config(ROWS["adamw"], weight_decay=0.1, decayed="everything", clip_norm=1.0)
    ours = build_optimizer(settings, 10, params, AXES)
    theirs = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.05, 0.9, 0.95, weight_decay=0.1))
    states = [ours.init(params), theirs.init(params)]
    for seed in (1, 2):
        updates, states[0] = ours.update(random_tree(seed), states[0], params)
        expected, states[1] = theirs.update(random_tree(seed), states[1], params)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-8), updates, expected)


def test_shapes_are_enough_to_build():
    shapes = jax.eval_shape(lambda: random_tree(0))
    build_optimizer(OptimizerConfig(frozen=("embedder",)), 10, shapes, AXES)


def test_problems_name_the_field():
    bad = OptimizerConfig(
        learning_rate=-1.0,
        clip_norm=0.0,
        weight_decay=-0.1,
        frozen=("(",),
        not_decayed=("[",),
        rule=AdamW(b1=1.0),
        schedule=Linear(final_factor=2.0),
        average=Average(decay=1.0),
    )
    text = "\n".join(bad.problems(100))
    for field in ("learning_rate", "clip_norm", "weight_decay", "frozen", "not_decayed", "rule.b1", "average.decay"):
        assert f"optimizer.{field}" in text
    assert "optimizer.schedule.final_factor" in text
    assert OptimizerConfig().problems(100) == []
