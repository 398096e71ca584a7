"""A stack of blocks: a repeating group of layers, scanned, unrolled, or a pipeline, with rematerialisation.

The only file that knows how layers are repeated. Parameters have one layout either way: runs of layers
`first`, `layers` and `last`, in each the blocks `block_0`, `block_1`, ... of one repeat, in each of these
every leaf with a leading axis of repeats (none where layers share weights). Law: scan, unrolled and
remat and pipeline agree.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm import parallel
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


def _split(context: Context) -> tuple[Any, tuple]:
    """Returns the part of a context that each row of the batch has its own of, and the part that all share."""
    sides = (context.queries, context.keys, context.memory)
    rows: Any = context._replace(bias_table_UN=None)
    for field, side in zip(("queries", "keys", "memory"), sides, strict=True):
        rows = rows._replace(**{field: side and side._replace(slots=None)})
    return rows, (context.bias_table_UN, *(side and side.slots for side in sides))


def _join(rows: Any, shared: tuple) -> Context:
    """Undoes `_split`."""
    table_UN, *slots = shared
    for field, places in zip(("queries", "keys", "memory"), slots, strict=True):
        side = getattr(rows, field)
        rows = rows._replace(**{field: side and side._replace(slots=places)})
    return rows._replace(bias_table_UN=table_UN)


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
    def __call__(
        self, x_BTD: jax.Array, each: tuple[jax.Array, Any], context: Context, single: Any = None
    ) -> tuple[jax.Array, Any]:
        """Applies the blocks; returns [B, T, D], their caches with the input written, or None, and their tallies.

        Args:
          x_BTD: their input.
          each: i32[], number of the first of them; their caches, by name, a slice of those of all repeats, or None.
          context: what every layer is told.
          single: their caches, where there are no other repeats.
        """
        first, slices = each
        caches = slices if single is None else single
        tallies = {}
        new_caches = {}
        for i, layer in enumerate(self.layers):
            name = f"block_{i}"
            block = Block(self.config, layer, self.causal, self.cross, name=name)
            cache = None if caches is None else caches[name]
            x_BTD, (new_caches[name], tallies[name]) = block(x_BTD, first + i, context, cache)
        return x_BTD, (None if caches is None else new_caches, tallies)


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
            if caches is None and repeats > 1 and not config.share_layers and parallel.num_pieces(len(x_BTD)):
                x_BTD, tallies = self._pipelined(name, layers, indices, x_BTD, context)
            else:
                group = self._repeated(repeats)(config, layers, self.causal, self.cross, name=name)
                cache = None if caches is None else caches[name]
                if cache is not None and repeats == 1:
                    # Not as a stack of one: XLA:CPU would write a cache with and without that axis, and copy both.
                    x_BTD, (stacked, tallies) = group(x_BTD, (indices, None), context, cache)
                    new_caches[name] = jax.tree.map(lambda x: jnp.squeeze(x, 0), stacked)
                else:
                    x_BTD, (new_caches[name], tallies) = group(x_BTD, (indices, cache), context, None)
            for number, layer in enumerate(layers):
                found = (layer.mlp or config.mlp).summarize(tallies[f"block_{number}"])
                losses, metrics = add_sums(losses, found[0]), add_sums(metrics, found[1])
            first += len(layers) * repeats
        return x_BTD, (None if caches is None else new_caches), losses, metrics

    def _group(self, repeats: int) -> Any:
        """Returns the module class of one of `repeats` groups, computed again in the backward pass if wanted."""
        if self.config.remat == "none":
            return Group
        # Scan keeps XLA from merging the second computation with the first; unrolled, that is up to us.
        scanned = self.config.scan_layers and repeats > 1
        return nn.remat(Group, policy=REMAT_POLICIES[self.config.remat], prevent_cse=not scanned)

    def _pipelined(
        self, name: str, layers: tuple["Layer", ...], indices: jax.Array, x_BTD: jax.Array, context: Context
    ) -> tuple[jax.Array, Any]:
        """Returns [B, T, D] and the tallies of a run of groups that is divided over the stages of the mesh."""
        group = self._group(len(indices))(self.config, layers, self.causal, self.cross, parent=None)
        rows, shared = _split(context)

        def apply(weights: Any, x_BTD: jax.Array, rows: Context, shared: tuple) -> tuple[jax.Array, Any]:
            context = _join(rows, shared)

            def body(x_BTD: jax.Array, one: tuple[Any, jax.Array]) -> tuple[jax.Array, Any]:
                params, index = one
                called: Any = group.apply({"params": params}, x_BTD, (index, None), context, mutable=["statistics"])
                (x_BTD, (_, tallies)), counted = called
                return x_BTD, (tallies, dict(counted.get("statistics", {})))

            return jax.lax.scan(body, x_BTD, weights, unroll=1 if self.config.scan_layers else len(weights[1]))

        weights = (self.get_variable("params", name), indices)
        x_BTD, (tallies, statistics) = parallel.run_pipeline(apply, weights, x_BTD, rows, shared)
        if statistics:
            self.put_variable("statistics", name, statistics)
        return x_BTD, tallies

    def _repeated(self, repeats: int) -> Any:
        """Returns the module class of `repeats` groups one after the other."""
        group = self._group(repeats)
        shared = self.config.share_layers
        # Linen's annotation leaves out the tuples that its documentation describes.
        in_axes: Any = (0, nn.broadcast, nn.broadcast)
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
