"""The settings that all transformers share, and what follows from them.

Decoders, encoders and encoder-decoders differ in which towers they have and in defaults; everything
else is a field here. Knows no parameters. Law: a derived value is a property, and every field is read.
"""

import dataclasses
from typing import TYPE_CHECKING, Literal, TypeVar

import jax.numpy as jnp

from lm.document import Layout as ExampleLayout
from lm.models import accounting
from lm.models.block import PLACEMENTS
from lm.models.heads import HeadTransform
from lm.models.initializers import FanInInitializer, NormalInitializer
from lm.models.latent import Latent
from lm.models.layers import LayerNorm, RMSNorm
from lm.models.mlp import Activation, Mlp
from lm.models.moe import MixtureOfExperts
from lm.models.multihead import MultiHead
from lm.models.positions import Alibi, Bucketed, Learned, NoPositions, Relative, Rotary, Sinusoidal

if TYPE_CHECKING:
    from lm.models.model import Model

Config = TypeVar("Config")

PositionScheme = NoPositions | Learned | Sinusoidal | Rotary | Bucketed | Alibi | Relative


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """What one layer has of its own, in a stack whose layers differ.

    Attributes:
      window: how far the layer sees, in positions (see `lm.models.attention.Layout`); None is everywhere.
      positions: the layer's own rotation or bias; None means the model's.
      mlp: the layer's own feed-forward; None means the model's.
      normalize_attention: whether attention has the norm before it that the placement asks for (not in ModernBERT's
        first layer, which follows the norm of the embeddings).
    """

    window: int | None = None
    positions: NoPositions | Rotary | Alibi | None = None
    mlp: Mlp | MixtureOfExperts | None = None
    normalize_attention: bool = True


def document_fields(cls: type[Config]) -> type[Config]:
    """Appends the settings that all transformers share to the docstring of one kind, where `--help` looks for them."""
    heading = "\n\n    Attributes:\n"
    shared = (Transformer.__doc__ or "").partition(heading)[2]
    own, _, attributes = (cls.__doc__ or "").rstrip().partition(heading)
    cls.__doc__ = own + heading + (f"{attributes}\n" if attributes else "") + shared
    return cls


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transformer:
    """Settings that all transformers share; build a Decoder, an Encoder or an EncoderDecoder.

    Attributes:
      vocab_size: number of token ids.
      num_layers: number of blocks (of the decoder, where there is also an encoder).
      model_dim: width of the residual stream.
      num_heads: number of query heads.
      num_kv_heads: number of key and value heads; None means num_heads (MHA), 1 is MQA, between is GQA.
      head_dim: width of a head; None means model_dim / num_heads.
      mlp_dim: hidden units of the feed-forward layer.
      max_length: the longest sequence that is meant; rows of learned positions.
      norm: which normalisation.
      norm_placement: pre, post (2017), sandwich (Gemma 2: before and after each branch), branch (OLMo 2: after each
        branch) or deep (DeepNorm: post, with a weighted residual stream and smaller initial weights).
      positions: how positions enter.
      attention: settings of attention.
      mlp: settings of the feed-forward layer, dense or a mixture of experts.
      layers: the repeating pattern of layers.
      first_layers: layers before the pattern begins.
      parallel_block: whether attention and feed-forward read the same normalised input (PaLM).
      tied_embeddings: whether the output projection is the embedding table.
      head_bias: whether logits have a bias.
      head_transform: a dense layer, activation and norm before the output projection (BERT); None is none.
      num_classes: labels of the head on the pooled state, for sentence pairs; 0 is no such head.
      classifier_activation: nonlinearity of that head.
      num_token_types: rows of the table of token types (BERT's segments); 0 is no such table.
      num_block_positions: rows of the table of second positions, inside a blank (GLM); 0 is no such table.
      embedding_dim: width of the embedding table, if it is projected to model_dim (ALBERT); None means model_dim.
      embedding_norm: whether embeddings are normalised (BERT).
      scale_embeddings: whether embeddings are multiplied by sqrt(model_dim) (2017, Gemma).
      scale_logits: whether logits are divided by sqrt(model_dim) (T5 with tied embeddings).
      final_logit_softcap: bound on the logits, cap * tanh(logits / cap) (Gemma 2); None leaves them.
      initializer: how weights begin.
      dropout_rate: probability of dropping an element of the embeddings and of each branch's result.
      dtype: dtype of computation; parameters, norms, softmax and logits are float32.
      scan_layers: whether layers are a loop in the program (quick to compile) or written out.
      remat: what the backward pass keeps: all (none), only inputs of layers (full), or also products (dots,
        dots_no_batch).
      share_layers: whether all layers have the same weights (ALBERT).
    """

    vocab_size: int
    num_layers: int = 12
    model_dim: int = 768
    num_heads: int = 12
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mlp_dim: int = 3072
    max_length: int = 1024
    norm: RMSNorm | LayerNorm = RMSNorm()
    norm_placement: Literal["pre", "post", "sandwich", "branch", "deep"] = "pre"
    positions: PositionScheme = Rotary()
    attention: MultiHead | Latent = MultiHead()
    mlp: Mlp | MixtureOfExperts = Mlp()
    layers: tuple[Layer, ...] = (Layer(),)
    first_layers: tuple[Layer, ...] = ()
    parallel_block: bool = False
    tied_embeddings: bool = True
    head_bias: bool = False
    head_transform: HeadTransform | None = None
    num_classes: int = 0
    classifier_activation: Activation = "tanh"
    num_token_types: int = 0
    num_block_positions: int = 0
    embedding_dim: int | None = None
    embedding_norm: bool = False
    scale_embeddings: bool = False
    scale_logits: bool = False
    final_logit_softcap: float | None = None
    initializer: NormalInitializer | FanInInitializer = NormalInitializer()
    dropout_rate: float = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    scan_layers: bool = True
    remat: Literal["none", "full", "dots", "dots_no_batch"] = "none"
    share_layers: bool = False

    # Which towers there are; a family overrides these.
    @property
    def encoder_depth(self) -> int:
        """Number of encoder blocks."""
        return 0

    @property
    def decoder_depth(self) -> int:
        """Number of decoder blocks."""
        return 0

    @property
    def layout(self) -> ExampleLayout:
        """Which examples the towers read (see `lm.document.Traits.layouts`)."""
        if self.encoder_depth and self.decoder_depth:
            return "encoder_decoder"
        return "decoder" if self.decoder_depth else "encoder"

    @property
    def tells_order(self) -> bool:
        """Whether positions that see each other both ways can tell their order."""
        return any((layer.positions or self.positions).tells_order for layer in (*self.first_layers, *self.layers))

    @property
    def judges_replacements(self) -> bool:
        """Whether the model replaces hidden tokens and learns to find them (ELECTRA)."""
        return False

    @property
    def predicts_tokens(self) -> bool:
        """Whether there is a head that predicts tokens."""
        return True

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes of the letters in equations of weights."""
        return {
            "V": self.vocab_size,
            "D": self.model_dim,
            "N": self.num_heads,
            "K": self.num_heads if self.num_kv_heads is None else self.num_kv_heads,
            "H": self.model_dim // self.num_heads if self.head_dim is None else self.head_dim,
            "F": self.mlp_dim,
            "Z": self.model_dim,
        }

    @property
    def embedding_width(self) -> int:
        """Width of the embedding table."""
        return self.model_dim if self.embedding_dim is None else self.embedding_dim

    @property
    def compute_dtype(self) -> jnp.dtype:
        """The dtype of computation."""
        return jnp.dtype(self.dtype)

    @property
    def residual_layers(self) -> int:
        """Number of blocks that write to one residual stream, for initial weights that depend on depth."""
        return max(self.encoder_depth, self.decoder_depth)

    @property
    def final_norm(self) -> bool:
        """Whether a tower ends with a norm: where the residual stream itself is never normalised."""
        return not PLACEMENTS[self.norm_placement].after_sum

    def deep_norm(self, causal: bool) -> tuple[float, float]:
        """Returns DeepNorm's weight of the residual stream and gain of initial weights (Wang et al. 2022, figure 2).

        Args:
          causal: whether the tower is the decoder.
        """
        if self.norm_placement != "deep":
            return 1.0, 1.0
        encoder, decoder = self.encoder_depth, self.decoder_depth
        if not encoder or not decoder:
            return (2 * (encoder + decoder)) ** 0.25, (8 * (encoder + decoder)) ** -0.25
        if causal:
            return (3 * decoder) ** 0.25, (12 * decoder) ** -0.25
        mixed = (encoder**4 * decoder) ** (1 / 16)
        return 0.81 * mixed, 0.87 / mixed

    def runs(self, num_layers: int) -> list[tuple[str, tuple[Layer, ...], int]]:
        """Returns (name, layers of one repeat, repeats) for the runs of a stack, in order; repeats are 1 or more."""
        if self.share_layers:
            return [("layers", self.layers, num_layers // len(self.layers))]
        first = self.first_layers[:num_layers]
        repeats, rest = divmod(num_layers - len(first), len(self.layers))
        runs = [("first", first, 1), ("layers", self.layers, repeats), ("last", self.layers[:rest], 1)]
        return [run for run in runs if run[1] and run[2]]

    def layer_places(self, num_layers: int) -> list[tuple[str, str, int]]:
        """Returns for each layer in order (run, block, index into the leading axis): where its weights are."""
        return [
            (name, f"block_{block}", repeat)
            for name, layers, repeats in self.runs(num_layers)
            for repeat in range(repeats)
            for block in range(len(layers))
        ]

    def build(self) -> "Model":
        """Returns the model.

        Raises:
          ValueError: the settings cannot work; the message lists every reason.
        """
        from lm.models.model import Model

        problems = self.problems()
        if problems:
            raise ValueError("\n".join(problems))
        return Model(self)

    def num_parameters(self) -> int:
        """Counts the parameters, without allocating any."""
        return accounting.num_parameters(self.build().parameters())

    def num_active_parameters(self) -> int:
        """Counts the parameters that one token meets, without allocating any: not the experts that it does not."""
        return accounting.num_active_parameters(self.build().parameters())

    def cache_bytes_per_token(self) -> int:
        """Counts the bytes that each token of a decoder adds to the cache."""
        return accounting.cache_bytes_per_token(self)

    def flops_per_example(self, length: int, encoder_length: int | None = None) -> float:
        """Counts a training step's operations per sequence; arguments as of `flops_per_token`."""
        return length * self.flops_per_token(length, encoder_length)

    def flops_per_token(self, length: int, encoder_length: int | None = None) -> float:
        """Counts a training step's operations per token; `lm.models.accounting.flops_per_token` says how.

        Args:
          length: tokens of a sequence of the main tower (the decoder where there is one).
          encoder_length: tokens of the encoder's sequence, for an encoder-decoder.
        """
        return accounting.flops_per_token(self, self.build().parameters(), length, encoder_length)

    def problems(self) -> list[str]:
        """Returns one sentence for each reason why these settings cannot work; empty if none."""
        numbers = ("vocab_size", "num_layers", "model_dim", "num_heads", "mlp_dim", "max_length")
        optional = [name for name in ("num_kv_heads", "head_dim", "embedding_dim") if getattr(self, name) is not None]
        problems = [
            f"config.model.{name}: {getattr(self, name)} is not a positive number"
            for name in (*numbers, *optional)
            if getattr(self, name) < 1
        ]
        problems += [
            f"config.model.{name}: {getattr(self, name)} is negative"
            for name in ("num_classes", "num_token_types", "num_block_positions")
            if getattr(self, name) < 0
        ]
        if problems:
            return problems
        if self.embedding_dim is not None and self.head_transform is None and self.predicts_tokens:
            problems.append(
                "config.model.embedding_dim: the head must bring the model's width back to the embedding's; set"
                " head_transform"
            )
        if not 0 <= self.dropout_rate < 1:
            problems.append(f"config.model.dropout_rate: {self.dropout_rate} is not in [0, 1)")
        return problems + self.attention.problems(self) + self.mlp.problems(self) + self._layer_problems()

    def _layer_problems(self) -> list[str]:
        rotated = self.attention.rotated_width(self)
        problems = list(self.positions.problems(rotated))
        if not self.layers:
            problems.append("config.model.layers: the repeating pattern needs at least one layer")
        if isinstance(self.positions, Sinusoidal) and self.embedding_width % 2:
            problems.append(f"config.model.model_dim: {self.embedding_width} must be even for sinusoidal positions")
        for layer in (*self.first_layers, *self.layers):
            if layer.window is not None and layer.window < 1:
                problems.append(f"config.model.layers.window: {layer.window} is neither None nor a positive number")
            if layer.positions is not None:
                problems += layer.positions.problems(rotated)
            if layer.mlp is not None:
                problems += layer.mlp.problems(self)
        if self.share_layers and self.layers and (self.first_layers or self.num_layers % len(self.layers)):
            problems.append(
                "config.model.share_layers: shared layers must repeat the whole pattern; drop first_layers and make"
                f" num_layers a multiple of {len(self.layers)}"
            )
        return problems
