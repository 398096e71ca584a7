"""Attention over a sequence that the mesh divides: gathered keys, a ring, or an exchange of heads for positions.

Between projections and kernels. Each device has a stretch of the queries and of the keys
(`mesh.context` stretches); what stands where travels with the keys (`Side`), so that masks, windows and biases
are those of one device. Law: every way equals attention on one device but for rounding.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lm.models.attention import Chunked, Features, Layout, Plain, Scoring, Side, group
from lm.models.kernels import Kernel, platform_problems
from lm.models.ring import Ways, pack, travel, unpack
from lm.parallel import (
    activation_spec,
    by_shards,
    current,
    deal,
    gather_length,
    is_old_gpu,
    is_placed,
    num_shards,
    platform_of,
    to_heads,
    to_length,
    undeal,
)


class Heads(NamedTuple):
    """How many heads one device of `tensor` has, to see whether they can be divided further.

    Attributes:
      queries: query heads.
      keys: key and value heads.
    """

    queries: int
    keys: int


Arrays = tuple[jax.Array, jax.Array, jax.Array]


def _by_shards(
    function: Callable[..., jax.Array], arrays: Arrays, layout: Layout, scoring: Scoring, opaque: bool = False
) -> jax.Array:
    """Runs attention on each device's shards; heads are divided if those of keys can be.

    Args:
      function: maps shards of the other arguments to a shard of the result.
      arrays: queries, keys and values.
      layout: who may read whom.
      scoring: how scores are made.
      opaque: whether it runs a kernel that jax does not see into.
    """
    if scoring.dropout_rate and scoring.key is not None:
        raise ValueError("\n".join(_dropout_problems(scoring.dropout_rate, "attention over a divided sequence")))
    scoring = dataclasses.replace(scoring, key=None)
    q_BTNH, k_BSKH, _ = arrays
    q = activation_spec(q_BTNH.shape, "batch", "length", None, None)
    heads = activation_spec(k_BSKH.shape, None, None, "activation_heads", None)[2]
    batch, length = q[0], q[1]

    # A tree of specs has the classes of the tree of arrays.
    rows: Any = PartitionSpec(batch, length)
    slots: Any = PartitionSpec(length)
    side = Side(rows, rows, rows, slots)

    # A column, or an element, of each head; what heads share is whole.
    bias = None if scoring.bias is None else dataclasses.replace(scoring.bias, table_UN=PartitionSpec(None, heads))
    sinks = None if scoring.sinks_N is None else PartitionSpec(heads)
    relative = jax.tree.map(lambda _: PartitionSpec(), scoring.relative)
    array = PartitionSpec(batch, length, heads, None)
    specs = (
        (array, array, array),
        dataclasses.replace(layout, queries=side, keys=side),
        dataclasses.replace(scoring, bias=bias, sinks_N=sinks, relative=relative),
    )
    return by_shards(function, specs, array, checked=not opaque)(arrays, layout, scoring)


def _uneven(lengths: dict[str, int], pieces: int, reason: str) -> list[str]:
    return [
        f"config.data.{name} {length} does not divide into {pieces} pieces, {reason}: make it a multiple of {pieces}"
        for name, length in lengths.items()
        if length % pieces
    ]


def _dropout_problems(dropout_rate: float, way: str) -> list[str]:
    if not dropout_rate:
        return []
    return [
        f"config.model.attention.dropout_rate {dropout_rate}: {way} drops no attention weights; set it to 0, or"
        " context_parallel to Gather"
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gather:
    """Every device reads all keys, gathered by the compiler; queries stay divided (Llama 3, section 3.3.2).

    Computes whatever the kernel computes; memory and traffic grow with the whole length.
    """

    # The logical axis of the positions of keys and values.
    key_axis: ClassVar[str] = "kv_length"

    def attend(self, kernel: Kernel, arrays: Arrays, layout: Layout, scoring: Scoring) -> jax.Array:
        """Returns [B, T, N, H of values], as the kernel does."""
        # What `Auto` chose may be a kernel that the compiler does not divide.
        kernel = kernel.portable() if kernel.opaque else kernel
        return kernel.attend(*arrays, layout, scoring)

    def problems(
        self, kernel: Kernel, dropout_rate: float, heads: Heads, lengths: dict[str, int], shards: int
    ) -> list[str]:
        """Returns one sentence for each length that the devices do not divide, and for a kernel that cannot be."""
        del dropout_rate, heads
        problems = []
        if kernel.opaque:
            problems.append(
                f"config.model.attention.kernel {type(kernel).__name__} is not divided by the compiler: set"
                " context_parallel to Ulysses, or the kernel to Chunked or Plain"
            )
        return problems + _uneven(lengths, shards, f"one for each device of mesh.context {shards}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ring:
    """Keys and values travel around the devices, which add them to a softmax (Liu et al. 2023, ring attention).

    What a block's mask hides altogether is skipped. The backward pass goes around once more, see `lm.models.ring`.

    Attributes:
      zigzag: whether a causal sequence is dealt out again so that all devices have the same work; otherwise the last
        device has most of it. Costs one exchange of queries, keys, values and result.
    """

    key_axis: ClassVar[str] = "length"
    zigzag: bool = True

    def attend(self, kernel: Kernel, arrays: Arrays, layout: Layout, scoring: Scoring) -> jax.Array:
        """Returns [B, T, N, H of values]; the kernel says how the keys of one device are read."""
        return _by_shards(functools.partial(self._attend, kernel.portable()), arrays, layout, scoring)

    def _attend(self, kernel: Plain | Chunked, arrays: Arrays, layout: Layout, scoring: Scoring) -> jax.Array:
        """Returns one device's part of the result."""
        q_BTNH, k_BSKH, v_BSKH = arrays
        kv_BSKH = jnp.concatenate([k_BSKH, v_BSKH], axis=-1)
        queries, keys = pack(layout.queries), pack(layout.keys)
        dealt = self.zigzag and layout.causal
        if dealt:
            q_BTNH, kv_BSKH = deal(q_BTNH, 1), deal(kv_BSKH, 1)
            queries = keys = deal(keys, 2)
        ways = Ways(kernel, 2 if dealt else 1, k_BSKH.shape[-1], layout.causal, layout.window)
        out_BTNH: jax.Array = travel(ways, group(q_BTNH, k_BSKH.shape[2]), kv_BSKH, queries, keys, scoring)
        return undeal(out_BTNH, 1) if dealt else out_BTNH

    def problems(
        self, kernel: Kernel, dropout_rate: float, heads: Heads, lengths: dict[str, int], shards: int
    ) -> list[str]:
        """Returns one sentence for each length that cannot be dealt, for attention dropout and for a foreign kernel."""
        del heads
        problems = _dropout_problems(dropout_rate, "the ring")
        if kernel.opaque:
            problems.append(
                f"config.model.attention.kernel {type(kernel).__name__} cannot add to a softmax, as a ring needs: set"
                " context_parallel to Ulysses, or the kernel to Chunked or Plain"
            )
        pieces = 2 * shards if self.zigzag else shards
        reason = f"{pieces // shards} for each device of mesh.context {shards}"
        return problems + _uneven(lengths, pieces, reason)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ulysses:
    """Devices exchange stretches of all heads for all positions of some heads, and back (Jacobs et al. 2023, Ulysses).

    Fewer messages than a ring, but no more devices than heads. Where a device would get less than one key head, key
    heads are repeated.
    """

    key_axis: ClassVar[str] = "length"

    def attend(self, kernel: Kernel, arrays: Arrays, layout: Layout, scoring: Scoring) -> jax.Array:
        """Returns [B, T, N, H of values]; the kernel reads whole sequences."""
        return _by_shards(functools.partial(self._attend, kernel), arrays, layout, scoring, kernel.opaque)

    def _attend(self, kernel: Kernel, arrays: Arrays, layout: Layout, scoring: Scoring) -> jax.Array:
        """Returns one device's part of the result."""
        q_BTNH, k_BSKH, v_BSKH = arrays
        kv_BSKH = jnp.concatenate([k_BSKH, v_BSKH], axis=-1)
        kv_BSKH = jnp.repeat(kv_BSKH, _repeats(kv_BSKH.shape[2], jax.lax.axis_size("context")), axis=2)
        k_BSKH, v_BSKH = jnp.split(to_heads(kv_BSKH), [k_BSKH.shape[-1]], axis=-1)
        sides = [unpack(gather_length(pack(side), 2)) for side in (layout.queries, layout.keys)]
        layout = dataclasses.replace(layout, queries=sides[0], keys=sides[1])
        return to_length(kernel.attend(to_heads(q_BTNH), k_BSKH, v_BSKH, layout, _own_heads(scoring)))

    def problems(
        self, kernel: Kernel, dropout_rate: float, heads: Heads, lengths: dict[str, int], shards: int
    ) -> list[str]:
        """Returns one sentence for each length and number of heads that the devices do not divide, and for dropout."""
        del kernel
        problems = _dropout_problems(dropout_rate, "the exchange of heads")
        repeated = heads.keys * _repeats(heads.keys, shards)
        if heads.queries % shards or heads.queries % repeated:
            problems.append(
                f"config.mesh.context {shards} does not divide the {heads.queries} query heads and {heads.keys} key"
                " heads of a device, which Ulysses exchanges for positions: use another mesh, or the Ring"
            )
        return problems + _uneven(lengths, shards, f"one for each device of mesh.context {shards}")


def _repeats(num_heads: int, shards: int) -> int:
    return shards // math.gcd(num_heads, shards)


def _own_heads(scoring: Scoring) -> Scoring:
    """Returns the scoring of the heads that this device gets in the exchange."""

    def own(x: jax.Array, axis: int) -> jax.Array:
        size = x.shape[axis] // jax.lax.axis_size("context")
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index("context") * size, size, axis)

    bias, sinks_N = scoring.bias, scoring.sinks_N
    if bias is not None:
        bias = dataclasses.replace(bias, table_UN=own(bias.table_UN, 1))
    return dataclasses.replace(scoring, bias=bias, sinks_N=None if sinks_N is None else own(sinks_N, 0))


ContextParallel = Ring | Ulysses | Gather


def attend(
    way: ContextParallel,
    kernel: Kernel,
    arrays: Arrays,
    layout: Layout,
    scoring: Scoring,
) -> jax.Array:
    """Computes attention wherever its arrays live: [B, T, N, H of values] in the dtype of the queries.

    Args:
      way: what to do where the mesh divides the sequence.
      kernel: what computes it on one device.
      arrays: queries [B, T, N, H], keys [B, S, K, H] and values [B, S, K, H of values].
      layout: who may read whom.
      scoring: how scores are made.
    """
    if is_placed():
        platform = platform_of(current()[0])
        features = _features(arrays, layout, scoring)
        kernel = kernel.resolve(platform or "none", features, arrays[0].shape[1] * arrays[1].shape[1])
        # What is only planned is planned with what the compiler sees into, on any platform.
        kernel = kernel.portable() if platform is None and kernel.opaque else kernel
        problems = [] if platform is None else platform_problems(kernel, platform)
        if problems:
            raise ValueError("\n".join(problems))
        if num_shards("length") > 1:
            return way.attend(kernel, arrays, layout, scoring)
        if kernel.opaque and current()[0].size > 1:
            return _by_shards(lambda arrays, *how: kernel.attend(*arrays, *how), arrays, layout, scoring, opaque=True)
        return kernel.attend(*arrays, layout, scoring)
    # For shapes alone, any kernel does.
    return kernel.portable().attend(*arrays, layout, scoring)


def is_undivided(kernel: Kernel) -> bool:
    """Returns whether one device computes everything, and has the kernel.

    Rows and positions of a prompt, unlike those of training, need not divide by the devices of a mesh.
    """
    if not is_placed() or current()[0].size > 1:
        return False
    platform = platform_of(current()[0])
    return platform is not None and not platform_problems(kernel, platform)


def _features(arrays: Arrays, layout: Layout, scoring: Scoring) -> Features:
    return Features(
        dropout_rate=0.0 if scoring.key is None else scoring.dropout_rate,
        soft_cap=scoring.soft_cap is not None,
        sinks=scoring.sinks_N is not None,
        biased=scoring.bias is not None or scoring.relative is not None,
        window=layout.window is not None,
        dtype=str(arrays[0].dtype),
        key_width=arrays[0].shape[-1],
        value_width=arrays[2].shape[-1],
        old_gpu=is_old_gpu(current()[0]),
    )
