"""Attention: from a layout (data) to a mask, and the kernels that compute it anywhere.

`Layout.allowed` is the only place in the house that turns segment ids, positions, bidirectional flags
and a window into a mask; kernels are interchangeable and take the same arguments. Knows no
parameters and no mesh. Laws: a query of segment 0 reads nothing and gives zeros, never NaN; equal
layouts give equal results in every kernel.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from lm.models.layers import dropout, soft_cap
from lm.models.products import contract
from lm.models.softmax import MASKED, masked_attention
from lm.parallel import vary_like


class Side(NamedTuple):
    """The queries' or the keys' side of a layout.

    Attributes:
      segment_ids: i32[B, T], 0 where there is nothing.
      positions: i32[B, T].
      bidirectional: bool[B, T].
      slots: i32[T], order in time: the index into the row, or into the cache.
    """

    segment_ids: jax.Array
    positions: jax.Array
    bidirectional: jax.Array
    slots: jax.Array


@functools.partial(jax.tree_util.register_dataclass, data_fields=("queries", "keys"), meta_fields=("causal", "window"))
@dataclasses.dataclass(frozen=True)
class Layout:
    """Who may read whom; a pytree of its two sides.

    Attributes:
      queries: the side that reads.
      keys: the side that is read.
      causal: whether keys later in time are hidden, unless both are bidirectional. Encoders and cross
        attention are not causal.
      window: causal: keys at a distance of `window` or more are hidden (Mistral); otherwise at a distance of more than
        window // 2 to either side (ModernBERT). None hides nothing.
    """

    queries: Side
    keys: Side
    causal: bool
    window: int | None = None

    def allowed(self) -> jax.Array:
        """Returns bool[B, T, S]: equal non-zero segments, and not later in time unless both bidirectional."""
        queries, keys = self.queries, self.keys
        queries_BT1, keys_B1S = queries.segment_ids[:, :, None], keys.segment_ids[:, None, :]
        same_BTS = (queries_BT1 == keys_B1S) & (queries_BT1 != 0)
        distance_BTS = queries.positions[:, :, None] - keys.positions[:, None, :]
        if not self.causal:
            return same_BTS if self.window is None else same_BTS & (jnp.abs(distance_BTS) <= self.window // 2)
        past_BTS = (keys.slots[None, :] <= queries.slots[:, None])[None]
        if self.window is not None:
            past_BTS = past_BTS & (distance_BTS < self.window)
        return same_BTS & (past_BTS | (queries.bidirectional[:, :, None] & keys.bidirectional[:, None, :]))


@functools.partial(jax.tree_util.register_dataclass, data_fields=("table_UN",), meta_fields=("values", "causal"))
@dataclasses.dataclass(frozen=True)
class Bias:
    """What is added to the scores by positions alone (ALiBi, T5); a pytree of its table.

    Attributes:
      table_UN: f32[U, N], a column for each head.
      values: maps (table, i32[B, T] and i32[B, S] positions, causal) to f32[B, N, T, S], each head by its own column.
      causal: passed on to `values`.
    """

    table_UN: jax.Array
    values: Callable[[jax.Array, jax.Array, jax.Array, bool], jax.Array]
    causal: bool

    def of(self, layout: Layout) -> jax.Array:
        """Returns f32[B, N, T, S] for the positions of the layout's two sides."""
        return self.values(self.table_UN, layout.queries.positions, layout.keys.positions, self.causal)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("keys_UH", "values_UH"), meta_fields=("rows",))
@dataclasses.dataclass(frozen=True)
class RelativeVectors:
    """Vectors of relative positions that are added to keys and values (Shaw et al. 2018); a pytree of its tables.

    Attributes:
      keys_UH, values_UH: f32[U, H].
      rows: maps i32 distances (key position minus query position) to rows of the tables.
    """

    keys_UH: jax.Array
    values_UH: jax.Array
    rows: Callable[[jax.Array], jax.Array]

    def _rows(self, layout: "Layout") -> jax.Array:
        return self.rows(layout.keys.positions[:, None, :] - layout.queries.positions[:, :, None])

    def scores(self, q_BTKGH: jax.Array, layout: "Layout") -> jax.Array:
        """Returns f32[B, K, G, T, S], products of queries with the vectors of their distances to the keys."""
        products_BKGTU = contract("BTKGH,UH->BKGTU", q_BTKGH, self.keys_UH, q_BTKGH.dtype)
        return jnp.take_along_axis(products_BKGTU, self._rows(layout)[:, None, None, :, :], axis=-1)

    def read(self, weights_BKGTS: jax.Array, layout: "Layout", dtype: jnp.dtype) -> jax.Array:
        """Returns f32[B, K, G, T, H], the weighted sum of the vectors of the distances."""
        rows_BTSU = jax.nn.one_hot(self._rows(layout), self.values_UH.shape[0], dtype=jnp.float32)
        by_distance_BKGTU = contract("BKGTS,BTSU->BKGTU", weights_BKGTS, rows_BTSU, jnp.dtype(jnp.float32))
        return contract("BKGTU,UH->BKGTH", by_distance_BKGTU, self.values_UH, dtype)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("bias", "sinks_N", "relative", "key"),
    meta_fields=("scale", "soft_cap", "dropout_rate"),
)
@dataclasses.dataclass(frozen=True)
class Scoring:
    """How scores are made from products of queries and keys; a pytree of what is learned or drawn.

    Attributes:
      scale: factor on the products.
      soft_cap: bound on the scaled products (Gemma 2), or None.
      bias: added to the capped products, or None.
      sinks_N: f32[N], a score that takes part in each softmax and reads nothing (gpt-oss), or None.
      relative: vectors added to keys and values by distance, or None.
      dropout_rate: probability that a weight is dropped.
      key: PRNG key of that dropout, or None.
    """

    scale: float
    soft_cap: float | None = None
    bias: Bias | None = None
    sinks_N: jax.Array | None = None
    relative: RelativeVectors | None = None
    dropout_rate: float = 0.0
    key: jax.Array | None = None

    def is_plain(self) -> bool:
        """Whether scores are only scaled, and weights only normalised."""
        extra = (self.soft_cap, self.sinks_N, self.relative, self.bias)
        return all(x is None for x in extra) and (self.key is None or not self.dropout_rate)

    def scores(self, q_BTKGH: jax.Array, k_BSKH: jax.Array, layout: Layout) -> tuple[jax.Array, jax.Array]:
        """Returns f32[B, K, G, T, S] scores with MASKED where hidden, and bool[B, 1, 1, T, S] where allowed."""
        scores_BKGTS = contract("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, q_BTKGH.dtype)
        if self.relative is not None:
            scores_BKGTS = scores_BKGTS + self.relative.scores(q_BTKGH, layout)
        scores_BKGTS = soft_cap(scores_BKGTS * self.scale, self.soft_cap)
        if self.bias is not None:
            bias_BNTS = self.bias.of(layout)
            heads = q_BTKGH.shape[2:4]
            scores_BKGTS = scores_BKGTS + bias_BNTS.reshape(bias_BNTS.shape[0], *heads, *bias_BNTS.shape[2:])
        allowed = layout.allowed()[:, None, None, :, :]
        return jnp.where(allowed, scores_BKGTS, MASKED), allowed

    def read(self, weights_BKGTS: jax.Array, v_BSKH: jax.Array, layout: Layout, dtype: jnp.dtype) -> jax.Array:
        """Returns f32[B, K, G, T, H], the weighted sum of the values."""
        out_BKGTH = contract("BKGTS,BSKH->BKGTH", weights_BKGTS, v_BSKH, dtype)
        if self.relative is None:
            return out_BKGTH
        return out_BKGTH + self.relative.read(weights_BKGTS, layout, dtype)

    def sinks_as(self, q_BTKGH: jax.Array) -> jax.Array:
        """Returns the sinks as f32[1, K, G, 1], or MASKED where there are none."""
        shape = (1, *q_BTKGH.shape[2:4], 1)
        return jnp.full(shape, MASKED) if self.sinks_N is None else self.sinks_N.astype(jnp.float32).reshape(shape)


class Features(NamedTuple):
    """What a kernel is asked to compute besides masked attention, to see whether it can.

    Attributes:
      dropout_rate: probability that a weight is dropped.
      soft_cap: whether products are bounded.
      sinks: whether a score reads nothing.
      biased: whether positions enter the scores.
      window: whether far keys are hidden.
      dtype: of the arrays.
      key_width, value_width: channels of a head's queries and keys, and of its values.
      old_gpu: whether the devices are GPUs before Hopper, as far as is known.
    """

    dropout_rate: float
    soft_cap: bool
    sinks: bool
    biased: bool
    window: bool
    dtype: str
    key_width: int
    value_width: int
    old_gpu: bool = False


def group(q_BTNH: jax.Array, num_kv_heads: int) -> jax.Array:
    """Returns [B, T, K, G, H], the heads by the key head that they read."""
    batch, length, heads, width = q_BTNH.shape
    return q_BTNH.reshape(batch, length, num_kv_heads, heads // num_kv_heads, width)


def ungroup(out_BKGTH: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns [B, T, N, H], the heads of all groups in order."""
    batch, kv_heads, groups, length, width = out_BKGTH.shape
    out_BTKGH = jnp.transpose(out_BKGTH, (0, 3, 1, 2, 4))
    return out_BTKGH.reshape(batch, length, kv_heads * groups, width).astype(dtype)


class Partial(NamedTuple):
    """A softmax over the keys read so far, all in float32 (Milakov and Gimelshein 2018).

    Attributes:
      best_BKGT: the largest score.
      total_BKGT: sum of the exponentials of scores minus the largest.
      out_BKGTH: sum of the values times those exponentials.
    """

    best_BKGT: jax.Array
    total_BKGT: jax.Array
    out_BKGTH: jax.Array

    @classmethod
    def start(cls, q_BTKGH: jax.Array, width: int, scoring: Scoring) -> "Partial":
        """Returns the softmax over the sinks alone, for values of `width` channels."""
        batch, length, kv_heads, groups, _ = q_BTKGH.shape
        sinks_BKGT = jnp.broadcast_to(scoring.sinks_as(q_BTKGH), (batch, kv_heads, groups, length))
        best_BKGT = jax.lax.stop_gradient(sinks_BKGT)
        total_BKGT = jnp.where(sinks_BKGT > MASKED, jnp.exp(sinks_BKGT - best_BKGT), 0.0)
        out_BKGTH = jnp.zeros((batch, kv_heads, groups, length, width), jnp.float32)
        return cls(*(vary_like(x, q_BTKGH) for x in (best_BKGT, total_BKGT, out_BKGTH)))

    def add(
        self, q_BTKGH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, layout: Layout, scoring: Scoring
    ) -> "Partial":
        """Returns the softmax over the keys read so far and these."""
        scores_BKGTS, allowed = scoring.scores(q_BTKGH, k_BSKH, layout)
        # Any number does for the largest: it cancels. Its own gradient would compare scores that the backward pass
        # computes again, perhaps rounded differently, with their maximum, and divide by zero where none is equal.
        best_BKGT = jnp.maximum(self.best_BKGT, jax.lax.stop_gradient(scores_BKGTS).max(axis=-1))
        shrink_BKGT = jnp.exp(self.best_BKGT - best_BKGT)
        weights_BKGTS = jnp.where(allowed, jnp.exp(scores_BKGTS - best_BKGT[..., None]), 0.0)
        total_BKGT = self.total_BKGT * shrink_BKGT + weights_BKGTS.sum(axis=-1)
        read_BKGTH = scoring.read(weights_BKGTS, v_BSKH, layout, q_BTKGH.dtype)
        return Partial(best_BKGT, total_BKGT, self.out_BKGTH * shrink_BKGT[..., None] + read_BKGTH)

    def normalizer(self) -> jax.Array:
        """Returns f32[B, K, G, T], the logarithm of the sum of the exponentials; of what read nothing, the largest."""
        return self.best_BKGT + jnp.log(jnp.where(self.total_BKGT > 0, self.total_BKGT, 1.0))

    def finish(self, dtype: jnp.dtype) -> jax.Array:
        """Returns [B, T, N, H], what was read."""
        # A row that read nothing divides zero by one, so that its gradient is zero and not NaN.
        return ungroup(self.out_BKGTH / jnp.where(self.total_BKGT > 0, self.total_BKGT, 1.0)[..., None], dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plain:
    """All scores at once; memory grows with T times S."""

    # Whether the kernel cannot let positions see ahead; whether it can let some of them, by their flags.
    causal_only: ClassVar[bool] = False
    reads_flags: ClassVar[bool] = True
    # Whether the compiler cannot divide it between devices; the one platform that has it, None if all do.
    opaque: ClassVar[bool] = False
    platform: ClassVar[str | None] = None

    def attend(
        self, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, layout: Layout, scoring: Scoring
    ) -> jax.Array:
        """Returns [B, T, N, H of values] in the dtype of the queries; softmax in float32, keys are not repeated."""
        q_BTKGH = group(q_BTNH, k_BSKH.shape[2])
        if scoring.is_plain():
            allowed_BTS = layout.allowed()
            out_BKGTH: jax.Array = masked_attention(q_BTKGH, k_BSKH, v_BSKH, allowed_BTS, scoring.scale)
            reads_B11T1 = jnp.any(allowed_BTS, axis=-1)[:, None, None, :, None]
            return ungroup(jnp.where(reads_B11T1, out_BKGTH, 0.0), q_BTNH.dtype)
        scores_BKGTS, allowed = scoring.scores(q_BTKGH, k_BSKH, layout)
        if scoring.sinks_N is not None:
            sinks = jnp.broadcast_to(scoring.sinks_as(q_BTKGH)[..., None], (*scores_BKGTS.shape[:-1], 1))
            weights_BKGTS = jax.nn.softmax(jnp.concatenate([scores_BKGTS, sinks], axis=-1), axis=-1)[..., :-1]
        else:
            weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1)
        weights_BKGTS = dropout(weights_BKGTS, scoring.dropout_rate, scoring.key)
        out_BTKGH = scoring.read(weights_BKGTS, v_BSKH, layout, q_BTNH.dtype)
        # Hidden keys have weight exp(MASKED - largest) = 0, but for a query that may read none: it gets zeros here.
        reads_B11T1 = jnp.any(allowed, axis=-1, keepdims=True)
        return ungroup(jnp.where(reads_B11T1, out_BTKGH, 0.0), q_BTNH.dtype)

    def extend(
        self,
        partial: Partial,
        q_BTKGH: jax.Array,
        k_BSKH: jax.Array,
        v_BSKH: jax.Array,
        layout: Layout,
        scoring: Scoring,
    ) -> Partial:
        """Adds keys to a softmax, all at once; without dropout."""
        return partial.add(q_BTKGH, k_BSKH, v_BSKH, layout, scoring)

    def portable(self) -> "Plain":
        """Returns the kernel itself, which reads caches and blocks of a ring as well."""
        return self

    def resolve(self, platform: str, features: Features, num_pairs: int) -> "Plain":
        """Returns the kernel itself."""
        del platform, features, num_pairs
        return self

    def problems(self, features: Features) -> list[str]:
        """Returns no problem: this kernel computes everything."""
        del features
        return []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunked:
    """Online softmax over chunks of keys (Milakov and Gimelshein 2018; Rabe and Staats 2021), in plain XLA.

    Memory grows with T times the chunk, in the backward pass too, where each chunk is computed again.

    Attributes:
      chunk: number of keys at a time.
    """

    causal_only: ClassVar[bool] = False
    reads_flags: ClassVar[bool] = True
    opaque: ClassVar[bool] = False
    platform: ClassVar[str | None] = None
    chunk: int = 512

    def attend(
        self, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, layout: Layout, scoring: Scoring
    ) -> jax.Array:
        """Returns [B, T, N, H of values] in the dtype of the queries, equal to `Plain` but for rounding."""
        q_BTKGH = group(q_BTNH, k_BSKH.shape[2])
        partial = Partial.start(q_BTKGH, v_BSKH.shape[-1], scoring)
        return self.extend(partial, q_BTKGH, k_BSKH, v_BSKH, layout, scoring).finish(q_BTNH.dtype)

    def extend(
        self,
        partial: Partial,
        q_BTKGH: jax.Array,
        k_BSKH: jax.Array,
        v_BSKH: jax.Array,
        layout: Layout,
        scoring: Scoring,
    ) -> Partial:
        """Adds keys to a softmax, a chunk at a time."""

        @jax.checkpoint
        def step(partial: Partial, chunk: tuple[jax.Array, jax.Array, Side]) -> tuple[Partial, None]:
            k_BSKH, v_BSKH, keys = chunk
            return partial.add(q_BTKGH, k_BSKH, v_BSKH, dataclasses.replace(layout, keys=keys), scoring), None

        partial, _ = jax.lax.scan(step, partial, self._split(k_BSKH, v_BSKH, layout.keys))
        return partial

    def _split(self, k_BSKH: jax.Array, v_BSKH: jax.Array, keys: Side) -> tuple[jax.Array, jax.Array, Side]:
        """Cuts the key axis into chunks, which become the leading axis; what fills the last has segment 0."""

        def cut(x: jax.Array, axis: int) -> jax.Array:
            size = min(self.chunk, x.shape[axis])
            widths = [(0, 0)] * x.ndim
            widths[axis] = (0, -x.shape[axis] % size)
            x = jnp.pad(x, widths)
            x = x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
            return jnp.moveaxis(x, axis, 0)

        side = Side(*(cut(x, x.ndim - 1) for x in keys))
        return cut(k_BSKH, 1), cut(v_BSKH, 1), side

    def portable(self) -> "Chunked":
        """Returns the kernel itself, which reads caches and blocks of a ring as well."""
        return self

    def resolve(self, platform: str, features: Features, num_pairs: int) -> "Chunked":
        """Returns the kernel itself."""
        del platform, features, num_pairs
        return self

    def problems(self, features: Features) -> list[str]:
        """Says so if weights would have to be dropped, which this kernel does not do."""
        problems = []
        if self.chunk < 1:
            problems.append(f"config.model.attention.kernel.chunk: {self.chunk} is not a positive number of keys")
        if features.dropout_rate:
            problems.append(
                "config.model.attention.dropout_rate: the chunked kernel drops no attention weights; set it to 0 or use"
                " the plain kernel"
            )
        return problems
