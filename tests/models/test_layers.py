"""Leaf layers against their formulas; what an equation says of its weight."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import models
from lm.models import initializers, layers

CONFIG = models.Decoder(vocab_size=11, num_layers=2, model_dim=12, num_heads=3, num_kv_heads=1, mlp_dim=20)


def describe(module, *shape):
    parameters = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))["params"]
    return parameters["kernel"], parameters.get("bias")


def test_an_equation_names_everything():
    kernel, bias = describe(layers.Einsum("BTNH,NHD->BTD", CONFIG, True, residual=True), 1, 1, 3, 4)
    assert (kernel.shape, kernel.axes, kernel.fan_in) == ((3, 4, 12), ("heads", "head_dim", "embed"), 12)
    assert kernel.input_axes == ("heads", "head_dim")
    assert kernel.distribution == initializers.Gaussian(0.02 / math.sqrt(4))
    assert (bias.shape, bias.axes, bias.role) == ((12,), ("norm",), "bias")
    kernel, bias = describe(layers.Einsum("BSD,DKH->BSKH", CONFIG, True), 1, 1, 12)
    assert (kernel.shape, kernel.fan_in) == ((12, 1, 4), 12)
    assert (bias.shape, bias.axes) == ((1, 4), ("kv_heads", "head_dim"))


def test_stacked_layers_add_an_axis_and_nothing_else():
    kernel, _ = describe(layers.Einsum("BTD,DF->BTF", CONFIG), 1, 1, 12)
    stacked = kernel.add_axis(0, {})
    assert stacked.axes == ("layers", "embed", "mlp")
    assert stacked.remove_axis(0, {}) == kernel
    assert stacked.fan_in == kernel.fan_in


@pytest.mark.parametrize(
    ("norm", "formula"),
    [
        (
            models.LayerNorm(epsilon=1e-3),
            lambda x: (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-3),
        ),
        (models.RMSNorm(epsilon=1e-3), lambda x: x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3)),
    ],
    ids=["layer", "rms"],
)
def test_norms_equal_their_formulas(norm, formula):
    x = np.random.default_rng(0).normal(2, 3, (2, 5, 12))
    np.testing.assert_allclose(norm.normalize(jnp.asarray(x, jnp.float32)), formula(x), rtol=2e-6, atol=2e-6)


def test_the_gradient_of_a_norm_sums_over_one_axis():
    """Sums of products over two axes, or beside an axis of size one, take XLA:CPU ten times as long."""
    norm = layers.Norm(models.LayerNorm(), jnp.float32)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 6, 8)), jnp.float32)
    params = {"params": {"scale": jnp.ones(8), "bias": jnp.zeros(8)}}
    text = jax.jit(jax.grad(lambda p, x: (norm.apply(p, x) ** 3).sum(), (0, 1))).lower(params, x).as_text()
    sums = re.findall(r"stablehlo.add across dimensions = (\[.*?\]) : \(tensor<(\S+?)xf32>", text)
    assert len(sums) >= 4
    assert all(shape.count("x") == 1 for dimensions, shape in sums if dimensions != "[0, 1, 2]"), sums


def test_norms_compute_in_float32():
    """Large values of a bfloat16 stream keep their norm: squares would not fit the mantissa."""
    x = jnp.full((1, 1, 1000), 300.0, jnp.bfloat16).at[0, 0, 0].set(1.0)
    y = layers.Norm(models.RMSNorm(), jnp.bfloat16).apply({"params": {"scale": jnp.ones(1000)}}, x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y[0, 0, 1:], np.float32), math.sqrt(1000 / 999), rtol=2**-8)


def test_low_precision_products_accumulate_in_float32():
    """4,096 terms of 1 + 1/128 sum exactly; a bfloat16 sum would stop growing at 256."""
    x = jnp.full((1, 4096), 1.0078125, jnp.bfloat16)
    y = layers.contract("BD,DF->BF", x, jnp.ones((4096, 1)), jnp.dtype(jnp.bfloat16))
    assert y.dtype == jnp.float32
    assert float(y[0, 0]) == 4096 * 1.0078125
    gradient = jax.grad(lambda w: layers.contract("BD,DF->BF", x.T, w, jnp.dtype(jnp.bfloat16)).sum())(jnp.ones((1, 1)))
    assert gradient.dtype == jnp.float32
    assert float(gradient[0, 0]) == 4096 * 1.0078125


def test_low_precision_gradients_equal_those_of_the_product():
    x, w = (jax.random.normal(jax.random.key(i), shape) for i, shape in ((0, (2, 3, 12)), (1, (12, 3, 4))))

    def loss(x, w, dtype):
        return jnp.sum(jnp.sin(layers.contract("BTD,DNH->BTNH", x, w, jnp.dtype(dtype))))

    exact = jax.grad(loss, argnums=(0, 1))(x, w, jnp.float32)
    low = jax.grad(loss, argnums=(0, 1))(x, w, jnp.bfloat16)
    for a, b in zip(exact, low, strict=True):
        assert float(jnp.linalg.norm(a - b)) < 0.02 * float(jnp.linalg.norm(a))


def test_dropout_keeps_the_mean_and_needs_a_key():
    x = jnp.ones((100, 100))
    y = layers.dropout(x, 0.3, jax.random.key(0))
    assert set(np.unique(y).tolist()) == {0.0, np.float32(1 / 0.7).item()}
    assert float(y.mean()) == pytest.approx(1.0, abs=0.02)
    assert layers.dropout(x, 0.3, None) is x


def test_every_initializer_answers():
    for initializer in (
        models.NormalInitializer(residual_scaling=False),
        models.FanInInitializer(residual_scaling=True),
    ):
        config = dataclasses.replace(CONFIG, initializer=initializer)
        kernel, _ = describe(layers.Einsum("BTF,FD->BTD", config, residual=True), 1, 1, 20)
        expected = 0.02 if isinstance(initializer, models.NormalInitializer) else math.sqrt(1 / 20 / 4)
        assert kernel.distribution.stddev == pytest.approx(expected)
