"""ELECTRA: a small generator fills what is masked, and a discriminator tells which tokens were replaced.

Two encoders composed from plain parameter trees; they share the tables and norm of the embeddings.
Knows no masking: the positions with loss weight are those that were masked, whoever masked them. Law: no
gradient passes from the discriminator to the generator but through the shared embeddings.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lm.batch import Batch, WeightedSum
from lm.models.encoder import Encoder
from lm.models.heads import HeadTransform
from lm.models.layers import fold
from lm.models.model import Cache, Model, Output, Parameters
from lm.models.transformer import document_fields

# Parts that the generator takes from the discriminator: within the tree, and within its encoder.
SHARED = ("tokens",)
SHARED_IN_ENCODER = ("positions", "types", "embedding_norm")
GENERATOR, SAMPLES, DISCRIMINATOR = 1, 2, 3


@document_fields
@dataclasses.dataclass(frozen=True, kw_only=True)
class Discriminator(Encoder):
    """Settings of the encoder that is kept: it says of each token whether it was replaced, and predicts none."""

    @property
    def predicts_tokens(self) -> bool:
        """Whether there is a head that predicts tokens."""
        return False


@document_fields
@dataclasses.dataclass(frozen=True, kw_only=True)
class Electra(Encoder):
    """Settings of ELECTRA (Clark et al. 2020): those of the discriminator, and how the generator differs.

    Attributes:
      generator_dim: width of the generator's residual stream.
      generator_heads: number of the generator's heads.
      generator_mlp_dim: hidden units of the generator's feed-forward layer.
      generator_layers: number of the generator's blocks.
      discriminator_weight: coefficient of the discriminator's loss (section 3.1: 50).
    """

    generator_dim: int = 192
    generator_heads: int = 3
    generator_mlp_dim: int = 768
    generator_layers: int = 12
    discriminator_weight: float = 50.0

    @property
    def judges_replacements(self) -> bool:
        """Whether the model replaces hidden tokens and learns to find them."""
        return True

    @property
    def discriminator(self) -> Discriminator:
        """The encoder that is kept, with one class for each position: replaced."""
        return Discriminator(**self._shared | {"num_classes": 1, "classifier_activation": "gelu"})

    @property
    def generator(self) -> Encoder:
        """The small masked language model."""
        width = self.embedding_width
        settings = {
            "num_classes": 0,
            "model_dim": self.generator_dim,
            "num_heads": self.generator_heads,
            "num_kv_heads": None,
            "head_dim": None,
            "mlp_dim": self.generator_mlp_dim,
            "num_layers": self.generator_layers,
            "embedding_dim": None if self.generator_dim == width else width,
            "head_transform": self.head_transform or HeadTransform(),
            "head_bias": True,
        }
        return Encoder(**self._shared | settings)

    @property
    def _shared(self) -> dict[str, Any]:
        """The settings that the two have in common, by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(Encoder)}

    def build(self) -> "ElectraModel":
        """Returns the pair.

        Raises:
          ValueError: the settings cannot work; the message lists every reason.
        """
        problems = self.problems()
        if problems:
            raise ValueError("\n".join(problems))
        return ElectraModel(self)

    def flops_per_token(self, length: int, encoder_length: int | None = None) -> float:
        """Counts a training step's operations per token, of both encoders."""
        pair = (self.generator, self.discriminator)
        return sum(config.flops_per_token(length, encoder_length) for config in pair)

    def problems(self) -> list[str]:
        """Returns one sentence for each reason why these settings cannot work; empty if none."""
        problems = [
            f"config.model.{name}: {getattr(self, name)} is not a positive number"
            for name in ("generator_dim", "generator_heads", "generator_mlp_dim", "generator_layers")
            if getattr(self, name) < 1
        ]
        problems = problems or self.generator.problems()
        return list(dict.fromkeys([*self.discriminator.problems(), *problems]))


@dataclasses.dataclass(frozen=True)
class ElectraModel(Model):
    """The pair as one model: hidden states and logits are the generator's, the discriminator's loss is its own.

    Attributes:
      config: the settings.
    """

    config: Electra

    @property
    def generator(self) -> Model:
        """The generator; `generator_params` are its parameters."""
        return Model(self.config.generator)

    @property
    def discriminator(self) -> Model:
        """The discriminator; `params["discriminator"]` are its parameters."""
        return Model(self.config.discriminator)

    def parameters(self) -> Any:
        """Returns the tree of both: `generator`, without what it shares, and `discriminator`."""
        generator = {name: part for name, part in self.generator.parameters().items() if name not in SHARED}
        encoder = {name: part for name, part in generator["encoder"].items() if name not in SHARED_IN_ENCODER}
        return {"generator": generator | {"encoder": encoder}, "discriminator": self.discriminator.parameters()}

    def generator_params(self, params: Parameters) -> Parameters:
        """Returns the generator's whole tree, with what it shares."""
        own, other = params["generator"], params["discriminator"]
        shared = {name: other["encoder"][name] for name in SHARED_IN_ENCODER if name in other["encoder"]}
        return own | {name: other[name] for name in SHARED} | {"encoder": own["encoder"] | shared}

    def apply(
        self,
        params: Parameters,
        batch: Batch,
        *,
        key: jax.Array | None = None,
        cache: Cache | None = None,
        with_logits: bool = True,
    ) -> Output:
        """Runs both: the generator on the batch, the discriminator on samples where the loss has weight.

        Args:
          params: as from `init`.
          batch: as of a masked language model; `weights` are positive where a token was hidden.
          key: PRNG key for dropout and samples; None drops nothing and draws the same samples each time.
          cache: must be None.
          with_logits: whether the generator's logits are wanted.
        """
        if cache is not None:
            raise ValueError("an encoder has no cache")
        generator = self.generator
        own = self.generator_params(params)
        made = generator.apply(own, batch, key=fold(key, GENERATOR), with_logits=False)
        logits_BTV = generator.logits(own, made.hidden)
        sample_key = jax.random.key(0) if key is None else jax.random.fold_in(key, SAMPLES)
        samples_BT = jax.random.categorical(sample_key, jax.lax.stop_gradient(logits_BTV), axis=-1)
        hidden_BT = batch.weights > 0
        original_BT = jnp.where(hidden_BT, batch.targets, batch.inputs)
        filled_BT = jnp.where(hidden_BT, samples_BT.astype(batch.inputs.dtype), batch.inputs)
        seen = self._discriminate(params, batch._replace(inputs=filled_BT), original_BT, key)
        return made._replace(
            logits=logits_BTV if with_logits else None,
            losses=made.losses | seen.losses,
            metrics=made.metrics | seen.metrics,
            statistics={"generator": made.statistics, "discriminator": seen.statistics},
        )

    def _discriminate(self, params: Parameters, batch: Batch, original_BT: jax.Array, key: jax.Array | None) -> Output:
        """Returns the discriminator's output with its loss, over every token, and how often it is right."""
        unlabelled = batch._replace(label_targets=None)
        own, model = params["discriminator"], self.discriminator
        seen = model.apply(own, unlabelled, key=fold(key, DISCRIMINATOR), with_logits=False)
        logits_BT = model.class_logits(own, seen.hidden)[:, :, 0]
        replaced_BT = batch.inputs != original_BT
        nll_BT = jax.nn.softplus(jnp.where(replaced_BT, -logits_BT, logits_BT))
        tokens_BT = (batch.segment_ids != 0).astype(jnp.float32)
        count = jnp.sum(tokens_BT)
        right_BT = ((logits_BT > 0) == replaced_BT).astype(jnp.float32)
        loss = WeightedSum(self.config.discriminator_weight * jnp.sum(nll_BT * tokens_BT), count)
        metrics = {
            "discriminator_accuracy": WeightedSum(jnp.sum(right_BT * tokens_BT), count),
            "replaced": WeightedSum(jnp.sum(replaced_BT * tokens_BT), count),
        }
        return seen._replace(losses={"discriminator": loss} | seen.losses, metrics=metrics | seen.metrics)

    def loss_weights(self, batch: Batch) -> dict[str, jax.Array]:
        """Returns the number of tokens, by which the discriminator's loss is divided."""
        return {"discriminator": jnp.sum(batch.segment_ids != 0).astype(jnp.float32)}

    def logits(self, params: Parameters, hidden: jax.Array) -> jax.Array:
        """Returns the generator's f32[B, T, V] for its hidden states [B, T, D]."""
        return self.generator.logits(self.generator_params(params), hidden)

    def class_logits(self, params: Parameters, hidden: jax.Array) -> jax.Array:
        """Returns f32[B, T, 1], how likely each token was replaced, for hidden states of the discriminator."""
        return self.discriminator.class_logits(params["discriminator"], hidden)
