"""The waist: a model as pure functions of plain pytrees. Nothing above this file knows Linen.

Owns `Model`, its `Output` and its cache. Knows no objective and no mesh. Laws: nothing is mutated;
`init` depends on the key and each parameter's path only; the cached and the uncached logits agree.
"""

import dataclasses
import functools
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm.batch import Batch, WeightedSum
from lm.models.attention import Side
from lm.models.context_parallel import is_undivided
from lm.models.heads import label_sums
from lm.models.layers import Parameter, row_keys
from lm.models.multihead import Context
from lm.models.network import Inputs, Network, encoder_inputs, main_inputs
from lm.models.stack import add_sums
from lm.models.transformer import Transformer
from lm.parallel import shapes_only

Parameters = dict[str, Any]
Cache = dict[str, Any]


class Output(NamedTuple):
    """What a model says of a batch.

    Attributes:
      hidden: [B, T, D] in the compute dtype, what `Model.logits` turns into logits.
      logits: f32[B, T, V], or None if they were not wanted or the model has no head that makes them.
      losses: the model's own losses (of routers, of labels), times their coefficients; each is to be divided by its
        weight and added to the objective's.
      metrics: what is worth logging.
      cache: the cache with this batch appended, or None.
      statistics: what layers counted for `Model.after_update`, at the paths of the parameters that it is for; None or
        empty for most models. Those of microbatches are to be added.
    """

    hidden: jax.Array
    logits: jax.Array | None
    losses: dict[str, WeightedSum]
    metrics: dict[str, WeightedSum]
    cache: Cache | None
    statistics: Parameters | None = None


def path_name(path: tuple[Any, ...]) -> str:
    """Returns a key path of the parameter tree as "decoder/stack/layers/...": the name of a parameter."""
    return "/".join(str(entry.key) for entry in path)


def _flat(parameters: Any) -> list[tuple[tuple[Any, ...], Parameter]]:
    return jax.tree_util.tree_leaves_with_path(parameters, is_leaf=lambda leaf: isinstance(leaf, Parameter))


@functools.lru_cache(maxsize=64)
def _describe(config: Transformer) -> Any:
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    flags = jax.ShapeDtypeStruct((1, 1), jnp.bool_)
    batch = Batch(tokens, tokens, tokens, tokens, tokens, flags, token_types=tokens, block_positions=tokens)
    with shapes_only():
        key = jax.eval_shape(lambda: jax.random.key(0))
        initialize = functools.partial(Network(config).init, method=Network.declare_all)
        return jax.eval_shape(initialize, key, batch)["params"]


@dataclasses.dataclass(frozen=True)
class Model:
    """A model: pure functions, given by its settings.

    Attributes:
      config: the settings.
    """

    config: Transformer

    def parameters(self) -> Any:
        """Returns the parameter tree with a `Parameter` (shape, axes, role, fan-in, ...) at each leaf."""
        return _describe(self.config)

    def axes(self) -> Any:
        """Returns the parameter tree with a tuple of logical axis names at each leaf."""
        return self._map(lambda path, parameter: parameter.axes)

    def init(self, key: jax.Array) -> Parameters:
        """Draws the parameters, a nested dict of float32 arrays; each depends on the key and its path only."""

        def sample(path: tuple[Any, ...], parameter: Parameter) -> jax.Array:
            leaf_key = jax.random.fold_in(key, zlib.crc32(path_name(path).encode()))
            return parameter.distribution.sample(leaf_key, parameter.shape)

        return self._map(sample)

    def _map(self, function: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            function, self.parameters(), is_leaf=lambda leaf: isinstance(leaf, Parameter)
        )

    def apply(
        self,
        params: Parameters,
        batch: Batch,
        *,
        key: jax.Array | None = None,
        cache: Cache | None = None,
        empty: bool = False,
        with_logits: bool = True,
    ) -> Output:
        """Runs the model.

        Args:
          params: as from `init`.
          batch: what to read. With a cache, its T positions are appended to those that the cache holds; padding may
            stand anywhere and is told by segment id 0, while `positions` go on within each row.
          key: PRNG key for dropout; None is deterministic.
          cache: as from `init_cache`. More positions than it has room for must not be appended.
          empty: whether nothing is in the cache yet, which its arrays cannot tell: then the input is all there is to
            read, and is read by the kernel of training, where one device can run it. That kernel may not let
            positions see ahead (`bidirectional`): leave this out for such prompts.
          with_logits: whether logits are wanted; `logits` computes them from `hidden` in chunks otherwise.

        Raises:
          RuntimeError: outside `lm.parallel.use(mesh, rules)`.
        """
        inputs = main_inputs(batch)
        side = inputs.side
        key = row_keys(key, batch.inputs.shape[0])
        context = Context(side, side, key=key)
        losses: dict[str, WeightedSum] = {}
        metrics: dict[str, WeightedSum] = {}
        encoder_statistics: Parameters = {}
        if cache is not None:
            cache = _append(cache, side)
            context = _cached_context(cache, side, key)
            if empty and is_undivided(self.config.attention.kernel):
                context = context._replace(queries=side, keys=side, index=None)
        elif self._reads_encoder:
            read = encoder_inputs(batch)
            encoded, encoder_statistics = self._count(params, read, key, method=Network.encode)
            memory_BSD, losses, metrics = encoded
            context = context._replace(memory_BSD=memory_BSD, memory=read.side)
        layers = None if cache is None else cache["layers"]
        result, statistics = self._count(params, inputs, context, layers)
        hidden_BTD, layers, more_losses, more_metrics = result
        losses, metrics = add_sums(losses, more_losses), add_sums(metrics, more_metrics)
        if self.config.num_classes and batch.label_targets is not None:
            losses["labels"], metrics["label_accuracy"] = label_sums(self.class_logits(params, hidden_BTD), batch)
        if cache is not None:
            cache = {**cache, "layers": layers, "index": cache["index"] + batch.inputs.shape[1]}
        with_logits = with_logits and self.config.predicts_tokens
        logits_BTV = self.logits(params, hidden_BTD) if with_logits else None
        return Output(hidden_BTD, logits_BTV, losses, metrics, cache, {**encoder_statistics, **statistics})

    def loss_weights(self, batch: Batch) -> dict[str, jax.Array]:
        """Returns the weights f32[] of those of `Output.losses` whose weight the batch decides, over all of `batch`.

        With them microbatches add up to the loss of the one batch. Routers' losses are not linear in the batch.
        """
        if not self.config.num_classes or batch.label_weights is None:
            return {}
        return {"labels": jnp.sum(batch.label_weights)}

    def after_update(self, old: Parameters, new: Parameters, statistics: Parameters | None) -> Parameters:
        """Sets the parameters that no gradient moves, by the rules of their descriptions.

        Args:
          old: the parameters before the step.
          new: the same after the optimizer; what it did to parameters that have a rule is dropped.
          statistics: `Output.statistics`, added over the whole batch.

        Returns:
          `new` with those parameters following from `old` and `statistics`; `new` itself for most models.
        """
        rules = {path_name(path): leaf.rule for path, leaf in _flat(self.parameters()) if leaf.rule is not None}
        if not rules:
            return new
        counted = {path_name(path): statistic for path, statistic in jax.tree_util.tree_leaves_with_path(statistics)}

        def choose(path: tuple[Any, ...], before: jax.Array, after: jax.Array) -> jax.Array:
            name = path_name(path)
            return rules[name].update(before, counted[name]) if name in rules else after

        return jax.tree_util.tree_map_with_path(choose, old, new)

    def logits(self, params: Parameters, hidden: jax.Array) -> jax.Array:
        """Returns f32[B, T, V] for hidden states [B, T, D], soft-cap included; any chunk of positions will do."""
        return self._call(params, hidden, method=Network.logits)

    def class_logits(self, params: Parameters, hidden: jax.Array) -> jax.Array:
        """Returns f32[B, T, num_classes] for hidden states [B, T, D]; of use where an example's first token stands."""
        return self._call(params, hidden, method=Network.class_logits)

    def init_cache(self, params: Parameters, batch_size: int, length: int, batch: Batch | None = None) -> Cache:
        """Makes an empty cache, a plain pytree.

        Args:
          params: as from `init`.
          batch_size: number of rows.
          length: number of slots S; all positions that will ever be appended, padding included.
          batch: the encoder's fields of it are read, once, if the model has an encoder; else it may be None.

        Returns:
          `index` i32[], `segment_ids`, `positions` and `bidirectional` [B, S]; and `layers`, with leaves
          [repeats, B, ...], or [B, ...] in a run that is not repeated. `select_rows` picks rows of it.
        """
        config = self.config
        if not config.decoder_depth:
            raise ValueError("init_cache: an encoder has nothing to cache, since every position sees every other")
        layers = {
            name: {
                f"block_{i}": jax.tree.map(
                    lambda x, repeats=repeats: jnp.broadcast_to(x, (repeats, *x.shape) if repeats > 1 else x.shape),
                    config.attention.init_cache(config, batch_size, length),
                )
                for i in range(len(group))
            }
            for name, group, repeats in config.runs(config.decoder_depth)
        }
        empty = jnp.zeros((batch_size, length), jnp.int32)
        cache = {
            "index": jnp.zeros((), jnp.int32),
            "segment_ids": empty,
            "positions": empty,
            "bidirectional": jnp.zeros((batch_size, length), jnp.bool_),
            "layers": layers,
        }
        if not self._reads_encoder:
            return cache
        if batch is None:
            raise ValueError("init_cache of an encoder-decoder needs a batch with encoder_inputs")
        return self._read_encoder(params, cache, batch)

    def _read_encoder(self, params: Parameters, cache: Cache, batch: Batch) -> Cache:
        """Runs the encoder and keeps each layer's keys and values of its result.

        The decoder is run once on a padding token, which nothing will read and the first token will overwrite.
        """
        read = encoder_inputs(batch)
        memory = read.side
        memory_BSD, _, _ = self._call(params, read, None, method=Network.encode)
        nothing = jnp.zeros((memory_BSD.shape[0], 1), jnp.int32)
        side = Side(nothing, nothing, nothing.astype(jnp.bool_), jnp.zeros((1,), jnp.int32))
        cache = {**cache, "memory_segment_ids": memory.segment_ids, "memory_positions": memory.positions}
        context = _cached_context(cache, side, None)._replace(memory_BSD=memory_BSD)
        _, layers, _, _ = self._call(params, Inputs(nothing, side), context, cache["layers"])
        return {**cache, "layers": layers}

    def select_rows(self, cache: Cache, rows: jax.Array) -> Cache:
        """Returns the cache with rows i32[B'] of it, for beam search or to repeat prompts."""
        layers = {
            name: jax.tree.map(lambda x, axis=int(repeats > 1): jnp.take(x, rows, axis=axis), cache["layers"][name])
            for name, _, repeats in self.config.runs(self.config.decoder_depth)
        }
        shared = {name: jnp.take(x, rows, axis=0) for name, x in cache.items() if name not in ("index", "layers")}
        return {**shared, "index": cache["index"], "layers": layers}

    @property
    def _reads_encoder(self) -> bool:
        return self.config.encoder_depth > 0 and self.config.decoder_depth > 0

    def _count(self, params: Parameters, *arguments: Any, method: Any = None) -> tuple[Any, Parameters]:
        """Calls the network and returns its result and the statistics of its layers."""
        network = Network(self.config)
        called: Any = network.apply({"params": params}, *arguments, method=method, mutable=["statistics"])
        result, state = called
        return result, dict(state.get("statistics", {}))

    def _call(self, params: Parameters, *arguments: Any, method: Any = None) -> Any:
        return Network(self.config).apply({"params": params}, *arguments, method=method)


def _append(cache: Cache, side: Side) -> Cache:
    """Writes where the new positions stand at the cache's index."""
    start = (0, cache["index"])

    def write(name: str, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(cache[name], new.astype(cache[name].dtype), start)

    return {
        **cache,
        "segment_ids": write("segment_ids", side.segment_ids),
        "positions": write("positions", side.positions),
        "bidirectional": write("bidirectional", side.bidirectional),
    }


def _cached_context(cache: Cache, side: Side, key: jax.Array | None) -> Context:
    """Returns the context in which queries at `side` read everything in the cache."""
    index = cache["index"]
    slots = jnp.arange(cache["segment_ids"].shape[1], dtype=jnp.int32)
    keys = Side(cache["segment_ids"], cache["positions"], cache["bidirectional"], slots)
    memory = None
    if "memory_segment_ids" in cache:
        segment_ids = cache["memory_segment_ids"]
        memory_slots = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
        memory = Side(segment_ids, cache["memory_positions"], jnp.ones(segment_ids.shape, jnp.bool_), memory_slots)
    return Context(side._replace(slots=index + side.slots), keys, index=index, memory=memory, key=key)
