"""Laws of products: equal to the einsum in float64, both ways, in the form that the platform multiplies fast."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.models.products import arrange, contract, inner, stored

SIZES = {"B": 2, "T": 6, "S": 5, "D": 8, "N": 4, "K": 2, "G": 2, "H": 3, "F": 7, "V": 11, "U": 4}
EQUATIONS = [
    "BTD,DNH->BTNH",
    "BTNH,NHD->BTD",
    "BTF,FD->BTD",
    "BTD,VD->BTV",
    "BTKGH,BSKH->BKGTS",
    "BKGTS,BSKH->BTKGH",
    "BKGTS,BTSU->BKGTU",
]


def draw(letters, seed, dtype):
    x = np.random.default_rng(seed).standard_normal([SIZES[letter] for letter in letters])
    return jnp.asarray(x, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("equation", EQUATIONS)
def test_equals_the_einsum_in_float64_forward_and_backward(equation, dtype):
    operands, result = equation.split("->")
    a, b = operands.split(",")
    x, y, g = (draw(letters, seed, dtype) for seed, letters in enumerate((a, b, result)))
    out, pull = jax.vjp(functools.partial(contract, equation, dtype=jnp.dtype(dtype)), x, y)
    dx, dy = pull(g.astype(jnp.float32))
    wide = [np.asarray(array, np.float64) for array in (x, y, g)]
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, np.einsum(equation, *wide[:2]), rtol=1e-5, atol=1e-5)
    # The gradients of bfloat16 operands are rounded once, to eight bits.
    tolerance = 1e-5 if dtype == "float32" else 2**-8
    for found, wanted in (
        (dx, np.einsum(f"{result},{b}->{a}", wide[2], wide[1])),
        (dy, np.einsum(f"{a},{result}->{b}", wide[0], wide[2])),
    ):
        np.testing.assert_allclose(np.asarray(found, np.float64), wanted, rtol=tolerance, atol=1e-5)


def test_a_sum_of_products_is_one_product_with_ones():
    x, y = (draw("BKGTH", seed, "float32") for seed in (0, 1))
    wanted = np.sum(np.asarray(x, np.float64) * np.asarray(y, np.float64), axis=-1, keepdims=True)
    np.testing.assert_allclose(inner(x, y), wanted, rtol=1e-5, atol=1e-6)
    assert re.search(r"\bdot\(", jax.jit(inner).lower(x, y).compile().as_text())


def test_what_is_stored_is_the_same_and_is_computed_once():
    special = jnp.asarray([0.0, -0.0, 2e-38, -2e-38, 3.4e38, jnp.inf, -jnp.inf, 0.1], jnp.float32)
    np.testing.assert_array_equal(jax.jit(stored)(special).view(jnp.int32), special.view(jnp.int32))
    assert np.isnan(stored(jnp.float32(jnp.nan)))
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(stored(x) * special[-1]))(special), special[-1])

    def multiply(keep, x, y, w):
        """A product and the gradient of its weight, for which a transposed copy is made."""
        kept = keep((x - y) * 2.0)
        return contract("BD,DF->BF", kept, w, kept.dtype), contract("BD,BF->DF", kept, x, kept.dtype)

    arrays = jnp.ones((64, 48)), jnp.ones((64, 1)), jnp.ones((48, 48))
    differences = [
        jax.jit(functools.partial(multiply, keep)).lower(*arrays).compile().as_text().count(" subtract(")
        for keep in (stored, lambda x: x)
    ]
    assert differences == [1, 2]


@pytest.mark.parametrize("equation", ["BTD,DNH->BTNH", "BTNH,NHD->BTD", "BTD,NHD->BTNH", "BTD,VD->BTV", "BTD,D->BT"])
def test_one_row_is_padded_and_cut_again(equation):
    operands, _result = equation.split("->")
    a, b = operands.split(",")
    x, y = draw(a, 0, "bfloat16")[:1, :1], draw(b, 1, "bfloat16")
    wanted = np.einsum(equation, *(np.asarray(array, np.float64) for array in (x, y)))
    np.testing.assert_allclose(contract(equation, x, y, jnp.dtype("bfloat16")), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_rows_give_no_rows_and_a_gradient_of_zeros(dtype):
    """Several letters are summed over: as one axis, their size does not follow from an array without elements."""
    x, y = draw("BTNH", 0, dtype)[:0], draw("NHD", 1, dtype)
    out, pull = jax.vjp(functools.partial(contract, "BTNH,NHD->BTD", dtype=jnp.dtype(dtype)), x, y)
    dx, dy = pull(out)
    assert (out.shape, dx.shape) == ((0, 6, 8), (0, 6, 4, 3))
    np.testing.assert_array_equal(dy, jnp.zeros((4, 3, 8)))


@pytest.mark.parametrize("equation", EQUATIONS)
def test_the_left_operand_ends_with_what_is_summed(equation):
    operands, result = equation.split("->")
    a, b = operands.split(",")
    plan = arrange(equation, tuple(SIZES[i] for i in a), tuple(SIZES[i] for i in b))
    assert sorted(plan.result) == sorted(result)
    assert plan.left[-1] not in result
    assert {plan.left[-1]} <= set(plan.right)


def test_the_smaller_array_is_copied():
    # The gradient of a table: logits are V / D times as large as hidden states, and stay where they are.
    assert arrange("BTD,BTV->VD", (8, 256, 64), (8, 256, 8192)).left == "DBT"
    assert arrange("BTD,BTF->DF", (8, 256, 64), (8, 256, 256)).left == "DBT"


def test_of_few_rows_the_matrix_is_on_the_left():
    assert arrange("BTD,FD->BTF", (4, 1, 64), (256, 64)).left == "FD"
    assert arrange("BTD,FD->BTF", (4, 64, 64), (256, 64)).left == "BTD"


def test_the_result_may_be_transposed():
    """XLA:CPU of jax 0.10.2 fails on the transpose of a bfloat16 product with float32 sums without a barrier."""
    x, y = draw("TD", 0, "bfloat16"), draw("DF", 1, "bfloat16")
    out = jax.jit(lambda x, y: contract("TD,DF->TF", x, y, jnp.dtype("bfloat16")).T)(x, y)
    wanted = np.einsum("td,df->ft", np.asarray(x, np.float64), np.asarray(y, np.float64))
    np.testing.assert_allclose(out, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the form is for CPU")
def test_the_gradient_of_a_weight_multiplies_bfloat16_operands():
    """Were the copy folded back into the product, XLA:CPU would convert both operands to float32 first."""
    x, w = jnp.ones((64, 32), jnp.bfloat16), jnp.ones((32, 48), jnp.float32)

    def loss(w, x):
        return jnp.sum(jnp.square(contract("TD,DF->TF", x, w, jnp.dtype("bfloat16"))))

    text = jax.jit(jax.grad(loss)).lower(w, x).compile().as_text()
    shapes = dict(re.findall(r"%([\w.\-]+) = (\w+)\[", text))
    products = re.findall(r" dot\(%([\w.\-]+), %([\w.\-]+)\)", text)
    assert products
    assert {shapes[name] for pair in products for name in pair} == {"bf16"}
