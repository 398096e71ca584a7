"""Adam whose moments of matrices are kept in 8 bits, block by block (Dettmers et al. 2022).

Owns the code of a number in [-1, 1] and the blocks. Tables and vectors keep float32 moments, as the paper
has it (section 2.3). Laws: the largest element of a block is exact, every other one is off by at most half a step of
its decade; codes have the shape of their parameter, so that they are divided over devices as it is. Scales are so in
every axis but that of the blocks, which is whole on every device.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lm.optim.roles import Role

# A last axis without a divisor from here up to the block's size is one block.
SMALLEST_BLOCK = 32
# Fields of the state whose leaves have a number for each block of a parameter's last axis.
BLOCK_FIELDS = ("mean_scale", "root_scale")


class QuantizedState(NamedTuple):
    """Adam's state. Each field but the count is a tree like the parameters.

    Attributes:
      count: i32[], updates made.
      mean: i8 codes of a matrix's mean of gradients; of any other parameter, the mean itself, f32.
      root: u8 codes of the root of its mean square; of any other parameter, f32.
      mean_scale: f32, the largest mean of each block, in the last axis; a MaskedNode where nothing is coded.
      root_scale: the same of the root.
    """

    count: Any
    mean: Any
    root: Any
    mean_scale: Any
    root_scale: Any


def encode(x: jax.Array, num_bits: int) -> jax.Array:
    """Returns i32 codes from 0 to 2^num_bits - 1, in the order of their values, of f32 numbers in [0, 1].

    The code is that of dynamic quantisation (section 1.3): the decade 10^-k to 10^(1-k), for k from 1 up to num_bits,
    is divided into 2^(num_bits - k) equal steps, whose upper ends are the values; 0 and 1 are exact.
    """
    last = num_bits - 1
    below = jnp.zeros(x.shape, jnp.float32)
    for k in range(1, num_bits):
        below = below + (x < 10.0**-k)
    steps = jnp.exp2(last - below)
    # Below the last decade, what is nearer to zero than to its lower end is zero.
    part = (x * 10.0**below - 0.1) / 0.9
    return jnp.maximum(steps - 1 + jnp.round(part * steps), 0.0).astype(jnp.int32)


def decode(codes: jax.Array, num_bits: int) -> jax.Array:
    """Returns the f32 values of codes; the inverse of `encode` for these values."""
    number = codes.astype(jnp.float32)
    mantissa, exponent = jnp.frexp(number)
    decade = (exponent - num_bits).astype(jnp.float32)
    step = jnp.exp2(1.0 - exponent.astype(jnp.float32))
    return jnp.where(number > 0, 10.0**decade * (0.1 + 0.9 * (2.0 * mantissa - 1.0 + step)), 0.0)


def block_size(length: int, most: int) -> int:
    """Returns how many neighbours along an axis of `length` share a scale.

    That is the largest divisor from `SMALLEST_BLOCK` up to `most`, and `length` itself where there is none.
    """
    found = next(size for size in range(min(most, length), 0, -1) if length % size == 0)
    return found if found >= min(SMALLEST_BLOCK, length) else length


def _blocks(x: jax.Array, most: int) -> jax.Array:
    size = block_size(x.shape[-1], most)
    return x.reshape(*x.shape[:-1], x.shape[-1] // size, size)


def _compress(x: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
    """Returns codes and scales: i8 codes with a sign; see `_compress_root` for what has none."""
    blocks = _blocks(x, most)
    scale = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True)
    codes = jnp.sign(blocks).astype(jnp.int32) * encode(jnp.abs(blocks) / jnp.where(scale > 0, scale, 1.0), 7)
    return codes.reshape(x.shape).astype(jnp.int8), scale[..., 0]


def _compress_root(x: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
    """Returns u8 codes and scales of numbers from 0 up; only 0 becomes 0, since the mean is divided by it."""
    blocks = _blocks(x, most)
    scale = jnp.max(blocks, axis=-1, keepdims=True)
    codes = encode(blocks / jnp.where(scale > 0, scale, 1.0), 8)
    codes = jnp.where(blocks > 0, jnp.maximum(codes, 1), 0)
    return codes.reshape(x.shape).astype(jnp.uint8), scale[..., 0]


def _expand(codes: jax.Array, scale: jax.Array, most: int) -> jax.Array:
    """Returns f32 numbers of codes and scales of either kind."""
    blocks = _blocks(codes.astype(jnp.int32), most)
    values = decode(jnp.abs(blocks), 7 if codes.dtype == jnp.int8 else 8)
    return (jnp.sign(blocks) * values * scale[..., None]).reshape(codes.shape)


def scale_by_quantized_adam(roles: Any, b1: float, b2: float, epsilon: float, block: int) -> Any:
    """Divides the mean of the gradient by the root of its mean square, both corrected for their start.

    The root is kept, and not the square as in the paper: its decades reach as far as twice as many of the square.

    Args:
      roles: tree of `Role`, like the parameters.
      b1: decay of the mean.
      b2: decay of the mean square.
      epsilon: added to the root.
      block: most elements that share a scale.
    """

    def init(params: Any) -> QuantizedState:
        def zeros(role: Role, p: Any, dtype: Any) -> Any:
            return jnp.zeros(p.shape, dtype if role.kind == "matrix" else jnp.float32)

        def scales(role: Role, p: Any) -> Any:
            if role.kind != "matrix":
                return optax.MaskedNode()
            return jnp.zeros((*p.shape[:-1], p.shape[-1] // block_size(p.shape[-1], block)), jnp.float32)

        def tree(function: Any, *extra: Any) -> Any:
            return jax.tree.map(lambda p, role: function(role, p, *extra), params, roles)

        count = jnp.zeros([], jnp.int32)
        return QuantizedState(count, tree(zeros, jnp.int8), tree(zeros, jnp.uint8), tree(scales), tree(scales))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, QuantizedState]:
        del params
        count = optax.safe_increment(state.count)
        start1, start2 = (1 - jnp.float32(b) ** count for b in (b1, b2))

        def leaf(g: jax.Array, role: Role, mean: Any, root: Any, mean_scale: Any, root_scale: Any) -> tuple[Any, ...]:
            coded = role.kind == "matrix"
            old_mean = _expand(mean, mean_scale, block) if coded else mean
            old_root = _expand(root, root_scale, block) if coded else root
            mean = b1 * old_mean + (1 - b1) * g
            root = jnp.sqrt(b2 * jnp.square(old_root) + (1 - b2) * jnp.square(g))
            direction = (mean / start1) / (root / jnp.sqrt(start2) + epsilon)
            if not coded:
                return direction, mean, root, mean_scale, root_scale
            (mean, mean_scale), (root, root_scale) = _compress(mean, block), _compress_root(root, block)
            return direction, mean, root, mean_scale, root_scale

        leaves, structure = jax.tree.flatten(updates)
        trees = (structure.flatten_up_to(tree) for tree in (roles, *state[1:]))
        results = list(map(leaf, leaves, *trees))
        directions, *moments = (structure.unflatten(part) for part in zip(*results, strict=True))
        return directions, QuantizedState(count, *moments)

    return optax.GradientTransformation(init, update)
