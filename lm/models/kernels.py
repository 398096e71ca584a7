"""Attention kernels that only one kind of device has, and the choice among all of them.

Owns the calls of cuDNN and of splash attention. Knows no parameters. Laws: each equals `Plain` but for rounding,
or says in `problems` what it cannot do; what is chosen depends on platform, features and lengths only.
"""

import dataclasses
import functools
import math
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from absl import logging

from lm.models.attention import Chunked, Features, Layout, Plain, Scoring, Side
from lm.models.blocked import Blocked

PREFIX = "config.model.attention"


def _can_read(layout: Layout) -> jax.Array:
    """Returns bool[B, T], which queries may read any key at all, where each sees at least its own segment's first."""
    queries_BT1, keys_B1S = layout.queries.segment_ids[:, :, None], layout.keys.segment_ids[:, None, :]
    return jnp.any((queries_BT1 == keys_B1S) & (queries_BT1 != 0), axis=-1)


def _fill(layout: Layout, multiple: int) -> Layout:
    """Returns the layout with both lengths filled up to a multiple; what fills them has segment 0."""

    def fill(side: Side) -> Side:
        return Side(*(_fill_axis(x, x.ndim - 1, multiple) for x in side))

    return dataclasses.replace(layout, queries=fill(layout.queries), keys=fill(layout.keys))


def _fill_axis(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths)


def _refuse(name: str, features: Features, **unable: str) -> list[str]:
    """Returns a sentence for each feature that is asked for and is named in `unable`, with the field that asks."""
    return [
        f"{field}: the kernel {name} does not compute it; use the kernel Chunked or Plain"
        for feature, field in unable.items()
        if getattr(features, feature)
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cudnn:
    """cuDNN's flash attention, on NVIDIA GPUs (Dao 2023). The mask is an array [B, T, S]; scores are never written."""

    causal_only: ClassVar[bool] = False
    reads_flags: ClassVar[bool] = False
    opaque: ClassVar[bool] = True
    platform: ClassVar[str | None] = "gpu"
    # A test has another.
    implementation: ClassVar[Literal["cudnn", "xla"]] = "cudnn"

    def attend(
        self, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, layout: Layout, scoring: Scoring
    ) -> jax.Array:
        """Returns [B, T, N, H] in the dtype of the queries."""
        length = q_BTNH.shape[1]
        # The gradient takes even lengths only.
        q_BTNH, k_BSKH, v_BSKH = (_fill_axis(x, 1, 2) for x in (q_BTNH, k_BSKH, v_BSKH))
        filled = _fill(layout, 2)
        out_BTNH = jax.nn.dot_product_attention(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            mask=filled.allowed()[:, None, :, :],
            scale=scoring.scale,
            is_causal=layout.causal,
            implementation=self.implementation,
        )
        return jnp.where(_can_read(layout)[:, :, None, None], out_BTNH[:, :length], 0).astype(q_BTNH.dtype)

    def portable(self) -> Plain | Chunked:
        """Returns the kernel for a cache."""
        return Chunked()

    def resolve(self, platform: str, features: Features, num_pairs: int) -> "Cudnn":
        """Returns the kernel itself."""
        del platform, features, num_pairs
        return self

    def problems(self, features: Features) -> list[str]:
        """Returns one sentence for each thing that cuDNN's kernel does not do."""
        problems = _refuse(
            "Cudnn",
            features,
            dropout_rate=f"{PREFIX}.dropout_rate",
            soft_cap=f"{PREFIX}.logit_softcap",
            sinks=f"{PREFIX}.sinks",
            biased="config.model.positions",
        )
        if features.dtype != "bfloat16":
            problems.append(f"config.model.dtype: the kernel Cudnn computes in bfloat16, not in {features.dtype}")
        if features.key_width % 8 or features.key_width > (128 if features.old_gpu else 256):
            problems.append(
                f"config.model.head_dim: the kernel Cudnn takes multiples of 8 up to 256 (128 before Hopper), not"
                f" {features.key_width}"
            )
        if features.key_width != features.value_width:
            problems.append(
                f"{PREFIX}.value_dim: the kernel Cudnn takes values as wide as keys, {features.key_width}, not"
                f" {features.value_width}"
            )
        return problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class Splash:
    """Splash attention, jax's kernel for TPUs: blocks of scores stay on the chip, hidden blocks are skipped.

    Attributes:
      block: queries and keys of a block; a multiple of 128.
      interpret: whether the kernel is interpreted instead, which is slow and works on any platform.
    """

    causal_only: ClassVar[bool] = False
    reads_flags: ClassVar[bool] = False
    opaque: ClassVar[bool] = True
    block: int = 512
    interpret: bool = False

    @property
    def platform(self) -> str | None:
        """The platform that the kernel needs; None is any."""
        return None if self.interpret else "tpu"

    def attend(
        self, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, layout: Layout, scoring: Scoring
    ) -> jax.Array:
        """Returns [B, T, N, H of values] in the dtype of the queries."""
        from jax.experimental.pallas.ops.tpu import splash_attention as splash

        length, dtype = q_BTNH.shape[1], q_BTNH.dtype
        q_BTNH = (q_BTNH.astype(jnp.float32) * scoring.scale).astype(dtype)
        arrays = (jnp.swapaxes(_fill_axis(x, 1, 128), 1, 2) for x in (q_BTNH, k_BSKH, v_BSKH))
        q_BNTH, k_BKSH, v_BKSH = arrays
        filled = _fill(layout, 128)
        queries, keys = q_BNTH.shape[2], k_BKSH.shape[2]
        mask = splash.CausalMask((queries, keys)) if layout.causal else splash.FullMask((queries, keys))
        q, kv = math.gcd(queries, self.block), math.gcd(keys, self.block)
        kernel: Any = splash.make_splash_mha(
            splash.MultiHeadMask([mask] * q_BNTH.shape[1]),
            block_sizes=splash.BlockSizes(
                block_q=q, block_kv=kv, block_q_dkv=q, block_kv_dkv=kv, block_q_dq=q, block_kv_dq=kv
            ),
            attn_logits_soft_cap=scoring.soft_cap,
            head_shards=1,
            q_seq_shards=1,
            interpret=self.interpret,
        )
        segments = splash.SegmentIds(filled.queries.segment_ids, filled.keys.segment_ids)
        out_BTNH = jnp.swapaxes(jax.vmap(kernel)(q_BNTH, k_BKSH, v_BKSH, segments), 1, 2)[:, :length]
        return jnp.where(_can_read(layout)[:, :, None, None], out_BTNH, 0).astype(dtype)

    def portable(self) -> Plain | Chunked:
        """Returns the kernel for a cache."""
        return Chunked()

    def resolve(self, platform: str, features: Features, num_pairs: int) -> "Splash":
        """Returns the kernel itself."""
        del platform, features, num_pairs
        return self

    def problems(self, features: Features) -> list[str]:
        """Returns one sentence for each thing that splash attention does not do here.

        Its windows count places in the row; ours count positions, which an objective may choose.
        """
        problems = _refuse(
            "Splash",
            features,
            dropout_rate=f"{PREFIX}.dropout_rate",
            sinks=f"{PREFIX}.sinks",
            biased="config.model.positions",
            window="config.model.layers.window",
        )
        if self.block < 1 or self.block % 128:
            problems.append(f"{PREFIX}.kernel.block: {self.block} is not a positive multiple of 128")
        return problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class Auto:
    """The fastest kernel that computes what is asked: Splash on TPUs, Cudnn on GPUs, Blocked on CPUs, or what can.

    Attributes:
      plain_up_to: the most pairs of a query and a key for which all scores of a head are held at once.
    """

    causal_only: ClassVar[bool] = False
    reads_flags: ClassVar[bool] = False
    opaque: ClassVar[bool] = False
    platform: ClassVar[str | None] = None
    plain_up_to: int = 2048 * 2048

    def attend(
        self, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, layout: Layout, scoring: Scoring
    ) -> jax.Array:
        """Returns [B, T, N, H of values], computed in the way that any platform has."""
        return self.portable().attend(q_BTNH, k_BSKH, v_BSKH, layout, scoring)

    def portable(self) -> Plain | Chunked:
        """Returns the kernel for a cache, or for the blocks of a ring."""
        return Chunked()

    def resolve(self, platform: str, features: Features, num_pairs: int) -> Plain | Blocked | Chunked | Cudnn | Splash:
        """Returns the kernel for arrays that do not grow: of training, scoring, or a prompt without a cache.

        Args:
          platform: of the devices, as jax calls it.
          features: what is asked.
          num_pairs: T times S.
        """
        candidates = {"tpu": Splash(), "gpu": Cudnn(), "cuda": Cudnn()}
        chosen = candidates.get(platform)
        if chosen is None or chosen.problems(features):
            at_once = num_pairs <= self.plain_up_to
            # More blocks of bfloat16 cost more in transposed copies than they leave out.
            blocked = Blocked(blocks=2 if features.dtype == "bfloat16" else 4)
            if features.dropout_rate or (at_once and platform != "cpu"):
                chosen = Plain()
            else:
                chosen = blocked if at_once else Chunked()
        _log_choice(chosen, platform, num_pairs)
        return chosen

    def problems(self, features: Features) -> list[str]:
        """Returns no problem: there is always a kernel."""
        del features
        return []


Kernel = Plain | Blocked | Chunked | Cudnn | Splash | Auto


@functools.cache
def _log_choice(chosen: Plain | Blocked | Chunked | Cudnn | Splash, platform: str, num_pairs: int) -> None:
    logging.info("attention on %s for %d pairs of query and key: %s", platform, num_pairs, chosen)


def platform_problems(kernel: Kernel, platform: str) -> list[str]:
    """Says so if the devices are not those that the kernel needs.

    Args:
      kernel: as configured.
      platform: of the devices, as jax calls it: cpu, gpu (or cuda), tpu.
    """
    platform = {"cuda": "gpu", "rocm": "gpu"}.get(platform, platform)
    if kernel.platform in (None, platform):
        return []
    return [
        f"{PREFIX}.kernel: {type(kernel).__name__} runs on a {kernel.platform}, the devices here are {platform}; use"
        " Auto, Chunked or Plain"
    ]
