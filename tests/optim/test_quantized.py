"""The 8-bit code by its bounds, then Adam with coded moments beside Adam."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from lm.optim import AdamW, AdamW8Bit, Constant, OptimizerConfig, build_optimizer, state_axes
from lm.optim.quantized import block_size, decode, encode
from lm.parallel import DEFAULT_RULES, MeshConfig, build_mesh, spec

AXES = {"table": ("vocab", "embed"), "up": ("embed", "mlp"), "down": ("mlp", "embed"), "bias": ("mlp",)}
SHAPES = {"table": (5, 64), "up": (64, 512), "down": (512, 64), "bias": (512,)}


def random_tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(scale * rng.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()}


def config(rule):
    return OptimizerConfig(rule=rule, schedule=Constant(), learning_rate=0.01, clip_norm=None, weight_decay=0.0)


@pytest.mark.parametrize("bits", [7, 8])
def test_the_code_is_exact_at_its_values_and_off_by_half_a_step_between_them(bits):
    codes = jnp.arange(2**bits)
    values = decode(codes, bits)
    assert values[0] == 0
    assert values[-1] == 1
    assert bool(jnp.all(jnp.diff(values) > 0))
    np.testing.assert_array_equal(encode(values, bits), codes)
    x = jnp.asarray(np.concatenate([np.linspace(0, 1, 5001), np.geomspace(1e-9, 1, 5001)]), jnp.float32)
    decade = jnp.clip(jnp.floor(-jnp.log10(x)), 0, bits - 1)
    bound = 10.0**-decade * 0.45 / 2.0 ** (bits - 1 - decade)
    # Between zero and the least value, which is ten times the least decade's lower end, the step is that value.
    bound = jnp.maximum(bound, 0.55 * 10.0 ** (1 - bits))
    assert bool(jnp.all(jnp.abs(decode(encode(x, bits), bits) - x) <= bound * 1.001))


@pytest.mark.parametrize(("length", "size"), [(768, 256), (64, 64), (3000, 250), (50_257, 50_257), (12, 12)])
def test_blocks_divide_the_axis(length, size):
    assert block_size(length, 256) == size


def test_moments_of_matrices_take_a_quarter_of_the_bytes_and_others_stay():
    params = random_tree(0)
    state = jax.eval_shape(build_optimizer(config(AdamW8Bit()), 10, params, AXES).init, params)
    sizes = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        for name in SHAPES:
            if name in jax.tree_util.keystr(path):
                sizes[name] = sizes.get(name, 0) + leaf.size * leaf.dtype.itemsize
    assert sizes["up"] == 2 * 64 * (512 + 4 * 2)
    assert sizes["down"] == 2 * 512 * (64 + 4)
    assert sizes["table"] == 8 * 5 * 64
    assert sizes["bias"] == 8 * 512


def train(rule, steps=200):
    """Fits a two-layer network to another one from noisy batches; returns the mean loss of the last steps."""
    target, params = random_tree(1, 0.1), random_tree(2, 0.1)
    optimizer = build_optimizer(config(rule), steps, params, AXES)

    def predict(p, x):
        return jnp.tanh(x @ p["table"] @ p["up"] + p["bias"][None]) @ p["down"]

    def loss(p, key):
        x_key, noise_key = jax.random.split(key)
        x = jax.random.normal(x_key, (32, 5))
        wanted = predict(target, x) + 0.1 * jax.random.normal(noise_key, (32, 64))
        return jnp.mean(jnp.square(predict(p, x) - wanted))

    def step(carry, i):
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params, jax.random.fold_in(jax.random.key(0), i))
        updates, state = optimizer.update(gradient, state, params)
        return (jax.tree.map(jnp.add, params, updates), state), value

    _, losses = jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(steps)))((params, optimizer.init(params)))
    return losses


def test_training_follows_adam_with_float32_moments():
    coded, plain = train(AdamW8Bit(b2=0.999)), train(AdamW(b2=0.999))
    assert plain[-50:].mean() < 0.2 * plain[:5].mean()
    np.testing.assert_allclose(coded[-50:].mean(), plain[-50:].mean(), rtol=0.03)
    np.testing.assert_allclose(coded[0], plain[0], rtol=1e-6)


def test_divided_over_devices_it_is_the_same():
    params, gradient = random_tree(0), random_tree(1)
    optimizer = build_optimizer(config(AdamW8Bit()), 10, params, AXES)
    mesh = build_mesh(MeshConfig(fsdp=2, tensor=2, data=1), jax.devices()[:4])
    table = dict(DEFAULT_RULES.parameters) | {"vocab": ()}

    def place(tree, axes):
        return jax.tree.map(lambda x, names: jax.device_put(x, NamedSharding(mesh, spec(names, table))), tree, axes)

    state = optimizer.init(params)
    expected = jax.jit(optimizer.update)(gradient, state, params)
    placed = place(state, state_axes(state, params, AXES))
    assert {str(x.dtype) for x in jax.tree.leaves(placed) if not x.sharding.is_fully_replicated} >= {"int8", "uint8"}
    found = jax.jit(optimizer.update)(place(gradient, AXES), placed, place(params, AXES))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9), found, expected)
