"""Multi-head attention with its projections: MHA, GQA and MQA, within a sequence or across to an encoder.

Owns the query, key, value and output weights and the layer's cache of keys and values. Knows neither
masks (lm.models.attention) nor where in the stack it stands. Law: one-token decoding, prefill and
training are the same code, and agree.
"""

import dataclasses
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm.models.attention import Bias, Chunked, Features, Layout, Plain, RelativeVectors, Scoring, Side
from lm.models.blocked import Blocked
from lm.models.context_parallel import Gather, Heads, Ring, Ulysses, attend
from lm.models.initializers import Constant
from lm.models.kernels import Auto, Cudnn, Splash
from lm.models.layers import Einsum, Norm, declare, fold
from lm.models.products import FEWEST_ROWS
from lm.parallel import constrain, is_on_cpu

if TYPE_CHECKING:
    from lm.models.transformer import Layer, Transformer


class Context(NamedTuple):
    """What every layer of a stack is told besides its input; a pytree.

    Attributes:
      queries: where the T positions of the input stand.
      keys: where the keys stand: the same without a cache or with an empty one, else all S slots of the cache.
      index: i32[], first slot of the cache that the input is written to; None without a cache, and for an empty one,
        whose slots are not read.
      memory_BSD: the encoder's result, or None.
      memory: where the encoder's positions stand, or None.
      bias_table_UN: table of attention biases shared by the layers, or None.
      key: PRNG key for dropout; None is deterministic.
    """

    queries: Side
    keys: Side
    index: jax.Array | None = None
    memory_BSD: jax.Array | None = None
    memory: Side | None = None
    bias_table_UN: jax.Array | None = None
    key: jax.Array | None = None


Cache = dict[str, Any] | None


def _alike(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns queries, keys and values in one dtype: the cache's for few queries, else that of the queries."""
    dtype = k_BSKH.dtype if q_BTNH.shape[1] < FEWEST_ROWS else q_BTNH.dtype
    return q_BTNH.astype(dtype), k_BSKH.astype(dtype), v_BSKH.astype(dtype)


def _swap(x_BSKH: jax.Array) -> jax.Array:
    """Returns [B, K, S, H] of [B, S, K, H], and back."""
    return jnp.swapaxes(x_BSKH, 1, 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiHead:
    """Settings of multi-head attention; the numbers and sizes of heads are those of the model.

    Attributes:
      use_qkv_bias: whether queries, keys and values have biases.
      use_output_bias: whether the output projection has a bias.
      qk_norm: norm of queries and keys before rotation: over each head (Qwen3, Gemma 3) or all heads together (OLMo 2).
      scale: factor on the products of queries and keys; None means 1 / sqrt(head_dim). T5 has 1.
      logit_softcap: bound on the scaled products, cap * tanh(x / cap) (Gemma 2); None leaves them.
      sinks: whether each head has a learned score that reads nothing (gpt-oss).
      dropout_rate: probability that an attention weight is dropped.
      kernel: how attention is computed; all kernels agree.
      context_parallel: how, where mesh.context divides the sequence; all ways agree.
    """

    use_qkv_bias: bool = False
    use_output_bias: bool = False
    qk_norm: Literal["none", "head", "all"] = "none"
    scale: float | None = None
    logit_softcap: float | None = None
    sinks: bool = False
    dropout_rate: float = 0.0
    kernel: Plain | Blocked | Chunked | Cudnn | Splash | Auto = Plain()
    context_parallel: Ring | Ulysses | Gather = Ring()

    def build(
        self, config: "Transformer", layer: "Layer", *, causal: bool, cross: bool, gain: float, name: str
    ) -> nn.Module:
        """Returns the module, its initial value and output weights multiplied by `gain`; called in a compact method."""
        return MultiHeadAttention(self, config, layer, causal, cross, gain, name=name)

    def init_cache(self, config: "Transformer", batch_size: int, length: int) -> dict[str, jax.Array]:
        """Returns zeros for one layer's keys and values, each [B, K, S, H] in the compute dtype; on CPUs f32.

        Heads come before slots, as the products over a head's slots want it: nothing is transposed for a token.
        XLA:CPU converts a whole bfloat16 array to float32 and back to write one slot of it.
        """
        shape = (batch_size, config.sizes["K"], length, config.sizes["H"])
        dtype = jnp.float32 if is_on_cpu() else config.compute_dtype
        return {"key": jnp.zeros(shape, dtype), "value": jnp.zeros(shape, dtype)}

    def rotated_width(self, config: "Transformer") -> int:
        """Returns how many channels of a head a rotation of positions sees."""
        return config.sizes["H"]

    def flops(self, config: "Transformer", num_keys: float) -> float:
        """Returns floating point operations for one query's scores and reading, forward only, without projections."""
        return 4.0 * config.sizes["N"] * config.sizes["H"] * num_keys

    def context_problems(self, config: "Transformer", lengths: dict[str, int], shards: int, tensor: int) -> list[str]:
        """Returns one sentence for each reason why a mesh cannot divide the sequence.

        Args:
          config: the model's settings.
          lengths: of sequences, by the name of the field of `config.data`.
          shards: devices along `context`, more than one.
          tensor: devices along `tensor`, which divide the heads.
        """
        heads = Heads(config.sizes["N"] // tensor, max(config.sizes["K"] // tensor, 1))
        return self.context_parallel.problems(self.kernel, self.dropout_rate, heads, lengths, shards)

    def problems(self, config: "Transformer") -> list[str]:
        """Returns one sentence for each reason why these settings cannot work."""
        layers = (*config.first_layers, *config.layers)
        features = Features(
            dropout_rate=self.dropout_rate,
            soft_cap=self.logit_softcap is not None,
            sinks=self.sinks,
            biased=any((layer.positions or config.positions).biases_scores for layer in layers),
            window=any(layer.window is not None for layer in layers),
            dtype=config.dtype,
            key_width=config.sizes["H"],
            value_width=config.sizes["H"],
        )
        problems = self.kernel.problems(features)
        if config.num_heads % config.sizes["K"]:
            problems.append(
                f"config.model.num_kv_heads: {config.sizes['K']} does not divide num_heads {config.num_heads}"
            )
        if config.head_dim is None and config.model_dim % config.num_heads:
            problems.append(
                f"config.model.num_heads: {config.num_heads} does not divide model_dim {config.model_dim};"
                " set head_dim or another number"
            )
        return problems


class MultiHeadAttention(nn.Module):
    """Multi-head attention of one layer.

    Attributes:
      attention: its settings.
      config: the model's settings.
      layer: the layer's own settings (window, positions).
      causal: whether later keys are hidden.
      cross: whether keys and values come from the encoder.
      gain: multiplies the initial value and output weights (DeepNorm).
    """

    attention: MultiHead
    config: "Transformer"
    layer: "Layer"
    causal: bool
    cross: bool = False
    gain: float = 1.0

    @nn.compact
    def __call__(self, x_BTD: jax.Array, context: Context, cache: Cache) -> tuple[jax.Array, Cache]:
        """Returns [B, T, D] and the cache with the input's keys and values written; None stays None."""
        settings, config = self.attention, self.config
        positions = self.layer.positions or config.positions
        # Queries start at unit variance of the scores whatever the factor that scores are multiplied by.
        scale = config.sizes["H"] ** -0.5 if settings.scale is None else settings.scale
        query = Einsum(
            "BTD,DNH->BTNH", config, settings.use_qkv_bias, scale=config.sizes["H"] ** -0.5 / scale, name="query"
        )
        q_BTNH = self._normalize(query(x_BTD), "query_norm", "heads")
        if not self.cross:
            q_BTNH = positions.rotate(q_BTNH, context.queries.positions)
        q_BTNH = constrain(q_BTNH, "batch", "length", "activation_heads", None)
        k_BSKH, v_BSKH, keys, cache = self._keys_and_values(x_BTD, context, cache)
        sinks = declare((config.sizes["N"],), ("heads",), "bias", distribution=Constant(0.0))
        scoring = Scoring(
            scale=scale,
            soft_cap=settings.logit_softcap,
            bias=None if self.cross else self._bias(context),
            sinks_N=self.param("sinks", sinks) if settings.sinks else None,
            relative=None if self.cross else self._relative(),
            dropout_rate=settings.dropout_rate,
            key=fold(context.key, 0),
        )
        layout = Layout(
            context.queries, keys, self.causal and not self.cross, None if self.cross else self.layer.window
        )
        if cache is None or (context.index is None and not self.cross):
            out_BTNH = attend(settings.context_parallel, settings.kernel, (q_BTNH, k_BSKH, v_BSKH), layout, scoring)
        else:
            arrays = _alike(q_BTNH, k_BSKH, v_BSKH)
            out_BTNH = settings.kernel.portable().attend(*arrays, layout, scoring).astype(q_BTNH.dtype)
        out_BTNH = constrain(out_BTNH, "batch", "length", "activation_heads", None)
        output = Einsum("BTNH,NHD->BTD", config, settings.use_output_bias, residual=True, scale=self.gain, name="out")
        return output(out_BTNH), cache

    def _keys_and_values(self, x_BTD: jax.Array, context: Context, cache: Cache) -> tuple[Any, Any, Side, Cache]:
        """Returns all keys and values that may be read, where they stand, and the cache with the new ones."""
        if self.cross:
            if cache is not None and context.memory_BSD is None:
                return _swap(cache["cross_key"]), _swap(cache["cross_value"]), self._memory(context), cache
            k_BSKH, v_BSKH = self._project(context.memory_BSD, cache)
            if cache is not None:
                cache = {**cache, "cross_key": _swap(k_BSKH), "cross_value": _swap(v_BSKH)}
            return k_BSKH, v_BSKH, self._memory(context), cache
        k_BTKH, v_BTKH = self._project(x_BTD, cache)
        k_BTKH = (self.layer.positions or self.config.positions).rotate(k_BTKH, context.queries.positions)
        if cache is None:
            return k_BTKH, v_BTKH, context.keys, cache
        start = (0, 0, 0 if context.index is None else context.index, 0)
        for name, new_BTKH in (("key", k_BTKH), ("value", v_BTKH)):
            new_BKTH = _swap(new_BTKH).astype(cache[name].dtype)
            cache = {**cache, name: jax.lax.dynamic_update_slice(cache[name], new_BKTH, start)}
        if context.index is None:
            return k_BTKH, v_BTKH, context.keys, cache
        return _swap(cache["key"]), _swap(cache["value"]), context.keys, cache

    def _project(self, x_BSD: jax.Array | None, cache: Cache) -> tuple[jax.Array, jax.Array]:
        """Returns keys and values, each [B, S, K, H], before rotation."""
        if x_BSD is None:
            raise ValueError("cross attention needs an encoder's result; the batch has no encoder_inputs")
        bias = self.attention.use_qkv_bias
        k_BSKH = Einsum("BSD,DKH->BSKH", self.config, bias, name="key")(x_BSD)
        v_BSKH = Einsum("BSD,DKH->BSKH", self.config, bias, scale=self.gain, name="value")(x_BSD)
        k_BSKH = self._normalize(k_BSKH, "key_norm", "kv_heads")
        length = self.attention.context_parallel.key_axis if cache is None else "kv_length"
        k_BSKH = constrain(k_BSKH, "batch", length, "activation_heads", None)
        return k_BSKH, constrain(v_BSKH, "batch", length, "activation_heads", None)

    def _normalize(self, x_BTNH: jax.Array, name: str, heads: str) -> jax.Array:
        if self.attention.qk_norm == "none":
            return x_BTNH
        axes = ("head_dim",) if self.attention.qk_norm == "head" else (heads, "head_dim")
        return Norm(self.config.norm, self.config.compute_dtype, axes, name=name)(x_BTNH)

    def _bias(self, context: Context) -> Bias | None:
        """Returns the scores' bias, if the scheme has any."""
        positions = self.layer.positions or self.config.positions
        columns_UN = positions.bias_columns(context.bias_table_UN, self.config.num_heads)
        return None if columns_UN is None else Bias(columns_UN, positions.bias, self.causal)

    def _relative(self) -> RelativeVectors | None:
        """Returns the layer's vectors of relative positions, if the scheme has any."""
        positions = self.layer.positions or self.config.positions
        tables = positions.relative_tables(self.config)
        if tables is None:
            return None
        return RelativeVectors(tables[0].whole(), tables[1].whole(), positions.relative_rows)

    def _memory(self, context: Context) -> Side:
        if context.memory is None:
            raise ValueError("cross attention needs an encoder; the batch has no encoder_inputs")
        return context.memory
