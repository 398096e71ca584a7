"""Heads: from hidden states to logits of tokens, and from the pooled state to logits of classes.

Knows no loss but that of labels, which belong to examples and not to tokens. Law: a head works position
by position, so any chunking gives the same numbers.
"""

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm.batch import Batch, WeightedSum
from lm.models.initializers import Constant
from lm.models.layers import Einsum, Norm, Table, declare, match_rank, soft_cap
from lm.models.mlp import ACTIVATIONS, Activation
from lm.parallel import constrain

if TYPE_CHECKING:
    from lm.models.transformer import Transformer


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadTransform:
    """A dense layer, an activation and a norm before the output projection (BERT's masked language model head).

    Attributes:
      activation: the nonlinearity.
      use_bias: whether the dense layer has a bias.
    """

    activation: Activation = "gelu"
    use_bias: bool = True


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
        sizes = (("Z", config.embedding_width),)
        x_BTZ = x_BTD
        if config.head_transform is not None:
            dense = Einsum("BTD,DZ->BTZ", config, config.head_transform.use_bias, sizes=sizes, name="dense")
            x_BTZ = ACTIVATIONS[config.head_transform.activation](dense(x_BTD))
            x_BTZ = Norm(config.norm, config.compute_dtype, name="norm")(x_BTZ)
        if config.tied_embeddings:
            logits_BTV = tokens.attend("BTZ,VZ->BTV", x_BTZ)
        else:
            projection = Einsum("BTZ,ZV->BTV", config, sizes=sizes, float32_result=True, name="projection")
            logits_BTV = projection(x_BTZ)
        if config.scale_logits:
            logits_BTV = logits_BTV * config.model_dim**-0.5
        if config.head_bias:
            bias_V = self.param("bias", declare((config.vocab_size,), ("vocab",), "bias", distribution=Constant(0.0)))
            logits_BTV = logits_BTV + match_rank(bias_V, 3)
        return constrain(soft_cap(logits_BTV, config.final_logit_softcap), "batch", "length", "activation_vocab")


class Classifier(nn.Module):
    """From a state to logits of classes: dense, activation, dense (BERT's pooler, ELECTRA's discriminator).

    Attributes:
      config: the model's settings.
    """

    config: "Transformer"

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Returns f32[B, T, X], class logits of each position, as if it were the pooled one."""
        config = self.config
        pooler = Einsum("BTD,DZ->BTZ", config, True, name="pooler")
        pooled_BTZ = ACTIVATIONS[config.classifier_activation](pooler(x_BTD))
        sizes = (("X", config.num_classes),)
        return Einsum("BTZ,ZX->BTX", config, True, sizes=sizes, float32_result=True, name="projection")(pooled_BTZ)


def label_sums(logits_BTX: jax.Array, batch: Batch) -> tuple[WeightedSum, WeightedSum]:
    """Returns the cross-entropy of the examples' labels, in nats, and their accuracy, summed with their weights."""
    if batch.label_targets is None or batch.label_weights is None:
        raise ValueError("label_sums needs a batch with label_targets and label_weights")
    # Elsewhere the targets are not classes.
    targets_BT = jnp.where(batch.label_weights > 0, batch.label_targets, 0)
    picked_BT = jnp.take_along_axis(logits_BTX, targets_BT[:, :, None], axis=-1)[:, :, 0]
    nll_BT = jax.nn.logsumexp(logits_BTX, axis=-1) - picked_BT
    right_BT = (jnp.argmax(logits_BTX, axis=-1) == targets_BT).astype(jnp.float32)
    weight = jnp.sum(batch.label_weights)
    loss = WeightedSum(jnp.sum(nll_BT * batch.label_weights), weight)
    return loss, WeightedSum(jnp.sum(right_BT * batch.label_weights), weight)
