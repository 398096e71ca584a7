"""Encoder-only models: BERT, RoBERTa, ALBERT, ModernBERT and their kin.

Only the choice of tower; every variant is a field of `Transformer`. Every position sees its whole
segment, whatever the batch's `bidirectional` flags say.
"""

import dataclasses

from lm.models.transformer import Transformer, document_fields


@document_fields
@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoder(Transformer):
    """Settings of an encoder-only model."""

    @property
    def encoder_depth(self) -> int:
        """Number of encoder blocks."""
        return self.num_layers
