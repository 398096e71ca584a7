"""Encoder-only models: BERT, RoBERTa, ALBERT, ModernBERT and their kin.

Only the choice of tower; every variant is a field of `Transformer`. Every position sees its whole
segment, whatever the batch's `bidirectional` flags say.
"""

import dataclasses

from lm.models.generator import Generator
from lm.models.transformer import Transformer, document_fields


@document_fields
@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoder(Transformer):
    """Settings of an encoder-only model.

    Attributes:
      generator: a smaller encoder that replaces hidden tokens, for the model to find them (ELECTRA); None is none.
    """

    generator: Generator | None = None

    @property
    def encoder_depth(self) -> int:
        """Number of encoder blocks."""
        return self.num_layers

    @property
    def generator_settings(self) -> Transformer | None:
        """Settings of the generator's tower and head."""
        return None if self.generator is None else self.generator.settings(self)

    @property
    def detection_weight(self) -> float:
        """Coefficient of the loss of finding replaced tokens."""
        return 0.0 if self.generator is None else self.generator.detection_weight

    def problems(self) -> list[str]:
        """Returns one sentence for each reason why these settings cannot work; empty if none."""
        return super().problems() + ([] if self.generator is None else self.generator.problems(self))
