"""Products of two arrays: the one place that decides how a matrix product is put to the compiler.

Knows no parameters and no architecture. Law: `contract` is `jnp.einsum` with float32 sums, forward and
backward; how operands are laid out for a platform changes speed and the order of sums, nothing else.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# Like `contract`: (equation, x, y, dtype of the operands) -> float32.
Product = Callable[[str, jax.Array, jax.Array, jnp.dtype], jax.Array]


def contract(equation: str, x: jax.Array, y: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Computes the two-operand einsum with operands in `dtype`, accumulated in and returned as float32.

    The products of the backward pass have the same form: operands in `dtype`, float32 sums.
    The gradient of a float32 operand (a parameter) therefore leaves its sum without another rounding.

    Args:
      equation: such as "BTD,DNH->BTNH"; every letter of an operand stands in the other one or in the result.
      x: first operand.
      y: second operand.
      dtype: float32 or bfloat16.
    """
    return _contract(equation, jnp.dtype(dtype), x, y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _contract(equation: str, dtype: jnp.dtype, x: jax.Array, y: jax.Array) -> jax.Array:
    return jax.lax.platform_dependent(
        x.astype(dtype),
        y.astype(dtype),
        cpu=functools.partial(arranged_einsum, equation),
        default=functools.partial(jnp.einsum, equation, preferred_element_type=jnp.float32),
    )


def _contract_forward(equation: str, dtype: jnp.dtype, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Any]:
    return _contract(equation, dtype, x, y), (x, y)


def _contract_backward(equation: str, dtype: jnp.dtype, saved: Any, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, y = saved
    operands, result = equation.split("->")
    x_axes, y_axes = operands.split(",")
    dx: jax.Array = _contract(f"{result},{y_axes}->{x_axes}", dtype, gradient, y)
    dy: jax.Array = _contract(f"{x_axes},{result}->{y_axes}", dtype, x, gradient)
    return dx.astype(x.dtype), dy.astype(y.dtype)


_contract.defvjp(_contract_forward, _contract_backward)


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """A product in the form batch, left, summed times batch, right, summed (or batch, summed, right).

    Attributes:
      swapped: whether the second operand of the equation is the left one.
      left: letters of the left operand, in the order wanted.
      right: letters of the right operand, in the order wanted.
      result: letters of the product as it comes out.
    """

    swapped: bool
    left: str
    right: str
    result: str


@functools.lru_cache(maxsize=1024)
def arrange(equation: str, x_shape: tuple[int, ...], y_shape: tuple[int, ...]) -> Arrangement:
    """Finds the form of the product that moves the fewest bytes.

    XLA:CPU multiplies bfloat16 matrices as such (AMX, by YNNPACK) only if the left one's last axis is
    summed over; any other form is converted to float32 first, which is slower by 4 to 8. One of a
    layer's three products therefore needs a transposed copy; it is cheapest of a small array.
    """
    operands, result = equation.split("->")
    x, y = operands.split(",")
    sizes = {**dict(zip(x, x_shape, strict=True)), **dict(zip(y, y_shape, strict=True))}

    def moved(before: str, after: str, width: int) -> int:
        return 0 if before == after else width * math.prod(sizes[letter] for letter in before)

    def of(letters: str, *members: str) -> str:
        return "".join(letter for letter in letters if all(letter in m for m in members))

    found: list[tuple[int, Arrangement]] = []
    for swapped in (False, True):
        first, second = (y, x) if swapped else (x, y)
        summed = [of(order, first, second) for order in (first, second)]
        summed = ["".join(letter for letter in s if letter not in result) for s in summed]
        batch = [of(order, first, second, result) for order in (first, second, result)]
        left = ["".join(letter for letter in of(order, first) if letter not in second) for order in (first, result)]
        right = ["".join(letter for letter in of(order, second) if letter not in first) for order in (second, result)]
        for b, m, n, k in itertools.product(*(dict.fromkeys(orders) for orders in (batch, left, right, summed))):
            for right_axes in (b + n + k, b + k + n):
                plan = Arrangement(swapped, b + m + k, right_axes, b + m + n)
                cost = moved(first, plan.left, 2) + moved(second, plan.right, 2) + moved(plan.result, result, 4)
                found.append((cost, plan))
    return min(found, key=lambda pair: pair[0])[1]


def arranged_einsum(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Computes the einsum of two bfloat16 arrays in the form of `arrange`, as float32."""
    operands, result = equation.split("->")
    x_axes, y_axes = operands.split(",")
    plan = arrange(equation, x.shape, y.shape)
    first, second = ((y, y_axes), (x, x_axes)) if plan.swapped else ((x, x_axes), (y, y_axes))
    left, right = _transposed(*first, plan.left), _transposed(*second, plan.right)
    product = jnp.einsum(f"{plan.left},{plan.right}->{plan.result}", left, right, preferred_element_type=jnp.float32)
    # Without the barrier, XLA:CPU turns the transpose of a product into a product of transposes: a form that it
    # cannot run ("Unsupported element type for DotThunk: BF16 x BF16 = F32", jax 0.10.2).
    product = jax.lax.optimization_barrier(product)
    return jnp.transpose(product, [plan.result.index(letter) for letter in result])


def _transposed(x: jax.Array, axes: str, wanted: str) -> jax.Array:
    """Returns a copy of `x` with its axes in the order wanted, which the compiler does not merge into the product.

    The axis of size one between the two reshapes makes it a row-major array in the compiler's eyes as well.
    """
    if axes == wanted:
        return x
    x = jnp.transpose(x, [axes.index(letter) for letter in wanted])
    apart = jax.lax.optimization_barrier(jax.lax.reshape(x, (*x.shape[:-1], 1, x.shape[-1])))
    return jax.lax.reshape(apart, x.shape)
