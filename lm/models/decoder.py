"""Decoder-only models: GPT, Llama, PaLM, Gemma, Qwen and their kin, causal or with a bidirectional prefix.

Only defaults and the choice of tower; every variant is a field of `Transformer`.
"""

import dataclasses

from lm.models.transformer import Transformer, document_fields


@document_fields
@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoder(Transformer):
    """Settings of a decoder-only model."""

    @property
    def decoder_depth(self) -> int:
        """Number of decoder blocks."""
        return self.num_layers
