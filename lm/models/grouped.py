"""The product of rows sorted by group with one matrix for each group, and its gradient.

Accelerators have `jax.lax.ragged_dot`; on a CPU, where that costs as much as every matrix for every row,
a loop over blocks of rows costs what the rows do. Knows nothing of experts. Law: both equal the product
of each row with the matrix of its group; rows behind the last group give zero, and so do gradients of
groups without rows.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lm.models.products import contract
from lm.parallel import by_platform

# Rows of one product on a CPU: enough to hide reading the matrix, few enough that a group's last block wastes little.
MAX_BLOCK = 256


def grouped_product(sizes_E: jax.Array, equation: str, x: jax.Array, kernels: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns f32[A, F], each row times the matrix of its group.

    Args:
      sizes_E: i32, rows of each group; rows are sorted by group.
      equation: not read; whatever its letters, rows meet the second axis of the kernels.
      x: [A, D].
      kernels: [E, D, F].
      dtype: dtype of the operands; sums are float32.
    """
    del equation
    return _product(jnp.dtype(dtype), x, kernels, sizes_E)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(dtype: jnp.dtype, x_AD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    return _multiply(dtype, x_AD, w_EDF, sizes_E, transposed=False)


def _product_forward(dtype: jnp.dtype, x_AD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> tuple[jax.Array, Any]:
    return _multiply(dtype, x_AD, w_EDF, sizes_E, transposed=False), (x_AD, w_EDF, sizes_E)


def _product_backward(dtype: jnp.dtype, saved: Any, gradient_AF: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x_AD, w_EDF, sizes_E = saved
    dx_AD = _multiply(dtype, gradient_AF, w_EDF, sizes_E, transposed=True)
    dw_EDF = _correlate(dtype, x_AD, gradient_AF, sizes_E)
    return dx_AD.astype(x_AD.dtype), dw_EDF.astype(w_EDF.dtype), None


_product.defvjp(_product_forward, _product_backward)


def _multiply(
    dtype: jnp.dtype, x_AD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, *, transposed: bool
) -> jax.Array:
    """Returns f32[A, F]; with `transposed`, rows meet the last axis of the matrices."""
    y_AF = by_platform(
        x_AD,
        w_EDF,
        sizes_E,
        cpu=functools.partial(_multiply_blocks, dtype, transposed),
        default=functools.partial(_multiply_ragged, dtype, transposed),
    )
    # Rows of no group are whatever the backend leaves there.
    return jnp.where(jnp.arange(len(x_AD))[:, None] < jnp.sum(sizes_E), y_AF, 0.0)


def _correlate(dtype: jnp.dtype, x_AD: jax.Array, y_AF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Returns f32[E, D, F], the sum over each group's rows of x times y: the gradient of the matrices."""
    return by_platform(
        x_AD,
        y_AF,
        sizes_E,
        cpu=functools.partial(_correlate_blocks, dtype),
        default=functools.partial(_correlate_ragged, dtype),
    )


def _multiply_ragged(
    dtype: jnp.dtype, transposed: bool, x_AD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array
) -> jax.Array:
    w_EDF = jnp.swapaxes(w_EDF, 1, 2) if transposed else w_EDF
    return jax.lax.ragged_dot(x_AD.astype(dtype), w_EDF.astype(dtype), sizes_E, preferred_element_type=jnp.float32)


def _correlate_ragged(dtype: jnp.dtype, x_AD: jax.Array, y_AF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )
    return jax.lax.ragged_dot_general(
        x_AD.astype(dtype), y_AF.astype(dtype), sizes_E, numbers, preferred_element_type=jnp.float32
    )


def _block_size(num_rows: int, num_groups: int) -> int:
    """Returns the power of two from the mean size of a group, between 8 and MAX_BLOCK."""
    return min(MAX_BLOCK, max(8, 1 << (num_rows // num_groups).bit_length()))


class _Blocks:
    """Cuts each group into blocks of rows; the last block of a group may reach into the groups after it."""

    def __init__(self, num_rows: int, sizes_E: jax.Array) -> None:
        self.size = _block_size(num_rows, len(sizes_E))
        self.ends_E = jnp.cumsum(sizes_E)
        self.starts_E = self.ends_E - sizes_E
        self.last_E = jnp.cumsum(-(-sizes_E // self.size))
        self.first_E = self.last_E - (-(-sizes_E // self.size))

    @property
    def count(self) -> jax.Array:
        """Number of blocks, i32[]."""
        return self.last_E[-1]

    def place(self, block: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the group of a block and its first row."""
        group = jnp.sum((self.last_E <= block).astype(jnp.int32))
        return group, self.starts_E[group] + (block - self.first_E[group]) * self.size


def _multiply_blocks(
    dtype: jnp.dtype, transposed: bool, x_AD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array
) -> jax.Array:
    equation = "AD,FD->AF" if transposed else "AD,DF->AF"
    blocks = _Blocks(len(x_AD), sizes_E)
    x_AD = jnp.pad(x_AD, ((0, blocks.size), (0, 0)))

    def step(block: jax.Array, y_AF: jax.Array) -> jax.Array:
        group, start = blocks.place(block)
        rows = jax.lax.dynamic_slice_in_dim(x_AD, start, blocks.size)
        # Rows of later groups are wrong here and written again by their own blocks, which come later.
        return jax.lax.dynamic_update_slice_in_dim(y_AF, contract(equation, rows, w_EDF[group], dtype), start, 0)

    width = w_EDF.shape[1 if transposed else 2]
    y_AF = jnp.zeros((len(x_AD), width), jnp.float32)
    return jax.lax.fori_loop(0, blocks.count, step, y_AF)[: len(x_AD) - blocks.size]


def _correlate_blocks(dtype: jnp.dtype, x_AD: jax.Array, y_AF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    blocks = _Blocks(len(x_AD), sizes_E)
    x_AD, y_AF = (jnp.pad(rows, ((0, blocks.size), (0, 0))) for rows in (x_AD, y_AF))

    def step(block: jax.Array, w_EDF: jax.Array) -> jax.Array:
        group, start = blocks.place(block)
        own = (start + jnp.arange(blocks.size) < blocks.ends_E[group])[:, None]
        x = jax.lax.dynamic_slice_in_dim(x_AD, start, blocks.size)
        y = jnp.where(own, jax.lax.dynamic_slice_in_dim(y_AF, start, blocks.size), 0)
        return w_EDF.at[group].add(contract("AD,AF->DF", x, y, dtype))

    w_EDF = jnp.zeros((len(sizes_E), x_AD.shape[1], y_AF.shape[1]), jnp.float32)
    return jax.lax.fori_loop(0, blocks.count, step, w_EDF)
