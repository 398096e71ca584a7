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

from lm.parallel import by_platform, is_divided, num_shards

# Like `contract`: (equation, x, y, dtype of the operands) -> float32.
Product = Callable[[str, jax.Array, jax.Array, jnp.dtype], jax.Array]

# Products of fewer bfloat16 rows, on the left, are padded to so many on a CPU: those with one matrix, and those with a
# batch of them. On the right, two are enough.
FEWEST_ROWS, FEWEST_BATCH_ROWS, FEWEST_COLUMNS = 8, 4, 2


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


def inner(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns the sum of `x * y`, both float32, over the last axis, which is kept with size one.

    XLA:CPU computes a sum of products of two arrays within the matrix product that reads it, ten times as slowly as
    the product with a vector of ones.
    """

    def multiply(products: jax.Array) -> jax.Array:
        return jnp.einsum("...H,H->...", products, jnp.ones(products.shape[-1]))[..., None]

    def add(products: jax.Array) -> jax.Array:
        return jnp.sum(products, axis=-1, keepdims=True)

    return by_platform(x * y, cpu=add if is_divided() else multiply, default=add)


@jax.custom_jvp
def stored(x: jax.Array) -> jax.Array:
    """Returns `x`, which XLA:CPU then computes once, f32, where it would do so within each copy that products read.

    Such a copy takes ten times as long with a norm, a sum and the norm before that in it: 1.18 instead of 0.98 s for a
    step of BERT. What stops the compiler is a division, which it does not repeat; here by one, and NaN stays NaN
    (subnormal numbers become zero, as in all of XLA:CPU's arithmetic).
    bfloat16, whose rounding stops it as well, is left alone, and so is what other devices compute.
    """
    if x.dtype != jnp.float32 or is_divided():
        return x
    return by_platform(x, cpu=lambda x: x / (x == x).astype(x.dtype), default=lambda x: x)


@stored.defjvp
def _stored_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    return stored(*primals), tangents[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _contract(equation: str, dtype: jnp.dtype, x: jax.Array, y: jax.Array) -> jax.Array:
    return by_platform(
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
    layer's three products therefore needs a transposed copy; it is cheapest of a small array. The right operand is
    always brought to an order of its own: for few rows, the matrix is better on the left, though their product then
    comes out transposed.
    """
    operands, result = equation.split("->")
    x, y = operands.split(",")
    sizes = {**dict(zip(x, x_shape, strict=True)), **dict(zip(y, y_shape, strict=True))}

    def moved(before: str, after: str, width: int) -> int:
        if before == after:
            return 0
        # Rows that move whole are copied twice as fast.
        effort = 1 if before[-1] == after[-1] else 2
        return effort * width * math.prod(sizes[letter] for letter in before)

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
                packed = math.prod(sizes[letter] for letter in plan.right)
                copied = moved(first, plan.left, 2) + moved(second, plan.right, 2) + moved(plan.result, result, 4)
                cost = copied + packed
                found.append((cost, plan))
    return min(found, key=lambda pair: pair[0])[1]


def arranged_einsum(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Computes the einsum of two bfloat16 arrays in the form of `arrange`, as float32."""
    operands, result = equation.split("->")
    x_axes, y_axes = operands.split(",")
    plan = arrange(equation, x.shape, y.shape)
    first, second = ((y, y_axes), (x, x_axes)) if plan.swapped else ((x, x_axes), (y, y_axes))
    # A copy of a whole matrix, or of a cache, for few rows would cost more than any form of their product.
    apart = min(_own_size(*first, second[1]), _own_size(*second, first[1])) >= FEWEST_ROWS
    left, right = _transposed(*first, plan.left, apart), _transposed(*second, plan.right, apart)
    product = _few_rows(plan, left, right)
    return jnp.transpose(product, [plan.result.index(letter) for letter in result])


def _own_size(x: jax.Array, axes: str, others: str) -> int:
    """Returns the number of rows: of all axes that the other operand lacks."""
    return math.prod(size for letter, size in zip(axes, x.shape, strict=True) if letter not in others)


def _product(plan: Arrangement, left: jax.Array, right: jax.Array) -> jax.Array:
    """Multiplies arranged operands.

    What is summed over, and the own axes of either operand, are one axis each: XLA:CPU would bring a right operand of
    more axes to another order with a copy of the whole, and computes what is made of a product in the memory of that
    product only where both have one shape (the exponentials of logits). Without the barrier, it turns the transpose
    of a product into a product of transposes: a form that it cannot run ("Unsupported element type for DotThunk:
    BF16 x BF16 = F32", jax 0.10.2).
    """
    if is_length_divided():
        equation = f"{plan.left},{plan.right}->{plan.result}"
        return jax.lax.optimization_barrier(jnp.einsum(equation, left, right, preferred_element_type=jnp.float32))
    summed = "".join(letter for letter in plan.left if letter in plan.right and letter not in plan.result)
    # Rows that devices divide may be several axes, each with devices of its own.
    rows = "" if is_divided() else _own(plan.left, plan.right)
    groups = summed, rows, _own(plan.right, plan.left)
    sizes = dict(zip(plan.left + plan.right, left.shape + right.shape, strict=True))

    def merge(axes: str) -> list[str]:
        return list(dict.fromkeys(next((group for group in groups if x in group), x) for x in axes))

    def reshape(x: jax.Array, axes: str) -> jax.Array:
        # Not -1: an array without rows does not tell how much is left.
        return x.reshape([math.prod(sizes[letter] for letter in group) for group in merge(axes)])

    first, second, result = ("".join(group[0] for group in merge(x)) for x in (plan.left, plan.right, plan.result))
    operands = reshape(left, plan.left), reshape(right, plan.right)
    product = jnp.einsum(f"{first},{second}->{result}", *operands, preferred_element_type=jnp.float32)
    shape = [sizes[letter] for letter in plan.result]
    if is_divided():
        return jax.lax.optimization_barrier(product.reshape(shape))
    return jax.lax.optimization_barrier(product).reshape(shape)


def _own(axes: str, others: str) -> str:
    """Returns the axes that the other operand lacks."""
    return "".join(letter for letter in axes if letter not in others)


def is_length_divided() -> bool:
    """Returns whether devices divide sequences: rows and positions, both divided, would be gathered as one axis."""
    return is_divided() and num_shards("length") > 1


def _few_rows(plan: Arrangement, left: jax.Array, right: jax.Array) -> jax.Array:
    """Multiplies with zeros added to an operand that has few rows.

    XLA:CPU converts both operands to float32 for one row, which takes 4 to 8 times as long as with AMX.
    """
    batch = "".join(letter for letter in plan.left if letter in plan.right and letter in plan.result)
    own = _own(plan.left, plan.right), _own(plan.right, plan.left)
    sizes = dict(zip(plan.left + plan.right, left.shape + right.shape, strict=True))
    rows, columns = _own_size(left, plan.left, plan.right), _own_size(right, plan.right, plan.left)
    fewest = FEWEST_BATCH_ROWS if batch else FEWEST_ROWS
    if left.dtype != jnp.bfloat16 or (rows >= fewest and columns >= FEWEST_COLUMNS):
        return _product(plan, left, right)
    # A letter of its own stands for all rows: a product may have none, or several.
    row = next(letter for letter in "abcdefghijklmnopqrstuvwxyz" if letter not in plan.left + plan.right)
    few_left = rows < fewest
    if few_left:
        left, axes = _with_zeros(left, plan.left, batch, own[0], row, fewest)
        padded = dataclasses.replace(plan, left=axes, result=batch + row + own[1])
    else:
        right, axes = _with_zeros(right, plan.right, batch, own[1], row, FEWEST_COLUMNS)
        padded = dataclasses.replace(plan, right=axes, result=batch + own[0] + row)
    product = _product(padded, left, right)
    kept = jax.lax.slice_in_dim(product, 0, rows if few_left else columns, axis=padded.result.index(row))
    return kept.reshape([sizes[letter] for letter in plan.result])


def _with_zeros(x: jax.Array, axes: str, batch: str, own: str, row: str, fewest: int) -> tuple[jax.Array, str]:
    """Returns `x` with its axes `own` as one, or one more after the batch's, padded to `fewest`; and its axes."""
    place = axes.index(own[0]) if own else len(batch)
    number, after = math.prod(x.shape[place : place + len(own)]), place + len(own)
    x = x.reshape(*x.shape[:place], number, *x.shape[after:])
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, (fewest - number) * (axis == place), 0) for axis in range(x.ndim)])
    return x, axes[:place] + row + axes[after:]


def _transposed(x: jax.Array, axes: str, wanted: str, apart: bool) -> jax.Array:
    """Returns `x` with its axes in the order wanted; `apart`, as a copy that the compiler keeps out of the product.

    The axis of size one between the two reshapes makes it a row-major array in the compiler's eyes as well.
    """
    if axes == wanted:
        return x
    x = jnp.transpose(x, [axes.index(letter) for letter in wanted])
    if not apart:
        return x
    copied = jax.lax.optimization_barrier(jax.lax.reshape(x, (*x.shape[:-1], 1, x.shape[-1])))
    return jax.lax.reshape(copied, x.shape)
