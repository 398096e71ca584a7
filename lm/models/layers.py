"""Leaf layers: the only places where a parameter is declared, each exactly once.

A weight is named by its equation: `Einsum("BTD,DNH->BTNH", config)` reads shape, logical axes, fan-in
and initial scale off the string and the sizes of the configuration. Knows nothing of attention,
stacks, objectives or meshes. Law: a layer is a pure function of its parameters and its arguments, and
products accumulate in float32 whatever the compute dtype.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm.models.initializers import Constant, Gaussian
from lm.models.products import Product, contract
from lm.parallel import constrain, is_divided

if TYPE_CHECKING:
    from lm.models.transformer import Transformer

# The letters that may stand in the equation of a weight, with the logical axis that each one means.
WEIGHT_AXES: Mapping[str, str] = {
    "D": "embed",
    "Z": "embed",  # the model dimension once more, where a weight maps it to itself
    "N": "heads",
    "K": "kv_heads",
    "H": "head_dim",
    "F": "mlp",
    "V": "vocab",
    "E": "experts",
    "R": "latent",
    "P": "positions",
    "U": "buckets",
    "X": "classes",
}


# Stands in the parameter tree in place of `kernel` where the axes that are summed over have been moved to the end.
SUMMED_LAST = "kernel_summed_last"

Role = Literal["matrix", "table", "scale", "bias"]


class Rule(Protocol):
    """Says how a parameter that no gradient moves follows from what was counted in a step."""

    def update(self, value: jax.Array, statistic: jax.Array) -> jax.Array:
        """Returns the next value, of the same shape; a leading axis of layers is there for both or neither."""
        ...


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("value",),
    meta_fields=("axes", "role", "fan_in", "distribution", "input_axes", "active_share", "rule"),
)
@dataclasses.dataclass(frozen=True)
class Parameter(nn.meta.AxisMetadata):
    """Describes one leaf of the parameter tree.

    Attributes:
      value: its shape and dtype (a `jax.ShapeDtypeStruct`).
      axes: logical name of each axis, of `lm.parallel.LOGICAL_AXES`.
      role: "matrix" is a product's operand and "table" is looked up; both may be decayed. "scale" and "bias" are not.
      distribution: how its initial value is drawn.
      fan_in: number of inputs that are summed into one output; 1 for tables, scales and biases.
      input_axes: logical names of the axes that are summed over; empty for tables, scales and biases.
      active_share: share of its elements that one token meets; below 1 for the experts of a mixture.
      rule: how its value follows from what was counted in a step, for one that no gradient moves (a router's balancing
        bias); None is left to the optimizer.
    """

    value: Any
    axes: tuple[str, ...]
    role: Role
    distribution: Gaussian | Constant
    fan_in: int = 1
    input_axes: tuple[str, ...] = ()
    active_share: float = 1.0
    rule: Rule | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The leaf's shape, the axis of stacked layers included."""
        return self.value.shape

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.value.shape)

    def unbox(self) -> Any:
        """Returns the value alone."""
        return self.value

    def replace_boxed(self, val: Any) -> "Parameter":
        """Returns the same description of another value."""
        return dataclasses.replace(self, value=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> "Parameter":
        """Returns the description with the axis of stacked layers added."""
        del params
        return dataclasses.replace(self, axes=(*self.axes[:index], "layers", *self.axes[index:]))

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "Parameter":
        """Returns the description with the axis of stacked layers removed."""
        del params
        return dataclasses.replace(self, axes=self.axes[:index] + self.axes[index + 1 :])


def declare(shape: tuple[int, ...], axes: tuple[str, ...], role: Role, **description: Any) -> Callable[..., Any]:
    """Makes the function that Linen calls to describe a new parameter (traced for shapes, never run)."""
    return lambda key: Parameter(jnp.zeros(shape, jnp.float32), axes, role, **description)


def match_rank(x: jax.Array, ndim: int) -> jax.Array:
    """Prepends axes of size one until `x` has rank `ndim`, since ranks are never promoted silently."""
    return x.reshape((1,) * (ndim - x.ndim) + x.shape)


class Einsum(nn.Module):
    """A learned linear map named by its equation.

    The second operand is the parameter `kernel`; its letters stand for `config.sizes` (or `sizes` here).
    Letters of the kernel that the result lacks are summed over: their sizes multiply to the fan-in.

    Attributes:
      equation: such as "BTD,DNH->BTNH".
      config: sizes, initialiser and compute dtype.
      use_bias: whether a bias over the kernel's output letters is added.
      residual: whether the result is written to the residual stream.
      sizes: (letter, size) pairs that differ from `config.sizes`.
      scale: multiplies the initial standard deviation.
      active_share: share of the kernel that one token meets (experts).
      float32_result: whether the result stays in float32 (logits).
    """

    equation: str
    config: "Transformer"
    use_bias: bool = False
    residual: bool = False
    sizes: tuple[tuple[str, int], ...] = ()
    scale: float = 1.0
    active_share: float = 1.0
    float32_result: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, equation: str | None = None, product: Product = contract) -> jax.Array:
        """Returns the product, in the compute dtype unless float32_result.

        Args:
          x: the first operand.
          equation: another product of the same kernel, where there is no bias (absorbed projections).
          product: computes the equation, where it is not the plain one (rows of different experts).
        """
        operands, result = self.equation.split("->")
        letters = operands.split(",")[1]
        sizes = {**self.config.sizes, **dict(self.sizes)}
        inputs = [letter for letter in letters if letter not in result]
        fan_in = math.prod(sizes[letter] for letter in inputs)
        gaussian = self.config.initializer.matrix(fan_in, self.config.residual_layers if self.residual else 0)
        gaussian = dataclasses.replace(gaussian, stddev=gaussian.stddev * self.scale)
        equation = equation or self.equation
        kernel = self.get_variable("params", SUMMED_LAST)
        if kernel is not None:
            reordered = "".join(sorted(letters, key=lambda letter: letter in inputs))
            equation = equation.replace(f",{letters}->", f",{reordered}->")
        else:
            kernel = self.param(
                "kernel",
                declare(
                    tuple(sizes[letter] for letter in letters),
                    tuple(WEIGHT_AXES[letter] for letter in letters),
                    "matrix",
                    fan_in=fan_in,
                    distribution=gaussian,
                    input_axes=tuple(WEIGHT_AXES[letter] for letter in inputs),
                    active_share=self.active_share,
                ),
            )
        y = product(equation, x, kernel, self.config.compute_dtype)
        if self.use_bias:
            outputs = [letter for letter in letters if letter in result]
            shape = tuple(sizes[letter] for letter in outputs)
            # A bias as wide as the model is kept whole, as norms are.
            axes = tuple("norm" if letter in "DZ" else WEIGHT_AXES[letter] for letter in outputs)
            bias = self.param("bias", declare(shape, axes, "bias", distribution=Constant(0.0)))
            y = y + match_rank(bias.astype(jnp.float32), y.ndim)
        return y if self.float32_result else y.astype(self.config.compute_dtype)


class Table(nn.Module):
    """A learned table whose rows are looked up; also read backwards, as the output projection of tied embeddings.

    Attributes:
      letters: the table's axes, rows first, such as "VD".
      config: sizes, initialiser and compute dtype.
      sizes: (letter, size) pairs that differ from `config.sizes`.
    """

    letters: str
    config: "Transformer"
    sizes: tuple[tuple[str, int], ...] = ()

    def setup(self) -> None:
        """Declares the table."""
        sizes = {**self.config.sizes, **dict(self.sizes)}
        shape = tuple(sizes[letter] for letter in self.letters)
        axes = tuple(WEIGHT_AXES[letter] for letter in self.letters)
        self.embedding = self.param(
            "embedding", declare(shape, axes, "table", distribution=self.config.initializer.table())
        )

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Looks rows up: ids i32[B, T] give [B, T, D] in the compute dtype."""
        # The table is gathered along its width, as other parameters are. Left to itself, the compiler looks up all
        # rows of the batch everywhere, a slice of the width each, and cannot get from there to rows divided by device
        # but through whole activations on every device ("involuntary full rematerialization").
        vocabulary = "activation_vocab" if self.letters[0] == "V" else None
        table = constrain(self.embedding, vocabulary, None)
        if table.dtype != jnp.float32:
            # XLA:CPU reads a bfloat16 table as float32: a whole one, made before the loop over tokens, unless the table
            # hangs on what the loop looks up.
            table, ids = jax.lax.optimization_barrier((table, ids))
        rows_BTD = jnp.take(table, ids, axis=0).astype(self.config.compute_dtype)
        return constrain(rows_BTD, "batch", "length", "activation_embed")

    def attend(self, equation: str, x: jax.Array) -> jax.Array:
        """Returns the float32 product of `x` with the whole table, such as "BTD,VD->BTV"."""
        return contract(equation, x, self.embedding, self.config.compute_dtype)

    def whole(self) -> jax.Array:
        """Returns the table, f32."""
        return self.embedding


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerNorm:
    """Normalisation to mean zero and variance one (Ba et al. 2016).

    Attributes:
      epsilon: added to the variance.
      use_bias: whether a learned bias is added.
      use_scale: whether a learned scale multiplies.
    """

    epsilon: float = 1e-5
    use_bias: bool = True
    use_scale: bool = True

    zero_centered = False

    def normalize(self, x: jax.Array) -> jax.Array:
        """Normalises f32[..., D] over its last axis."""
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RMSNorm:
    """Division by the root mean square (Zhang and Sennrich 2019).

    Attributes:
      epsilon: added to the mean square.
      use_scale: whether a learned scale multiplies.
      zero_centered: whether the parameter is the scale minus one (Gemma).
    """

    epsilon: float = 1e-6
    use_scale: bool = True
    zero_centered: bool = False

    use_bias = False

    def normalize(self, x: jax.Array) -> jax.Array:
        """Normalises f32[..., D] over its last axis."""
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)


class Norm(nn.Module):
    """Applies a norm with its learned scale and bias, in float32.

    Attributes:
      norm: which one.
      dtype: dtype of the result.
      num_axes: how many trailing axes are normalised together (2 for all heads at once).
      axes: logical names of the parameter's axes.
    """

    norm: LayerNorm | RMSNorm
    dtype: Any
    axes: tuple[str, ...] = ("norm",)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises x[..., D] over its last len(axes) axes."""
        count = len(self.axes)
        features = x.shape[x.ndim - count :]
        # One axis of positions and one of features: with axes of size one beside them, XLA:CPU takes ten times as long
        # for the sums of products that are the gradient. Divided axes stay apart, since merging them would gather.
        kept = x.shape[: x.ndim - count] if is_divided() else (-1,)
        y = self.norm.normalize(x.astype(jnp.float32).reshape(*kept, math.prod(features)))
        y = y.reshape(*kept, *features)
        if self.norm.use_scale:
            initial = Constant(0.0 if self.norm.zero_centered else 1.0)
            scale = self.param("scale", declare(features, self.axes, "scale", distribution=initial))
            scale = scale.astype(jnp.float32) + (1.0 if self.norm.zero_centered else 0.0)
            y = y * match_rank(scale, y.ndim)
        if self.norm.use_bias:
            bias = self.param("bias", declare(features, self.axes, "bias", distribution=Constant(0.0)))
            y = y + match_rank(bias.astype(jnp.float32), y.ndim)
        return y.astype(self.dtype).reshape(x.shape)


def fold(key: jax.Array | None, purpose: int | jax.Array) -> jax.Array | None:
    """Derives the key, or array of keys, for a purpose; None (no randomness) stays None.

    Args:
      key: a key, or an array of them.
      purpose: a number for all keys, or one for each.
    """
    if key is None or not key.ndim:
        return None if key is None else jax.random.fold_in(key, purpose)
    purposes = jnp.broadcast_to(jnp.asarray(purpose), key.shape)
    return jax.vmap(jax.random.fold_in)(key.reshape(-1), purposes.reshape(-1)).reshape(key.shape)


def row_keys(key: jax.Array | None, rows: int) -> jax.Array | None:
    """Returns a key for each row of a batch, key[B], so that no row's randomness depends on which are with it."""
    return None if key is None else fold(jnp.broadcast_to(key, (rows,)), jnp.arange(rows))


def draw(
    key: jax.Array, shape: tuple[int, ...], sample: Callable[[jax.Array, tuple[int, ...]], jax.Array]
) -> jax.Array:
    """Draws an array of `shape`, the axes of `key` first: each key draws its part by `sample(key, shape of a part)`."""
    if not key.ndim:
        return sample(key, shape)
    return jax.vmap(lambda one: sample(one, shape[key.ndim :]))(key.reshape(-1)).reshape(shape)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes each element with probability `rate` and scales the rest by 1/(1-rate); the identity without a key.

    Args:
      x: of any shape.
      rate: in [0, 1).
      key: a key, or one for each index into the leading axes of `x`: for each row.
    """
    if key is None or rate == 0.0:
        return x
    keep = draw(key, x.shape, lambda one, shape: jax.random.bernoulli(one, 1.0 - rate, shape))
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """Bounds values smoothly to (-cap, cap) by cap * tanh(x / cap) (Gemma 2); None leaves them."""
    return x if cap is None else cap * jnp.tanh(x / cap)
