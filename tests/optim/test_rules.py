"""Every rule, as a table: add a row. Laws on a scanned tree, then equality with formulas in float64."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm.optim import SGD, Adafactor, AdamW, Constant, Lion, Muon, OptimizerConfig, build_optimizer, roles_of

from . import references

AXES = {
    "embedder": {"embedding": ("vocab", "embed")},
    "layers": {
        "query": {"kernel": ("layers", "embed", "heads", "head_dim"), "bias": ("layers", "heads", "head_dim")},
        "out": {"kernel": ("layers", "heads", "head_dim", "embed")},
        "up": {"kernel": ("layers", "embed", "mlp")},
        "experts": {"kernel": ("layers", "experts", "embed", "mlp")},
        "norm": {"scale": ("layers", "norm")},
    },
    "norm": {"scale": ("norm",)},
}
SIZES = {"vocab": 11, "embed": 6, "heads": 2, "head_dim": 4, "mlp": 10, "experts": 3, "norm": 6, "layers": 2}
is_axes = lambda x: isinstance(x, tuple)  # noqa: E731


def random_tree(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda axes: jnp.asarray(rng.normal(size=[SIZES[a] for a in axes]), jnp.float32), AXES, is_leaf=is_axes
    )


@dataclasses.dataclass(frozen=True)
class Row:
    rule: object
    learning_rate: float
    # The formula of a matrix, and of what is none where that differs.
    formula: Callable
    other: Callable | None = None


ROWS = {
    "adamw": Row(AdamW(), 0.05, references.adam),
    "lion": Row(Lion(), 0.02, references.lion),
    "sgd": Row(SGD(momentum=0.9), 0.02, references.sgd),
    "nesterov": Row(SGD(momentum=0.9, nesterov=True), 0.02, references.nesterov),
    "adafactor": Row(Adafactor(min_size_to_factor=2), 0.05, references.adafactor),
    "adafactor_full": Row(
        Adafactor(min_size_to_factor=128), 0.05, lambda g, p: references.adafactor(g, p, factored=False)
    ),
    "muon": Row(Muon(), 0.05, references.muon, references.adam),
}
rows = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)


def config(row, **changes):
    base = OptimizerConfig(
        rule=row.rule, learning_rate=row.learning_rate, schedule=Constant(), clip_norm=None, weight_decay=0.0
    )
    return dataclasses.replace(base, **changes)


@rows
def test_lowers_a_quadratic(row):
    params, target = random_tree(0), random_tree(1)
    optimizer = build_optimizer(config(row), 100, params, AXES)

    def loss(p):
        return sum(jnp.sum(jnp.square(x - y)) for x, y in zip(jax.tree.leaves(p), jax.tree.leaves(target), strict=True))

    @jax.jit
    def step(_, carry):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    final, _ = jax.lax.fori_loop(0, 100, step, (params, optimizer.init(params)))
    assert loss(final) < 0.3 * loss(params)
    assert jax.tree.map(jnp.shape, final) == jax.tree.map(jnp.shape, params)


@rows
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_state_is_float32_and_updates_have_the_parameters_dtype(row, dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), random_tree(0))
    optimizer = build_optimizer(config(row, weight_decay=0.1, clip_norm=1.0), 10, params, AXES)
    state = jax.eval_shape(optimizer.init, params)
    updates, after = jax.eval_shape(optimizer.update, params, state, params)
    assert all(x.dtype in (jnp.float32, jnp.int32) for x in jax.tree.leaves(state))
    assert all(x.dtype == dtype for x in jax.tree.leaves(updates))
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)


def copies(x, role):
    """Yields each stacked copy of a leaf, as the matrix or vector that the papers speak of."""
    rest = role.rows + role.columns
    x = np.transpose(np.asarray(x, np.float64), role.stacked + rest)
    num_stacked = len(role.stacked)
    num_rows = int(np.prod(x.shape[num_stacked : num_stacked + len(role.rows)]))
    x = x.reshape((-1, num_rows) if not role.columns else (int(np.prod(x.shape[:num_stacked])), num_rows, -1))
    return list(x)


def follow(formula, params, gradients, rate):
    """Yields the parameters after each update of the formula."""
    steps = formula(gradients, params)
    direction = next(steps)
    for i in range(len(gradients)):
        params = params - rate * direction
        yield params
        if i + 1 < len(gradients):
            direction = steps.send(params)


@rows
def test_equals_the_formula_on_every_copy(row):
    params, gradients = random_tree(0), [random_tree(s) for s in (1, 2, 3)]
    optimizer = build_optimizer(config(row), 100, params, AXES)
    roles = roles_of(params, AXES)
    state, now, history = optimizer.init(params), params, []
    update = jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update(gradient, state, now)
        now = optax.apply_updates(now, updates)
        history.append(now)

    def check(path, role, p, *leaves):
        formula = row.formula if role.kind == "matrix" or row.other is None else row.other
        gradient_copies = [copies(g, role) for g in leaves[: len(gradients)]]
        result_copies = [copies(r, role) for r in leaves[len(gradients) :]]
        for i, copy in enumerate(copies(p, role)):
            expected = follow(formula, copy, [g[i] for g in gradient_copies], row.learning_rate)
            for t, (want, got) in enumerate(zip(expected, result_copies, strict=True)):
                np.testing.assert_allclose(got[i], want, rtol=2e-5, atol=2e-6, err_msg=f"{path} copy {i} update {t}")

    jax.tree_util.tree_map_with_path(check, roles, params, *gradients, *history)


@pytest.mark.parametrize("seed", range(3))
def test_adafactor_is_optaxs_on_plain_matrices(seed):
    rng = np.random.default_rng(seed)
    params = {"a": jnp.asarray(rng.normal(size=(5, 7)), jnp.float32), "b": jnp.zeros((7,), jnp.float32)}
    axes = {"a": ("embed", "mlp"), "b": ("mlp",)}
    row = Row(Adafactor(min_size_to_factor=4, momentum=0.9), 0.01, references.adafactor)
    ours = build_optimizer(config(row, weight_decay=0.0), 10, params, axes)
    theirs = optax.adafactor(0.01, min_dim_size_to_factor=4, momentum=0.9)
    states = [ours.init(params), theirs.init(params)]
    for _ in range(4):
        gradient = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)
        updates, states[0] = ours.update(gradient, states[0], params)
        expected, states[1] = theirs.update(gradient, states[1], params)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-8), updates, expected)
        params = optax.apply_updates(params, updates)


def test_adafactor_survives_a_zero_gradient():
    params = random_tree(0)
    optimizer = build_optimizer(config(ROWS["adafactor"]), 10, params, AXES)
    updates, _ = jax.jit(optimizer.update)(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    assert all(bool(jnp.isfinite(u).all()) for u in jax.tree.leaves(updates))


def test_adafactor_memory_is_sublinear():
    shapes = {"kernel": jax.ShapeDtypeStruct((4, 512, 8, 64), jnp.float32)}
    optimizer = build_optimizer(
        config(Row(Adafactor(), 0.01, references.adafactor)), 10, shapes, {"kernel": AXES["layers"]["query"]["kernel"]}
    )
    state = jax.eval_shape(optimizer.init, shapes)
    assert sum(x.size for x in jax.tree.leaves(state) if x.ndim) == 4 * (512 + 8 * 64)


def test_muon_directions_are_nearly_orthogonal():
    """After the quintic the singular values lie in about [0.5, 1.5] (Jordan et al., 2024)."""
    params = random_tree(0)
    rule = Muon(consistent_rms=None)
    optimizer = build_optimizer(config(Row(rule, 1.0, references.muon)), 10, params, AXES)
    updates, _ = optimizer.update(random_tree(1), optimizer.init(params), params)
    for path in ("query", "out"):
        kernel = AXES["layers"][path]["kernel"]
        role = roles_of(params, AXES)["layers"][path]["kernel"]
        for matrix in copies(updates["layers"][path]["kernel"], role):
            scale = max(1.0, matrix.shape[1] / matrix.shape[0]) ** 0.5
            singular = np.linalg.svd(matrix / scale, compute_uv=False)
            assert singular.min() > 0.4, kernel
            assert singular.max() < 1.6, kernel


def test_muon_scales_the_rate_of_the_others():
    params, gradient = random_tree(0), random_tree(1)
    updates = {}
    for rate in (1.0, 0.5):
        optimizer = build_optimizer(config(Row(Muon(others_rate=rate), 0.1, references.muon)), 10, params, AXES)
        updates[rate], _ = optimizer.update(gradient, optimizer.init(params), params)
    for path, factor in ((("embedder", "embedding"), 0.5), (("norm", "scale"), 0.5)):
        np.testing.assert_allclose(updates[0.5][path[0]][path[1]], factor * updates[1.0][path[0]][path[1]], rtol=1e-6)
    np.testing.assert_array_equal(updates[0.5]["layers"]["up"]["kernel"], updates[1.0]["layers"]["up"]["kernel"])


@pytest.mark.parametrize(
    ("rule", "field"),
    [
        (AdamW(b1=1.0), "b1"),
        (AdamW(b2=-0.1), "b2"),
        (Lion(b1=2.0), "b1"),
        (SGD(momentum=1.5), "momentum"),
        (SGD(nesterov=True), "nesterov"),
        (Muon(momentum=1.0), "momentum"),
        (Muon(num_iterations=0), "num_iterations"),
        (Muon(others=AdamW(b2=1.0)), "b2"),
        (Adafactor(decay_rate=0.0), "decay_rate"),
        (Adafactor(momentum=1.0), "momentum"),
        (Adafactor(clip_threshold=0.0), "clip_threshold"),
    ],
    ids=repr,
)
def test_problems_name_the_field(rule, field):
    assert any(field in problem for problem in rule.problems())


@rows
def test_defaults_have_no_problems(row):
    assert row.rule.problems() == []


def test_a_mean_in_bfloat16_halves_its_bytes_and_hardly_moves_the_update():
    """Eight bits of mantissa: after ten updates a direction is within one part in a hundred of float32's."""
    params = random_tree(0)
    states, directions = {}, {}
    for dtype in ("float32", "bfloat16"):
        optimizer = build_optimizer(config(Row(AdamW(mean_dtype=dtype), 1.0, references.adam)), 100, params, AXES)
        update, state = jax.jit(optimizer.update), optimizer.init(params)
        for seed in range(10):
            direction, state = update(random_tree(seed), state, params)
        states[dtype], directions[dtype] = state, direction
    sizes = {dtype: sum(leaf.nbytes for leaf in jax.tree.leaves(state)) for dtype, state in states.items()}
    assert sizes["bfloat16"] == pytest.approx(0.75 * sizes["float32"], rel=0.01)
    for found, wanted in zip(*(jax.tree.leaves(directions[d]) for d in ("bfloat16", "float32")), strict=True):
        np.testing.assert_allclose(found, wanted, atol=0.02)
