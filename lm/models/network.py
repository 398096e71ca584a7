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
from lm.models.layers import Constant, Einsum, Norm, Table, declare, dropout, fold, match_rank, soft_cap
from lm.models.multihead import Context
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
    """

    tokens: Any
    side: Side


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
    def __call__(self, x_BTZ: jax.Array, context: Context, caches: Any) -> tuple[jax.Array, Any, Sums, Sums]:
        """Returns hidden states [B, T, D], caches, losses and metrics."""
        config = self.config
        places_BT = context.queries.positions
        if config.scale_embeddings:
            x_BTZ = x_BTZ * jnp.asarray(config.model_dim**0.5, x_BTZ.dtype)
        table = config.positions.table(config, name="positions")
        if table is not None:
            x_BTZ = x_BTZ + table(config.positions.rows(places_BT))
        waves_BTZ = config.positions.encode(places_BT, config.embedding_width)
        if waves_BTZ is not None:
            x_BTZ = x_BTZ + waves_BTZ.astype(x_BTZ.dtype)
        if config.embedding_norm:
            x_BTZ = Norm(config.norm, config.compute_dtype, name="embedding_norm")(x_BTZ)
        x_BTD = dropout(x_BTZ, config.dropout_rate, fold(context.key, EMBEDDING_DROPOUT))
        if config.embedding_dim is not None:
            sizes = (("Z", config.embedding_width),)
            x_BTD = Einsum("BTZ,ZD->BTD", config, True, sizes=sizes, name="embedding_projection")(x_BTD)
        x_BTD = constrain(x_BTD, "batch", "length", "activation_embed")
        stack = Stack(config, self.num_layers, self.causal, self.cross, name="stack")
        x_BTD, caches, losses, metrics = stack(x_BTD, context, caches)
        if config.final_norm:
            x_BTD = Norm(config.norm, config.compute_dtype, name="final_norm")(x_BTD)
        return x_BTD, caches, losses, metrics


class Head(nn.Module):
    """From hidden states to logits, by the embedding table or by a matrix of its own.

    Attributes:
      config: the model's settings.
    """

    config: "Transformer"

    @nn.compact
    def __call__(self, x_BTD: jax.Array, tokens: Table) -> jax.Array:
        """Returns f32[B, T, V]."""
        config = self.config
        if config.tied_embeddings:
            logits_BTV = tokens.attend("BTZ,VZ->BTV", x_BTD)
        else:
            logits_BTV = Einsum("BTD,DV->BTV", config, float32_result=True, name="projection")(x_BTD)
        if config.scale_logits:
            logits_BTV = logits_BTV * config.model_dim**-0.5
        if config.head_bias:
            bias_V = self.param("bias", declare((config.vocab_size,), ("vocab",), "bias", distribution=Constant(0.0)))
            logits_BTV = logits_BTV + match_rank(bias_V, 3)
        return constrain(soft_cap(logits_BTV, config.final_logit_softcap), "batch", "length", "activation_vocab")


class Network(nn.Module):
    """A token table, the towers that the settings ask for, and a head.

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
        self.head = Head(config)

    def __call__(self, inputs: Inputs, context: Context, caches: Any) -> tuple[jax.Array, Any, Sums, Sums]:
        """Runs the main tower, the decoder if there is one: hidden states, caches, losses, metrics."""
        purpose = DECODER if self.config.decoder_depth else ENCODER
        tower = self.decoder if self.config.decoder_depth else self.encoder
        context = context._replace(key=fold(context.key, purpose))
        return tower(self.tokens(inputs.tokens), context, caches)

    def encode(self, inputs: Inputs, key: jax.Array | None) -> tuple[jax.Array, Sums, Sums]:
        """Runs the encoder that the decoder reads: hidden states, losses, metrics."""
        context = Context(inputs.side, inputs.side, key=fold(key, ENCODER))
        hidden_BSD, _, losses, metrics = self.encoder(self.tokens(inputs.tokens), context, None)
        return hidden_BSD, losses, metrics

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """Returns f32[B, T, V] for hidden states of the main tower."""
        return self.head(hidden_BTD, self.tokens)

    def declare_all(self, batch: Batch) -> jax.Array:
        """Touches every parameter once, to have it declared."""
        side = main_side(batch)
        context = Context(side, side)
        if self.config.encoder_depth and self.config.decoder_depth:
            memory_BSD, _, _ = self.encode(Inputs(batch.inputs, side), None)
            context = context._replace(memory_BSD=memory_BSD, memory=side)
        hidden_BTD, _, _, _ = self(Inputs(batch.inputs, side), context, None)
        return self.logits(hidden_BTD)


def main_side(batch: Batch) -> Side:
    """Returns where the batch's main tokens stand."""
    slots = jnp.arange(batch.inputs.shape[1], dtype=jnp.int32)
    return Side(batch.segment_ids, batch.positions, batch.bidirectional, slots)


def encoder_side(batch: Batch) -> Side:
    """Returns where the encoder's tokens stand; all of them see each other."""
    segment_ids = batch.encoder_segment_ids
    if segment_ids is None or batch.encoder_positions is None:
        raise ValueError("the model has an encoder; the batch has no encoder_inputs, segment ids and positions")
    slots = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    return Side(segment_ids, batch.encoder_positions, jnp.ones(segment_ids.shape, jnp.bool_), slots)
