"""Encoder-decoder models: the 2017 Transformer, T5, UL2, BART and their kin.

Only the choice of towers; every variant is a field of `Transformer` and holds for both. The towers share
the token table, and nothing else.
"""

import dataclasses

from lm.models.transformer import Transformer, document_fields


@document_fields
@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderDecoder(Transformer):
    """Settings of an encoder-decoder model.

    Attributes:
      num_encoder_layers: number of encoder blocks; None means num_layers.
    """

    num_encoder_layers: int | None = None

    @property
    def encoder_depth(self) -> int:
        """Number of encoder blocks."""
        return self.num_layers if self.num_encoder_layers is None else self.num_encoder_layers

    @property
    def decoder_depth(self) -> int:
        """Number of decoder blocks."""
        return self.num_layers

    def problems(self) -> list[str]:
        """Returns one sentence for each reason why these settings cannot work; empty if none."""
        if self.encoder_depth < 1:
            return [f"config.model.num_encoder_layers: {self.encoder_depth} is neither None nor a positive number"]
        problems = super().problems()
        if self.parallel_block:
            problems.append("config.model.parallel_block: cross attention needs sequential blocks; set it to false")
        if self.num_block_positions:
            problems.append("config.model.num_block_positions: an encoder's batch has no second positions; set it to 0")
        if self.share_layers and self.encoder_depth != self.decoder_depth:
            problems.append("config.model.share_layers: needs as many encoder layers as decoder layers")
        return problems
