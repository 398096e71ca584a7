"""Replaced-token detection: a small encoder replaces hidden tokens, the model finds which ones (ELECTRA).

Owns the generator's settings, the replacement and the detector's loss; both encoders are ordinary towers
that share the token table. Law: a token that is drawn right is original, not replaced, and no gradient
goes from the detector to the generator but through that table.
"""

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm.batch import Batch, WeightedSum
from lm.models.heads import HeadTransform
from lm.models.layers import Einsum
from lm.models.mlp import ACTIVATIONS

if TYPE_CHECKING:
    from lm.models.encoder import Encoder
    from lm.models.transformer import Transformer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generator:
    """Settings of the encoder that replaces tokens (Clark et al. 2020, section 3.2: a quarter to a half of the size).

    All else is as in the model itself. The token table is shared; unlike there, positions are not.

    Attributes:
      model_dim: width of its residual stream.
      num_heads: number of its query heads.
      mlp_dim: hidden units of its feed-forward layer.
      num_layers: number of its blocks; None means the model's.
      detection_weight: coefficient of the detector's loss, beside the generator's own of 1.
    """

    model_dim: int = 256
    num_heads: int = 4
    mlp_dim: int = 1024
    num_layers: int | None = None
    detection_weight: float = 50.0

    def settings(self, config: "Encoder") -> "Transformer":
        """Returns the settings of the generator's tower and head in the model of `config`."""
        projected = None if config.embedding_width == self.model_dim else config.embedding_width
        return dataclasses.replace(
            config,
            model_dim=self.model_dim,
            num_heads=self.num_heads,
            num_kv_heads=None,
            head_dim=None,
            mlp_dim=self.mlp_dim,
            num_layers=config.num_layers if self.num_layers is None else self.num_layers,
            embedding_dim=projected,
            head_transform=config.head_transform or HeadTransform(),
            generator=None,
        )

    def problems(self, config: "Encoder") -> list[str]:
        """Returns one sentence for each reason why this cannot work."""
        found = [
            f"config.model.generator.{name}: {getattr(self, name)} is not a positive number"
            for name in ("model_dim", "num_heads", "mlp_dim", "num_layers")
            if getattr(self, name) is not None and getattr(self, name) < 1
        ]
        if not found and self.model_dim % self.num_heads:
            found.append(
                f"config.model.generator.num_heads: {self.num_heads} does not divide its model_dim {self.model_dim}"
            )
        if self.detection_weight <= 0:
            found.append(f"config.model.generator.detection_weight: {self.detection_weight} must be above 0")
        if config.num_classes:
            found.append("config.model.generator: a model with one has no pooled head; set num_classes to 0")
        return found


class Detector(nn.Module):
    """From hidden states to the logit that the token was replaced: dense, GELU, dense (ELECTRA's discriminator head).

    Attributes:
      config: the model's settings.
    """

    config: "Transformer"

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Returns f32[B, T]."""
        x_BTZ = ACTIVATIONS["gelu"](Einsum("BTD,DZ->BTZ", self.config, True, name="dense")(x_BTD))
        projection = Einsum("BTZ,ZX->BTX", self.config, True, sizes=(("X", 1),), float32_result=True, name="projection")
        return projection(x_BTZ)[:, :, 0]


def replace_tokens(logits_BTV: jax.Array, batch: Batch, key: jax.Array) -> jax.Array:
    """Returns i32[B, T]: the originals, but draws from the generator where the loss weight is above 0."""
    drawn_BT = jax.random.categorical(key, jax.lax.stop_gradient(logits_BTV)).astype(jnp.int32)
    return jnp.where(batch.weights > 0, drawn_BT, batch.targets)


def detection_sums(logits_BT: jax.Array, replaced_BT: jax.Array, batch: Batch) -> tuple[WeightedSum, WeightedSum]:
    """Returns the detector's binary cross-entropy over all tokens, in nats, and its accuracy."""
    is_replaced_BT = replaced_BT != batch.targets
    valid_BT = (batch.segment_ids != 0).astype(jnp.float32)
    # log(1 + exp(-z)) for replaced tokens, log(1 + exp(z)) for originals.
    nll_BT = jax.nn.softplus(jnp.where(is_replaced_BT, -logits_BT, logits_BT))
    right_BT = ((logits_BT > 0) == is_replaced_BT).astype(jnp.float32)
    weight = jnp.sum(valid_BT)
    return WeightedSum(jnp.sum(nll_BT * valid_BT), weight), WeightedSum(jnp.sum(right_BT * valid_BT), weight)
