"""How parameters begin: distributions, and the schemes that choose one for each kind of weight.

Knows shapes and fan-in, no layer and no path. Law: what is drawn depends on the key and the shape only.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Draws from a normal distribution of mean zero.

    Attributes:
      stddev: standard deviation of what is drawn.
      truncated: whether draws beyond two (untruncated) standard deviations are redrawn.
    """

    stddev: float
    truncated: bool = False

    def sample(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Draws f32[shape]."""
        if self.truncated:
            # The standard deviation of a standard normal cut at +-2.
            return jax.random.truncated_normal(key, -2.0, 2.0, shape) * (self.stddev / 0.87962566103423978)
        return jax.random.normal(key, shape) * self.stddev


@dataclasses.dataclass(frozen=True)
class Constant:
    """Fills with one value.

    Attributes:
      value: the value.
    """

    value: float

    def sample(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Returns f32[shape]; the key is not used."""
        del key
        return jnp.full(shape, self.value, jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormalInitializer:
    """One standard deviation for every matrix and table (GPT-2, BERT, Llama).

    Attributes:
      stddev: standard deviation.
      residual_scaling: divide by sqrt(2 num_layers) where a branch is written to the residual stream
        (GPT-2, section 2.3).
    """

    stddev: float = 0.02
    residual_scaling: bool = True

    def matrix(self, fan_in: int, residual_layers: int) -> Gaussian:
        """Returns the distribution of a matrix; `residual_layers` is 0 unless it writes to the residual stream."""
        del fan_in
        scaled = self.residual_scaling and residual_layers
        return Gaussian(self.stddev / math.sqrt(2 * residual_layers) if scaled else self.stddev)

    def table(self) -> Gaussian:
        """Returns the distribution of an embedding table."""
        return Gaussian(self.stddev)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FanInInitializer:
    """Truncated normal of variance `scale / fan_in` for matrices, a constant deviation for tables (T5, PaLM).

    Attributes:
      scale: variance times fan-in.
      table_stddev: standard deviation of embedding tables.
      residual_scaling: divide by sqrt(2 num_layers) where a branch is written to the residual stream.
    """

    scale: float = 1.0
    table_stddev: float = 1.0
    residual_scaling: bool = False

    def matrix(self, fan_in: int, residual_layers: int) -> Gaussian:
        """Returns the distribution of a matrix; `residual_layers` is 0 unless it writes to the residual stream."""
        depth = 2 * residual_layers if self.residual_scaling and residual_layers else 1
        return Gaussian(math.sqrt(self.scale / fan_in / depth), truncated=True)

    def table(self) -> Gaussian:
        """Returns the distribution of an embedding table."""
        return Gaussian(self.table_stddev)
