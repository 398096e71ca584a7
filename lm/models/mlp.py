"""The feed-forward half of a block, dense: gated or not, with any of the usual activations.

Knows nothing of attention or stacks. What stands in a block's `mlp` slot (this, or a mixture of
experts) is a config whose `build` gives a module `(x[B, T, D], context) -> (y[B, T, D], tally)`, and
whose `summarize` turns tallies into losses and metrics, dicts of WeightedSum. A tally holds sums over
tokens (None here), so that those of the pieces of a batch add up to that of the batch.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm.batch import WeightedSum
from lm.models.layers import Einsum, dropout, fold
from lm.models.multihead import Context
from lm.parallel import constrain

if TYPE_CHECKING:
    from lm.models.transformer import Transformer

Activation = Literal["gelu", "gelu_tanh", "silu", "relu", "relu_squared", "tanh"]

ACTIVATIONS: dict[Activation, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),
}

MlpResult = tuple[jax.Array, Any]
Summary = tuple[dict[str, WeightedSum], dict[str, WeightedSum]]


@functools.partial(jax.checkpoint, static_argnums=0)
def _activated(name: Activation, up_BTF: jax.Array, gate_BTF: jax.Array | None = None) -> jax.Array:
    """Applies the activation, to the gate if there is one, in float32 with one rounding at the end.

    The backward pass keeps what comes in and none of the steps between.
    """
    activate, wide_BTF = ACTIVATIONS[name], up_BTF.astype(jnp.float32)
    hidden_BTF = activate(wide_BTF) if gate_BTF is None else activate(gate_BTF.astype(jnp.float32)) * wide_BTF
    return hidden_BTF.astype(up_BTF.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mlp:
    """Settings of the dense feed-forward layer.

    Attributes:
      activation: the nonlinearity; gelu is exact, gelu_tanh its approximation (GPT-2, Gemma).
      gated: whether the activation of one projection multiplies another (SwiGLU is silu, GeGLU gelu; Shazeer 2020).
      use_bias: whether the projections have biases.
      dim: hidden units; None means the model's mlp_dim.
      dropout_rate: probability that a hidden unit is dropped (T5).
    """

    activation: Activation = "silu"
    gated: bool = True
    use_bias: bool = False
    dim: int | None = None
    dropout_rate: float = 0.0

    def build(self, config: "Transformer", *, gain: float, name: str) -> nn.Module:
        """Returns the module, its initial weights multiplied by `gain`; called in a compact method."""
        return MlpLayer(self, config, gain, name=name)

    def summarize(self, tallies: None) -> Summary:
        """Returns no losses and no metrics."""
        del tallies
        return {}, {}

    def problems(self, config: "Transformer") -> list[str]:
        """Returns no problem: every combination works."""
        del config
        return []


class MlpLayer(nn.Module):
    """The dense feed-forward layer.

    Attributes:
      mlp: its settings.
      config: the model's settings.
      gain: multiplies the initial weights (DeepNorm).
    """

    mlp: Mlp
    config: "Transformer"
    gain: float = 1.0

    @nn.compact
    def __call__(self, x_BTD: jax.Array, context: Context) -> MlpResult:
        """Returns [B, T, D] and no tally."""
        mlp, config = self.mlp, self.config
        sizes = (("F", mlp.dim or config.mlp_dim),)
        up_BTF = Einsum("BTD,DF->BTF", config, mlp.use_bias, sizes=sizes, scale=self.gain, name="up")(x_BTD)
        if mlp.gated:
            gate = Einsum("BTD,DF->BTF", config, mlp.use_bias, sizes=sizes, scale=self.gain, name="gate")
            hidden_BTF = _activated(mlp.activation, up_BTF, gate(x_BTD))
        else:
            hidden_BTF = _activated(mlp.activation, up_BTF)
        hidden_BTF = constrain(hidden_BTF, "batch", "length", "activation_mlp")
        hidden_BTF = dropout(hidden_BTF, mlp.dropout_rate, fold(context.key, 0))
        down = Einsum("BTF,FD->BTD", config, mlp.use_bias, residual=True, sizes=sizes, scale=self.gain, name="down")
        return down(hidden_BTF), None
