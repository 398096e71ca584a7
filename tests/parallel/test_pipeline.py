"""The schedule: layers over stages give what they give one after the other, sums and gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import parallel
from lm.parallel import MeshConfig, Pipeline, Sharding

DEPTH, ROWS, LENGTH, WIDTH = 8, 8, 2, 3


def _layers(weights, x, rows, shared):
    """Some layers, each with a sum over the batch that is not finite where rows of nothing come by."""

    def layer(x, one):
        matrix, number = one
        x = x + jnp.tanh(jnp.einsum("btd,df->btf", x, matrix) + rows[:, None, None] * number) * shared[None, None]
        return x, {"sizes": jnp.sum(x**2, axis=(0, 1)), "rows": jnp.sum(rows / rows)}

    return jax.lax.scan(layer, x, weights)


def _arguments():
    rng = np.random.default_rng(0)
    weights = (0.5 * rng.normal(size=(DEPTH, WIDTH, WIDTH)), 1 + np.arange(DEPTH))
    x, rows = rng.normal(size=(ROWS, LENGTH, WIDTH)), 1.0 + np.arange(ROWS)
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (weights, x, rows, rng.normal(size=WIDTH)))


def _measure(run):
    def loss(weights, x, rows, shared):
        y, sums = run(weights, x, rows, shared)
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.log(sums["sizes"])), (y, sums)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 3), has_aux=True))(*_arguments())


@pytest.mark.parametrize(
    ("mesh", "pieces", "repeats"),
    [
        (MeshConfig(data=1, stage=4), 4, 1),
        (MeshConfig(data=1, stage=4), 2, 1),
        (MeshConfig(data=1, stage=4), 8, 2),
        (MeshConfig(data=1, stage=2, fsdp=2), 2, 4),
    ],
    ids=str,
)
def test_stages_give_what_one_device_gives(mesh, pieces, repeats):
    expected = _measure(_layers)
    rules = Sharding(pipeline=Pipeline(num_microbatches=pieces, repeats=repeats)).rules()
    with parallel.use(parallel.build_mesh(mesh, jax.devices()[:4]), rules):
        assert parallel.num_pieces(ROWS) == pieces
        found = _measure(lambda *arguments: parallel.run_pipeline(_layers, *arguments))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), found, expected)


def test_a_batch_too_small_to_be_cut_is_not_cut():
    rules = Sharding(pipeline=Pipeline(num_microbatches=4, repeats=2)).rules()
    with parallel.use(parallel.build_mesh(MeshConfig(data=1, stage=4), jax.devices()[:4]), rules):
        assert [parallel.num_pieces(rows) for rows in (1, 2, 4, 6, 8)] == [0, 0, 4, 0, 4]
    with parallel.use(parallel.build_mesh(MeshConfig(data=4), jax.devices()[:4]), rules):
        assert parallel.num_pieces(8) == 0


def test_layers_that_do_not_divide_are_one_sentence():
    weights, *rest = _arguments()
    rules = Sharding(pipeline=Pipeline(repeats=3, num_microbatches=4)).rules()
    mesh = parallel.build_mesh(MeshConfig(data=1, stage=4), jax.devices()[:4])
    sentence = r"stage 4 with .*repeats 3 does not divide 8 layers"
    with parallel.use(mesh, rules), pytest.raises(ValueError, match=sentence):
        parallel.run_pipeline(_layers, weights, *rest)


def test_what_moves_is_what_the_schedule_says():
    """One permutation of a piece per turn, forward and backward, and no more of the layers' weights."""
    rules = Sharding(pipeline=Pipeline(num_microbatches=4)).rules()
    mesh = parallel.build_mesh(MeshConfig(data=1, stage=4), jax.devices()[:4])
    weights, x, rows, shared = _arguments()
    with parallel.use(mesh, rules):
        staged = jax.device_put(weights, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("stage")))

        def loss(weights):
            return jnp.sum(parallel.run_pipeline(_layers, weights, x, rows, shared)[0])

        text = jax.jit(jax.grad(loss)).lower(staged).compile().as_text()
    assert text.count(" collective-permute(") == 2
    assert "all-to-all(" not in text


@pytest.mark.parametrize(
    ("pipeline", "stages", "fields"),
    [
        (Pipeline(), 4, []),
        (Pipeline(num_microbatches=1), 4, []),
        (Pipeline(num_microbatches=0), 4, ["num_microbatches"]),
        (Pipeline(num_microbatches=3, repeats=2), 4, ["num_microbatches"]),
        (Pipeline(repeats=0), 4, ["repeats"]),
    ],
)
def test_problems_name_the_field(pipeline, stages, fields):
    problems = pipeline.problems(stages)
    assert len(problems) == len(fields)
    assert all(field in problem for field, problem in zip(fields, problems, strict=True))
