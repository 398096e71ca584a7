"""Where a token stands: one small class a scheme, each saying what it adds, rotates or biases.

A scheme may do three things, and does nothing where it says nothing: add to the embeddings, rotate
queries and keys, or bias attention scores. Knows no attention kernel and no stack. Law: only
`positions` of the batch enter, never an index into a row, so packing and caching change nothing.
"""

import dataclasses
import math
from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lm.models.layers import Table
from lm.models.rope import LinearScaling, Llama3Scaling, NtkScaling, YarnScaling

if TYPE_CHECKING:
    from lm.models.transformer import Transformer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Positions:
    """What every scheme answers; by default a scheme adds, rotates and biases nothing."""

    # Whether positions that see each other both ways can tell their order; a causal mask tells it by itself.
    tells_order: ClassVar[bool] = True
    # Whether scores depend on positions other than through rotated queries and keys.
    biases_scores: ClassVar[bool] = False

    def table(self, config: "Transformer", name: str) -> Table | None:
        """Returns the table of learned positions that is added to the embeddings; called in a compact method."""
        del config, name
        return None

    def rows(self, positions_BT: jax.Array) -> jax.Array:
        """Returns i32[B, T], the row of `table` for each position."""
        return positions_BT

    def encode(self, positions_BT: jax.Array, model_dim: int) -> jax.Array | None:
        """Returns f32[B, T, D] to be added to the embeddings."""
        del positions_BT, model_dim
        return None

    def rotate(self, x_BTNH: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """Returns queries or keys rotated by their positions."""
        del positions_BT
        return x_BTNH

    def bias_table(self, config: "Transformer", name: str) -> Table | None:
        """Returns the table of attention biases that the layers of a stack share; called in a compact method."""
        del config, name
        return None

    def bias_columns(self, table_UN: jax.Array | None, num_heads: int) -> jax.Array | None:
        """Returns f32[U, N], a column for each head that `bias` reads, or None if scores have no bias.

        Args:
          table_UN: the stack's `bias_table`, whole, or None.
          num_heads: N.
        """
        del table_UN, num_heads
        return None

    def bias(self, columns_UN: jax.Array, queries_BT: jax.Array, keys_BS: jax.Array, causal: bool) -> jax.Array:
        """Returns f32[B, N, T, S] to be added to the attention scores, from the positions of both sides.

        Args:
          columns_UN: of `bias_columns`, or those of some of the heads.
          queries_BT: i32 positions.
          keys_BS: i32 positions.
          causal: whether the stack hides later positions.
        """
        del causal
        return jnp.zeros((queries_BT.shape[0], columns_UN.shape[1], queries_BT.shape[1], keys_BS.shape[1]))

    def relative_tables(self, config: "Transformer") -> "tuple[Table, Table] | None":
        """Returns a layer's own tables of relative positions, for keys and values; called in a compact method."""
        del config
        return None

    def relative_rows(self, distance: jax.Array) -> jax.Array:
        """Returns i32, the row of the relative tables for each distance (key position minus query position)."""
        return distance

    def problems(self, head_dim: int) -> list[str]:
        """Returns one sentence for each reason why the scheme cannot work with heads of this size."""
        del head_dim
        return []


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoPositions(Positions):
    """No information on positions besides the causal mask (Haviv et al. 2022)."""

    tells_order: ClassVar[bool] = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learned(Positions):
    """A learned vector for each position up to max_length, added to the embedding (GPT-2, BERT).

    Attributes:
      offset: rows of the table before that of position 0 (RoBERTa and BART have 2, which stay unused).
    """

    offset: int = 0

    def table(self, config: "Transformer", name: str) -> Table | None:
        """Returns the table of max_length + offset rows."""
        sizes = (("P", config.max_length + self.offset), ("Z", config.embedding_width))
        return Table("PZ", config, sizes=sizes, name=name)

    def rows(self, positions_BT: jax.Array) -> jax.Array:
        """Returns the rows, which begin at `offset`."""
        return positions_BT + self.offset


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sinusoidal(Positions):
    """Fixed sines and cosines added to the embedding (Vaswani et al. 2017, section 3.5).

    Attributes:
      base: the longest wavelength is 2 pi base.
      interleaved: sine and cosine alternate, as the paper writes it; else all sines first (tensor2tensor, Marian).
    """

    base: float = 10_000.0
    interleaved: bool = False

    def encode(self, positions_BT: jax.Array, model_dim: int) -> jax.Array | None:
        """Returns f32[B, T, D], sines and cosines of the positions."""
        frequencies = self.base ** (-np.arange(0, model_dim, 2, dtype=np.float64) / model_dim)
        angles = positions_BT[:, :, None].astype(jnp.float32) * frequencies.astype(np.float32)[None, None, :]
        waves = (jnp.sin(angles), jnp.cos(angles))
        if self.interleaved:
            return jnp.stack(waves, axis=-1).reshape(*positions_BT.shape, model_dim)
        return jnp.concatenate(waves, axis=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotary(Positions):
    """Rotation of queries and keys by angles proportional to the position (Su et al. 2021).

    Channel i is paired with channel i + rotated/2, as in Llama's Hugging Face checkpoints.

    Attributes:
      theta: base of the wavelengths.
      fraction: share of each head's channels, from the first, that is rotated.
      scaling: how wavelengths are stretched to reach beyond the length of pre-training.
    """

    theta: float = 10_000.0
    fraction: float = 1.0
    scaling: LinearScaling | NtkScaling | YarnScaling | Llama3Scaling | None = None

    def frequencies(self, head_dim: int) -> tuple[np.ndarray, float]:
        """Returns f64[rotated/2], radians per position, and the factor on sines and cosines (1 but for YaRN)."""
        rotated = int(head_dim * self.fraction)
        if self.scaling is not None:
            return self.scaling.frequencies(self.theta, rotated)
        return self.theta ** (-np.arange(0, rotated, 2, dtype=np.float64) / rotated), 1.0

    def rotate(self, x_BTNH: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """Returns queries or keys rotated by their positions; angles in float32."""
        frequencies, factor = self.frequencies(x_BTNH.shape[-1])
        angles = positions_BT[:, :, None].astype(jnp.float32) * frequencies.astype(np.float32)[None, None, :]
        cos = (jnp.cos(angles) * factor)[:, :, None, :]
        sin = (jnp.sin(angles) * factor)[:, :, None, :]
        half = frequencies.shape[0]
        first, second, rest = jnp.split(x_BTNH.astype(jnp.float32), [half, 2 * half], axis=-1)
        rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
        return rotated.astype(x_BTNH.dtype)

    def problems(self, head_dim: int) -> list[str]:
        """Says so if the rotated channels cannot be paired."""
        if not 0 < self.fraction <= 1:
            return [f"config.model.positions.fraction: {self.fraction} is not in (0, 1]"]
        rotated = int(head_dim * self.fraction)
        if rotated < 2 or rotated % 2:
            return [
                f"config.model.positions.fraction: {self.fraction} of head_dim {head_dim} rotates {rotated} channels;"
                " it must be an even number"
            ]
        return []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bucketed(Positions):
    """A learned bias per head for each bucket of distances, shared by all layers of a stack (T5, section 2.1).

    Attributes:
      num_buckets: number of buckets; half of them are for each direction where attention is bidirectional.
      max_distance: distances from here on share the last bucket.
    """

    biases_scores: ClassVar[bool] = True
    num_buckets: int = 32
    max_distance: int = 128

    def bias_table(self, config: "Transformer", name: str) -> Table | None:
        """Returns the table of num_buckets rows, a column for each head."""
        return Table("UN", config, sizes=(("U", self.num_buckets),), name=name)

    def problems(self, head_dim: int) -> list[str]:
        """Says so if there are too few buckets, or if the exact ones reach max_distance already."""
        del head_dim
        problems = []
        if self.num_buckets < 4 or self.num_buckets % 4:
            problems.append(f"config.model.positions.num_buckets: {self.num_buckets} is not a positive multiple of 4")
        if self.max_distance <= self.num_buckets // 2:
            problems.append(
                f"config.model.positions.max_distance: {self.max_distance} must exceed half of num_buckets"
                f" {self.num_buckets}"
            )
        return problems

    def buckets(self, distance: jax.Array, causal: bool) -> jax.Array:
        """Returns i32 buckets of i32 distances (key position minus query position)."""
        count = self.num_buckets if causal else self.num_buckets // 2
        offset = jnp.zeros_like(distance) if causal else jnp.where(distance > 0, count, 0)
        distance = jnp.maximum(-distance, 0) if causal else jnp.abs(distance)
        exact = count // 2
        # Logarithmic from `exact` to max_distance; the maximum keeps the logarithm finite where it is not used.
        growth = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / math.log(self.max_distance / exact)
        far = jnp.minimum(exact + (growth * (count - exact)).astype(jnp.int32), count - 1)
        return offset + jnp.where(distance < exact, distance, far)

    def bias_columns(self, table_UN: jax.Array | None, num_heads: int) -> jax.Array | None:
        """Returns the stack's table."""
        del num_heads
        if table_UN is None:
            raise ValueError("bucketed positions need the table of their stack")
        return table_UN.astype(jnp.float32)

    def bias(self, columns_UN: jax.Array, queries_BT: jax.Array, keys_BS: jax.Array, causal: bool) -> jax.Array:
        """Returns the table's rows of all pairs of positions."""
        buckets_BTS = self.buckets(keys_BS[:, None, :] - queries_BT[:, :, None], causal)
        return jnp.transpose(jnp.take(columns_UN, buckets_BTS, axis=0), (0, 3, 1, 2))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alibi(Positions):
    """A fixed penalty proportional to the distance, with another slope for each head (Press et al. 2022)."""

    biases_scores: ClassVar[bool] = True

    def slopes(self, num_heads: int) -> np.ndarray:
        """Returns f64[N]: powers of 2^(-8/n) for the next lower power of two n, then every second one of 2n."""
        power = 2 ** int(math.log2(num_heads))
        slopes = 2.0 ** (-8.0 / power * np.arange(1, power + 1))
        more = 2.0 ** (-4.0 / power * np.arange(1, 2 * (num_heads - power), 2))
        return np.concatenate([slopes, more])

    def bias_columns(self, table_UN: jax.Array | None, num_heads: int) -> jax.Array | None:
        """Returns one row, the slopes."""
        del table_UN
        return jnp.asarray(self.slopes(num_heads).astype(np.float32))[None, :]

    def bias(self, columns_UN: jax.Array, queries_BT: jax.Array, keys_BS: jax.Array, causal: bool) -> jax.Array:
        """Returns minus slope times distance."""
        del causal
        distance_BTS = jnp.abs(keys_BS[:, None, :] - queries_BT[:, :, None]).astype(jnp.float32)
        return -columns_UN[0][None, :, None, None] * distance_BTS[:, None, :, :]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Relative(Positions):
    """A learned vector for each distance, added to keys and values, shared by the heads of a layer (Shaw et al. 2018).

    Attributes:
      max_distance: distances beyond this, to either side, share a vector.
    """

    biases_scores: ClassVar[bool] = True
    max_distance: int = 16

    def relative_tables(self, config: "Transformer") -> tuple[Table, Table] | None:
        """Returns two tables of 2 max_distance + 1 rows, as wide as a head."""
        sizes = (("U", 2 * self.max_distance + 1),)
        keys = Table("UH", config, sizes=sizes, name="relative_keys")
        return keys, Table("UH", config, sizes=sizes, name="relative_values")

    def relative_rows(self, distance: jax.Array) -> jax.Array:
        """Returns the distance, clipped, counted from the farthest key on the left."""
        return jnp.clip(distance, -self.max_distance, self.max_distance) + self.max_distance
