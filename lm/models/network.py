"""The network: token table, towers and head, composed from the settings.

The one place where towers meet: an encoder, a decoder, or a decoder that reads an encoder. Knows no
objective, no mesh and nothing of how a block works inside. Law: `logits` is applied position by
position, so any chunking of it gives the same numbers.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm.batch import Batch
from lm.models.attention import Side
from lm.models.heads import Classifier, Head
from lm.models.layers import Einsum, Norm, Table, dropout, fold
from lm.models.multihead import Context
from lm.models.products import stored
from lm.models.stack import Stack, Sums
from lm.parallel import constrain

if TYPE_CHECKING:
    from lm.models.transformer import Transformer

# What a tower's randomness is for; layers take their own numbers.
EMBEDDING_DROPOUT = 1 << 20
ENCODER, DECODER = 1, 2


class Inputs(NamedTuple):
    """What a tower reads.

    Attributes:
      tokens: i32[B, T].
      side: where the tokens stand.
      token_types: i32[B, T], or None where all are of type 0.
      block_positions: i32[B, T], second positions (GLM), or None.
    """

    tokens: Any
    side: Side
    token_types: Any = None
    block_positions: Any = None


class Tower(nn.Module):
    """From token embeddings to hidden states: positions, norm, dropout, the stack and its final norm.

    Attributes:
      config: the model's settings.
      num_layers: number of blocks.
      causal: whether later positions are hidden.
      cross: whether the blocks read an encoder's result.
    """

    config: "Transformer"
    num_layers: int
    causal: bool
    cross: bool = False

    @nn.compact
    def __call__(
        self, x_BTZ: jax.Array, inputs: Inputs, context: Context, caches: Any
    ) -> tuple[jax.Array, Any, Sums, Sums]:
        """Returns hidden states [B, T, D], caches, losses and metrics, from token embeddings."""
        config = self.config
        x_BTZ = self._embed(x_BTZ, inputs)
        x_BTD = dropout(x_BTZ, config.dropout_rate, fold(context.key, EMBEDDING_DROPOUT))
        if config.embedding_dim is not None:
            sizes = (("Z", config.embedding_width),)
            x_BTD = Einsum("BTZ,ZD->BTD", config, True, sizes=sizes, name="embedding_projection")(x_BTD)
        x_BTD = constrain(x_BTD, "batch", "residual_length", "activation_embed")
        stack = Stack(config, self.num_layers, self.causal, self.cross, name="stack")
        x_BTD, caches, losses, metrics = stack(x_BTD, context, caches)
        if config.final_norm:
            x_BTD = stored(Norm(config.norm, config.compute_dtype, name="final_norm")(x_BTD))
        return x_BTD, caches, losses, metrics

    def _embed(self, x_BTZ: jax.Array, inputs: Inputs) -> jax.Array:
        """Adds to token embeddings what positions and token types say."""
        config, places_BT = self.config, inputs.side.positions
        if config.scale_embeddings:
            x_BTZ = x_BTZ * jnp.asarray(config.model_dim**0.5, x_BTZ.dtype)
        table = config.positions.table(config, name="positions")
        if table is not None:
            x_BTZ = x_BTZ + table(config.positions.rows(places_BT))
        waves_BTZ = config.positions.encode(places_BT, config.embedding_width)
        if waves_BTZ is not None:
            x_BTZ = x_BTZ + waves_BTZ.astype(x_BTZ.dtype)
        if config.num_token_types:
            types = Table(
                "UZ", config, sizes=(("U", config.num_token_types), ("Z", config.embedding_width)), name="types"
            )
            x_BTZ = x_BTZ + types(jnp.zeros_like(places_BT) if inputs.token_types is None else inputs.token_types)
        if config.num_block_positions:
            if inputs.block_positions is None:
                raise ValueError("config.model.num_block_positions: the batch has no block_positions; set it to 0")
            sizes = (("P", config.num_block_positions), ("Z", config.embedding_width))
            x_BTZ = x_BTZ + Table("PZ", config, sizes=sizes, name="block_positions")(inputs.block_positions)
        if config.embedding_norm:
            x_BTZ = Norm(config.norm, config.compute_dtype, name="embedding_norm")(x_BTZ)
        return x_BTZ


class Network(nn.Module):
    """A token table, the towers that the settings ask for, and a head.

    The parameter tree, which checkpoints and converters rely on (a part is there if the settings ask for it; every
    linear map has `kernel`, in the order of its equation, and maybe `bias`; every norm `scale` and maybe `bias`):

        tokens/embedding [V, D]                       the table, also the output projection if embeddings are tied
        encoder/..., decoder/...                      a tower each:
          positions/embedding, types/embedding, block_positions/embedding, embedding_norm, embedding_projection
          stack/relative_bias/embedding [buckets, N]  T5's biases, shared by the layers
          stack/RUN/block_I/...                       RUN is first, layers or last; a leading axis of repeats
            attention_norm, attention_output_norm, cross_norm, cross_output_norm, mlp_norm, mlp_output_norm
            attention/{query [D, N, H], key, value [D, K, H], out [N, H, D], query_norm, key_norm, sinks [N]}
            attention/{relative_keys, relative_values}/embedding [distances, H]
            attention/{query_down [D, R], query_norm, query_up [R, N, H], kv_down, kv_norm, key_rotary [D, H],
              key_up, value_up [R, N, H], out}        latent attention
            cross/...                                 as attention
            mlp/{gate, up [D, F], down [F, D]}
          final_norm
        head/{dense [D, D], norm, projection [D, V], bias [V]}       not in ELECTRA's discriminator
        classifier/{pooler [D, D], projection [D, classes]}

    A norm's name is that of its branch where it stands before the branch or after the sum, and ends in
    `_output_norm` after the branch. `config.layer_places` says where layer i is. Rotated channels are halves (i, i +
    H/2). With shared layers there is no axis of repeats.

    Attributes:
      config: the model's settings.
    """

    config: "Transformer"

    def setup(self) -> None:
        """Makes the parts; their names here are their names in the parameter tree."""
        config = self.config
        self.tokens = Table("VZ", config, sizes=(("Z", config.embedding_width),))
        if config.encoder_depth:
            self.encoder = Tower(config, config.encoder_depth, causal=False)
        if config.decoder_depth:
            self.decoder = Tower(config, config.decoder_depth, causal=True, cross=config.encoder_depth > 0)
        if config.predicts_tokens:
            self.head = Head(config)
        if config.num_classes:
            self.classifier = Classifier(config)

    def __call__(self, inputs: Inputs, context: Context, caches: Any) -> tuple[jax.Array, Any, Sums, Sums]:
        """Runs the main tower, the decoder if there is one: hidden states, caches, losses, metrics."""
        purpose = DECODER if self.config.decoder_depth else ENCODER
        tower = self.decoder if self.config.decoder_depth else self.encoder
        context = context._replace(key=fold(context.key, purpose))
        return tower(self.tokens(inputs.tokens), inputs, context, caches)

    def encode(self, inputs: Inputs, key: jax.Array | None) -> tuple[jax.Array, Sums, Sums]:
        """Runs the encoder that the decoder reads: hidden states, losses, metrics."""
        context = Context(inputs.side, inputs.side, key=fold(key, ENCODER))
        hidden_BSD, _, losses, metrics = self.encoder(self.tokens(inputs.tokens), inputs, context, None)
        return hidden_BSD, losses, metrics

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """Returns f32[B, T, V] for hidden states of the main tower."""
        return self.head(hidden_BTD, self.tokens)

    def class_logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """Returns f32[B, T, X], class logits as if each position were the pooled one."""
        return self.classifier(hidden_BTD)

    def declare_all(self, batch: Batch) -> jax.Array:
        """Touches every parameter once, to have it declared."""
        inputs = main_inputs(batch)
        side = inputs.side
        context = Context(side, side)
        if self.config.encoder_depth and self.config.decoder_depth:
            memory_BSD, _, _ = self.encode(inputs, None)
            context = context._replace(memory_BSD=memory_BSD, memory=side)
        hidden_BTD, _, _, _ = self(inputs, context, None)
        if self.config.num_classes:
            self.class_logits(hidden_BTD)
        return self.logits(hidden_BTD) if self.config.predicts_tokens else hidden_BTD


def main_inputs(batch: Batch) -> Inputs:
    """Returns what the main tower reads."""
    slots = jnp.arange(batch.inputs.shape[1], dtype=jnp.int32)
    side = Side(batch.segment_ids, batch.positions, batch.bidirectional, slots)
    return Inputs(batch.inputs, side, batch.token_types, batch.block_positions)


def encoder_inputs(batch: Batch) -> Inputs:
    """Returns what the encoder of an encoder-decoder reads; all its positions see each other.

    Raises:
      ValueError: the batch lacks the encoder's fields.
    """
    segment_ids = batch.encoder_segment_ids
    if segment_ids is None or batch.encoder_positions is None or batch.encoder_inputs is None:
        raise ValueError("the model has an encoder; the batch has no encoder_inputs, segment ids and positions")
    slots = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    everywhere = jnp.ones(segment_ids.shape, jnp.bool_)
    return Inputs(batch.encoder_inputs, Side(segment_ids, batch.encoder_positions, everywhere, slots))
