"""Decoder-only models: GPT, Llama, PaLM, Gemma, Qwen and their kin, causal or with a bidirectional prefix.

Only defaults and the choice of tower; every variant is a field of `Transformer`.
"""

import dataclasses

from lm.models.transformer import Transformer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoder(Transformer):
    __doc__ = "Settings of a decoder-only model.\n" + (Transformer.__doc__ or "").partition("\n")[2]

    @property
    def decoder_depth(self) -> int:
        """Number of decoder blocks."""
        return self.num_layers
