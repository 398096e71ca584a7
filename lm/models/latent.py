"""Multi-head latent attention: keys and values of all heads from one small latent, which alone is cached.

Owns the down- and up-projections. Law: with a cache the up-projections are absorbed into queries and
results, so that cached attention reads only latents, and equals attention with expanded keys and values.
"""

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm.models.attention import Chunked, Features, Layout, Plain, Scoring
from lm.models.blocked import Blocked
from lm.models.context_parallel import Gather, Heads, Ring, Ulysses, attend
from lm.models.kernels import Auto, Cudnn, Splash
from lm.models.layers import Einsum, Norm, fold
from lm.models.multihead import Cache, Context
from lm.models.positions import Alibi, Bucketed, Relative
from lm.parallel import constrain

if TYPE_CHECKING:
    from lm.models.transformer import Layer, Transformer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Latent:
    """Settings of multi-head latent attention (DeepSeek-V2, section 2.1); the model's head_dim and num_kv_heads rest.

    Attributes:
      query_rank: width of the queries' latent; None projects queries directly (DeepSeek-V2-Lite).
      kv_rank: width of the latent of keys and values.
      nope_dim: channels of a head's queries and keys without position.
      rotary_dim: rotated channels of a head's queries; their keys are shared by all heads.
      value_dim: channels of a head's values.
      scale: factor on the products; None means 1 / sqrt(nope_dim + rotary_dim).
      dropout_rate: probability that an attention weight is dropped.
      kernel: how attention is computed.
      context_parallel: how, where mesh.context divides the sequence.
    """

    query_rank: int | None = 1536
    kv_rank: int = 512
    nope_dim: int = 128
    rotary_dim: int = 64
    value_dim: int = 128
    scale: float | None = None
    dropout_rate: float = 0.0
    kernel: Plain | Blocked | Chunked | Cudnn | Splash | Auto = Plain()
    context_parallel: Ring | Ulysses | Gather = Ring()

    def build(
        self, config: "Transformer", layer: "Layer", *, causal: bool, cross: bool, gain: float, name: str
    ) -> nn.Module:
        """Returns the module, its initial value and output weights multiplied by `gain`; called in a compact method."""
        if cross:
            raise ValueError("config.model.attention: latent attention does not read an encoder; use MultiHead")
        return LatentAttention(self, config, layer, causal, gain, name=name)

    def init_cache(self, config: "Transformer", batch_size: int, length: int) -> dict[str, jax.Array]:
        """Returns zeros for one layer: `latent` [B, S, R] and the shared rotated `key` [B, S, H]."""
        widths = {"latent": self.kv_rank, "key": self.rotary_dim}
        return {name: jnp.zeros((batch_size, length, width), config.compute_dtype) for name, width in widths.items()}

    def rotated_width(self, config: "Transformer") -> int:
        """Returns how many channels of a head a rotation of positions sees."""
        del config
        return self.rotary_dim

    def flops(self, config: "Transformer", num_keys: float) -> float:
        """Returns operations for one query's scores and reading, forward only, without projections and not absorbed."""
        return 2.0 * config.num_heads * (self.nope_dim + self.rotary_dim + self.value_dim) * num_keys

    def context_problems(self, config: "Transformer", lengths: dict[str, int], shards: int, tensor: int) -> list[str]:
        """Returns one sentence for each reason why a mesh cannot divide the sequence.

        Args:
          config: the model's settings.
          lengths: of sequences, by the name of the field of `config.data`.
          shards: devices along `context`, more than one.
          tensor: devices along `tensor`, which divide the heads.
        """
        heads = Heads(config.num_heads // tensor, config.num_heads // tensor)
        return self.context_parallel.problems(self.kernel, self.dropout_rate, heads, lengths, shards)

    def problems(self, config: "Transformer") -> list[str]:
        """Returns one sentence for each reason why these settings cannot work."""
        features = Features(
            dropout_rate=self.dropout_rate,
            soft_cap=False,
            sinks=False,
            biased=False,
            window=any(layer.window is not None for layer in (*config.first_layers, *config.layers)),
            dtype=config.dtype,
            key_width=self.nope_dim + self.rotary_dim,
            value_width=self.value_dim,
        )
        problems = self.kernel.problems(features)
        problems += [
            f"config.model.attention.{name}: {getattr(self, name)} is not a positive number"
            for name in ("kv_rank", "nope_dim", "rotary_dim", "value_dim")
            if getattr(self, name) < 1
        ]
        if config.encoder_depth and config.decoder_depth:
            problems.append("config.model.attention: latent attention does not read an encoder; use MultiHead")
        schemes = [config.positions, *(layer.positions for layer in (*config.first_layers, *config.layers))]
        if any(isinstance(scheme, Bucketed | Alibi | Relative) for scheme in schemes):
            problems.append("config.model.positions: latent attention takes no bias by position; use Rotary")
        return problems


class LatentAttention(nn.Module):
    """Multi-head latent attention of one layer.

    Attributes:
      attention: its settings.
      config: the model's settings.
      layer: the layer's own settings (window, positions).
      causal: whether later keys are hidden.
      gain: multiplies the initial value and output weights (DeepNorm).
    """

    attention: Latent
    config: "Transformer"
    layer: "Layer"
    causal: bool
    gain: float = 1.0

    @nn.compact
    def __call__(self, x_BTD: jax.Array, context: Context, cache: Cache) -> tuple[jax.Array, Cache]:
        """Returns [B, T, D] and the cache with the input's latents written; None stays None."""
        settings, config = self.attention, self.config
        nope_BTNH, rotated_BTNH = self._queries(x_BTD, context)
        latent_BSR, key_BSH, cache = self._latents(x_BTD, context, cache)
        key_up = Einsum("BSR,RNH->BSNH", config, sizes=self._sizes(settings.nope_dim), name="key_up")
        value_sizes = self._sizes(settings.value_dim)
        value_up = Einsum("BSR,RNH->BSNH", config, sizes=value_sizes, scale=self.gain, name="value_up")
        scale = (settings.nope_dim + settings.rotary_dim) ** -0.5 if settings.scale is None else settings.scale
        scoring = Scoring(scale=scale, dropout_rate=settings.dropout_rate, key=fold(context.key, 0))
        layout = Layout(context.queries, context.keys, self.causal, self.layer.window)
        if cache is None or context.index is None:
            k_BSNH = key_up(latent_BSR)
            shared_BSNH = jnp.broadcast_to(key_BSH[:, :, None, :], (*k_BSNH.shape[:3], settings.rotary_dim))
            k_BSNH = jnp.concatenate([k_BSNH, shared_BSNH], axis=-1)
            q_BTNH = jnp.concatenate([nope_BTNH, rotated_BTNH], axis=-1)
            arrays = (q_BTNH, k_BSNH, value_up(latent_BSR))
            out_BTNH = attend(settings.context_parallel, settings.kernel, arrays, layout, scoring)
        else:
            # One key head that all queries share: the latent with the rotated channels; its values are the latent.
            absorbed_BTNR = key_up(nope_BTNH, "BTNH,RNH->BTNR")
            q_BTNR = jnp.concatenate([absorbed_BTNR, rotated_BTNH], axis=-1)
            k_BSKR = jnp.concatenate([latent_BSR, key_BSH], axis=-1)[:, :, None, :]
            read_BTNR = settings.kernel.portable().attend(q_BTNR, k_BSKR, latent_BSR[:, :, None, :], layout, scoring)
            out_BTNH = value_up(read_BTNR, "BTNR,RNH->BTNH")
        out_BTNH = constrain(out_BTNH, "batch", "length", "activation_heads", None)
        output = Einsum("BTNH,NHD->BTD", config, residual=True, sizes=value_sizes, scale=self.gain, name="out")
        return output(out_BTNH), cache

    def _sizes(self, head_dim: int) -> tuple[tuple[str, int], ...]:
        return (("R", self.attention.kv_rank), ("H", head_dim))

    def _queries(self, x_BTD: jax.Array, context: Context) -> tuple[jax.Array, jax.Array]:
        """Returns the channels of queries without and with rotation."""
        settings, config = self.attention, self.config
        width = ("H", settings.nope_dim + settings.rotary_dim)
        if settings.query_rank is None:
            q_BTNH = Einsum("BTD,DNH->BTNH", config, sizes=(width,), name="query")(x_BTD)
        else:
            sizes = (("R", settings.query_rank), width)
            down_BTR = Einsum("BTD,DR->BTR", config, sizes=sizes, name="query_down")(x_BTD)
            down_BTR = Norm(config.norm, config.compute_dtype, name="query_norm")(down_BTR)
            q_BTNH = Einsum("BTR,RNH->BTNH", config, sizes=sizes, name="query_up")(down_BTR)
        q_BTNH = constrain(q_BTNH, "batch", "length", "activation_heads", None)
        nope_BTNH, rotated_BTNH = jnp.split(q_BTNH, [settings.nope_dim], axis=-1)
        positions = self.layer.positions or config.positions
        return nope_BTNH, positions.rotate(rotated_BTNH, context.queries.positions)

    def _latents(self, x_BTD: jax.Array, context: Context, cache: Cache) -> tuple[jax.Array, jax.Array, Cache]:
        """Returns the latents and rotated shared keys of all that may be read, and the cache with the new ones."""
        settings, config = self.attention, self.config
        sizes = (("R", settings.kv_rank), ("H", settings.rotary_dim))
        latent_BTR = Einsum("BTD,DR->BTR", config, sizes=sizes, name="kv_down")(x_BTD)
        latent_BTR = Norm(config.norm, config.compute_dtype, name="kv_norm")(latent_BTR)
        key_BTH = Einsum("BTD,DH->BTH", config, sizes=sizes, name="key_rotary")(x_BTD)
        positions = self.layer.positions or config.positions
        key_BTH = positions.rotate(key_BTH[:, :, None, :], context.queries.positions)[:, :, 0, :]
        if cache is None:
            return latent_BTR, key_BTH, cache
        start = (0, 0 if context.index is None else context.index, 0)
        latent_BSR = jax.lax.dynamic_update_slice(cache["latent"], latent_BTR.astype(cache["latent"].dtype), start)
        key_BSH = jax.lax.dynamic_update_slice(cache["key"], key_BTH.astype(cache["key"].dtype), start)
        cache = {"latent": latent_BSR, "key": key_BSH}
        return (latent_BTR, key_BTH, cache) if context.index is None else (latent_BSR, key_BSH, cache)
