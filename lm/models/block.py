"""One transformer block, written once: every architecture is a choice of its fields.

Owns the residual stream, the placement of norms and dropout of branches. Knows neither how many
blocks there are nor what attention or the feed-forward layer do inside. Law: what is random depends
on (key, layer, purpose) only.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
from flax import linen as nn

from lm.models.layers import Norm, dropout, fold
from lm.models.multihead import Cache, Context
from lm.models.products import stored
from lm.parallel import constrain

if TYPE_CHECKING:
    from lm.models.transformer import Layer, Transformer

# What randomness is for; folded into the layer's key.
ATTENTION, CROSS, MLP = 1, 2, 3
BRANCH_DROPOUT = 100


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where norms stand around a branch f.

    Attributes:
      before: f(norm(x)).
      after_branch: x + norm(f(x)).
      after_sum: norm(x + f(x)).
    """

    before: bool = False
    after_branch: bool = False
    after_sum: bool = False


PLACEMENTS = {
    "pre": Placement(before=True),
    "post": Placement(after_sum=True),
    "sandwich": Placement(before=True, after_branch=True),
    "branch": Placement(after_branch=True),
    "deep": Placement(after_sum=True),
}


class Block(nn.Module):
    """Self-attention, cross attention where there is an encoder, and a feed-forward layer, around a residual stream.

    Attributes:
      config: the model's settings.
      layer: what this layer has of its own.
      causal: whether later positions are hidden.
      cross: whether the block reads an encoder's result.
    """

    config: "Transformer"
    layer: "Layer"
    causal: bool
    cross: bool = False

    @nn.compact
    def __call__(self, x_BTD: jax.Array, index: jax.Array, context: Context, cache: Cache) -> tuple[Any, Any]:
        """Applies the block.

        Args:
          x_BTD: the residual stream.
          index: i32[], number of this layer in its stack, for its randomness.
          context: what all layers are told.
          cache: this layer's keys and values, or None.

        Returns:
          [B, T, D], and (cache, the tally of the feed-forward layer).
        """
        context = context._replace(key=fold(context.key, index))
        attend = functools.partial(self._attend, "attention", ATTENTION, context, cache)
        feed_forward = functools.partial(self._feed_forward, context)
        if self.config.parallel_block:

            def both(x_BTD: jax.Array) -> tuple[jax.Array, Any]:
                attended_BTD, new_cache = attend(x_BTD)
                y_BTD, tally = feed_forward(x_BTD)
                return attended_BTD + y_BTD, (new_cache, tally)

            return self._branch(x_BTD, "attention", ATTENTION, context, both)
        x_BTD, cache = self._branch(x_BTD, "attention", ATTENTION, context, attend)
        if self.cross:
            attend = functools.partial(self._attend, "cross", CROSS, context, cache)
            x_BTD, cache = self._branch(x_BTD, "cross", CROSS, context, attend)
        x_BTD, tally = self._branch(x_BTD, "mlp", MLP, context, feed_forward)
        return x_BTD, (cache, tally)

    def _attend(
        self, name: str, purpose: int, context: Context, cache: Cache, x_BTD: jax.Array
    ) -> tuple[jax.Array, Cache]:
        config, gain = self.config, self.config.deep_norm(self.causal)[1]
        cross = purpose == CROSS
        module = config.attention.build(config, self.layer, causal=self.causal, cross=cross, gain=gain, name=name)
        return module(x_BTD, context._replace(key=fold(context.key, purpose)), cache)

    def _feed_forward(self, context: Context, x_BTD: jax.Array) -> tuple[jax.Array, Any]:
        gain = self.config.deep_norm(self.causal)[1]
        module = (self.layer.mlp or self.config.mlp).build(self.config, gain=gain, name="mlp")
        return module(x_BTD, context._replace(key=fold(context.key, MLP)))

    def _branch(
        self, x_BTD: jax.Array, name: str, purpose: int, context: Context, branch: Callable[..., tuple[jax.Array, Any]]
    ) -> tuple[jax.Array, Any]:
        """Adds a branch to the residual stream, with norms where the placement says; passes the rest through."""
        config, placement = self.config, PLACEMENTS[self.config.norm_placement]
        y_BTD = self._norm(f"{name}_norm", x_BTD) if self._is_normalized(name) else x_BTD
        y_BTD, rest = branch(y_BTD)
        if placement.after_branch:
            y_BTD = self._norm(f"{name}_output_norm", y_BTD)
        y_BTD = dropout(y_BTD, config.dropout_rate, fold(context.key, BRANCH_DROPOUT + purpose))
        x_BTD = x_BTD * config.deep_norm(self.causal)[0] + y_BTD
        if placement.after_sum:
            x_BTD = stored(self._norm(f"{name}_norm", x_BTD))
        return constrain(x_BTD, "batch", "residual_length", "activation_embed"), rest

    def _is_normalized(self, name: str) -> bool:
        """Returns whether a branch has a norm before it."""
        before = PLACEMENTS[self.config.norm_placement].before
        return before and (name != "attention" or self.layer.normalize_attention)

    def _norm(self, name: str, x_BTD: jax.Array) -> jax.Array:
        return Norm(self.config.norm, self.config.compute_dtype, name=name)(x_BTD)
