"""The kernel that leaves out most of what a causal mask hides, on any platform.

Knows no parameters. Law: equal to `Plain` but for rounding, where no position sees ahead.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from lm.models.attention import Features, Layout, Plain, Scoring, Side
from lm.models.products import is_length_divided

# Two hundred blocks of one layer take minutes to compile; 32 leave out 48 % of the scores, of 50.
MOST = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocked:
    """All scores of a block of queries at once, with the keys up to the block's end.

    Of n blocks, (n - 1) / 2n of the scores are never computed. What is not causal, or has other queries than keys or
    fewer than blocks, or is divided between devices, is read as by `Plain`.

    Attributes:
      blocks: into how many parts the queries are cut, at most 32: each is compiled apart.
    """

    causal_only: ClassVar[bool] = False
    reads_flags: ClassVar[bool] = False
    opaque: ClassVar[bool] = False
    platform: ClassVar[str | None] = None
    blocks: int = 2

    def attend(
        self, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, layout: Layout, scoring: Scoring
    ) -> jax.Array:
        """Returns [B, T, N, H of values] in the dtype of the queries; row t of both sides is at slot t."""
        length = q_BTNH.shape[1]
        if not layout.causal or k_BSKH.shape[1] != length or length < self.blocks or is_length_divided():
            return Plain().attend(q_BTNH, k_BSKH, v_BSKH, layout, scoring)
        ends, results = [length * (i + 1) // self.blocks for i in range(self.blocks)], []
        for start, end in zip([0, *ends], ends, strict=False):
            asked, read = _cut(layout.queries, start, end), _cut(layout.keys, 0, end)
            part = dataclasses.replace(layout, queries=asked, keys=read)
            results.append(Plain().attend(q_BTNH[:, start:end], k_BSKH[:, :end], v_BSKH[:, :end], part, scoring))
        return jnp.concatenate(results, axis=1)

    def portable(self) -> Plain:
        """Returns the kernel for a cache, or for the blocks of a ring."""
        return Plain()

    def resolve(self, platform: str, features: Features, num_pairs: int) -> "Blocked":
        """Returns the kernel itself."""
        del platform, features, num_pairs
        return self

    def problems(self, features: Features) -> list[str]:
        """Says so of a useless number of blocks, and of dropped weights, which would be the same in each block."""
        problems = []
        if not 1 <= self.blocks <= MOST:
            problems.append(
                f"config.model.attention.kernel.blocks: {self.blocks} is not a number of blocks between 1 and {MOST};"
                " use 2 or 4"
            )
        if features.dropout_rate:
            problems.append(
                "config.model.attention.dropout_rate: the blocked kernel drops no attention weights; set it to 0 or use"
                " the plain kernel"
            )
        return problems


def _cut(side: Side, start: int, end: int) -> Side:
    return Side(*(x[..., start:end] for x in side))
