"""A stack of blocks: scanned over a repeating group of layers, or unrolled, with rematerialisation.

The only file that knows how layers are repeated. Parameters have one layout either way: runs of layers
`first`, `layers` and `last`, in each the blocks `block_0`, `block_1`, ... of one repeat, in each of these
every leaf with a leading axis of repeats (none where layers share weights). Law: scan, unrolled and
remat agree.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm.batch import WeightedSum
from lm.models.block import Block
from lm.models.multihead import Context

if TYPE_CHECKING:
    from lm.models.transformer import Layer, Transformer

Sums = dict[str, WeightedSum]

# What the backward pass may keep instead of computing it again; None keeps only the blocks' inputs.
REMAT_POLICIES: Mapping[str, Any] = {
    "full": None,
    "dots": jax.checkpoint_policies.checkpoint_dots,
    "dots_no_batch": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
}


def add_sums(totals: Sums, more: Sums) -> Sums:
    """Adds dictionaries of weighted sums key by key."""
    shared = totals.keys() & more.keys()
    return {**totals, **more, **{key: jax.tree.map(jnp.add, totals[key], more[key]) for key in shared}}


class Group(nn.Module):
    """The layers of one repeat of the pattern, in order.

    Attributes:
      config: the model's settings.
      layers: what each layer has of its own.
      causal: whether later positions are hidden.
      cross: whether the blocks read an encoder's result.
    """

    config: "Transformer"
    layers: tuple["Layer", ...]
    causal: bool
    cross: bool

    @nn.compact
    def __call__(self, x_BTD: jax.Array, each: tuple[jax.Array, Any], context: Context) -> tuple[Any, Any]:
        """Applies the blocks; `each` is (i32[], number of the first of them; their caches, by name, or None)."""
        first, caches = each
        losses: Sums = {}
        metrics: Sums = {}
        new_caches = {}
        for i, layer in enumerate(self.layers):
            name = f"block_{i}"
            block = Block(self.config, layer, self.causal, self.cross, name=name)
            cache = None if caches is None else caches[name]
            x_BTD, (new_caches[name], layer_losses, layer_metrics) = block(x_BTD, first + i, context, cache)
            losses, metrics = add_sums(losses, layer_losses), add_sums(metrics, layer_metrics)
        return x_BTD, (None if caches is None else new_caches, losses, metrics)


class Stack(nn.Module):
    """All layers of one tower.

    Attributes:
      config: the model's settings.
      num_layers: how many layers.
      causal: whether later positions are hidden.
      cross: whether the blocks read an encoder's result.
    """

    config: "Transformer"
    num_layers: int
    causal: bool
    cross: bool = False

    @nn.compact
    def __call__(self, x_BTD: jax.Array, context: Context, caches: Any) -> tuple[jax.Array, Any, Sums, Sums]:
        """Returns [B, T, D], the caches with this input written, and the layers' losses and metrics, summed."""
        config = self.config
        table = config.positions.bias_table(config, name="relative_bias")
        if table is not None:
            context = context._replace(bias_table_UN=table.whole())
        losses: Sums = {}
        metrics: Sums = {}
        new_caches = {}
        first = 0
        for name, layers, repeats in config.runs(self.num_layers):
            indices = first + len(layers) * jnp.arange(repeats, dtype=jnp.int32)
            group = self._repeated(repeats)(config, layers, self.causal, self.cross, name=name)
            cache = None if caches is None else caches[name]
            x_BTD, (new_caches[name], run_losses, run_metrics) = group(x_BTD, (indices, cache), context)
            losses = add_sums(losses, jax.tree.map(lambda x: x.sum(axis=0), run_losses))
            metrics = add_sums(metrics, jax.tree.map(lambda x: x.sum(axis=0), run_metrics))
            first += len(layers) * repeats
        return x_BTD, (None if caches is None else new_caches), losses, metrics

    def _repeated(self, repeats: int) -> Any:
        """Returns the module class of `repeats` groups one after the other."""
        group = Group
        if self.config.remat != "none":
            # Scan keeps XLA from merging the second computation with the first; unrolled, that is up to us.
            scanned = self.config.scan_layers and repeats > 1
            group = nn.remat(group, policy=REMAT_POLICIES[self.config.remat], prevent_cse=not scanned)
        shared = self.config.share_layers
        in_axes: Any = (0, nn.broadcast)  # Linen's annotation leaves out the tuples that its documentation describes.
        return nn.scan(
            group,
            # What layers count (see lm.models.model.Output.statistics) is stacked as their parameters are.
            variable_axes={"statistics": 0} if shared else {"params": 0, "statistics": 0},
            variable_broadcast="params" if shared else False,
            split_rngs={"params": not shared},
            in_axes=in_axes,
            length=repeats,
            # A loop of one trip would copy what it reads and writes; 0 makes no loop at all.
            unroll=0 if repeats == 1 else 1 if self.config.scan_layers else repeats,
            metadata_params={},
        )
