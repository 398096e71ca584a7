"""What is divided over a mesh: the choices that the sizes of its axes leave open, as rows of the sharding table.

Knows no model. Law: whatever is chosen, a run computes the same; only where arrays live differs.
"""

import dataclasses
from typing import Literal

from lm.parallel.axes import DEFAULT_RULES, LATENT_AXES, TOKEN_AXES, Rules
from lm.parallel.mesh import Pipeline


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sharding:
    """How the axes of the mesh are used. Known schemes, and their products, are these with sizes of the mesh:

        data parallel                mesh.data=8
        FSDP, ZeRO-3                 mesh.fsdp=8
        ZeRO-1                       mesh.data=8 sharding.divide=optimizer
        tensor parallel              mesh.tensor=8
        tensor + sequence parallel   mesh.tensor=8 sharding.sequence=True
        context parallel             mesh.context=8
        expert parallel              mesh.expert=8
        pipeline                     mesh.stage=4 sharding.pipeline.num_microbatches=8

    Attributes:
      divide: what devices that read different tokens divide: parameters with all that belongs to them (ZeRO-3; every
        axis but tensor and data), or optimizer state and averages only (ZeRO-1; data as well).
      sequence: whether the residual stream, between the branches of a block, is divided over tensor by its length.
      pipeline: how stages share a batch.
      max_replicated: elements of the largest parameter that may be whole on every device of a mesh that could divide
        it; a larger one is an error with its name.
      optimizer_on_host: whether the optimizer's state lies in the host's memory, but for the update, which reads all of
        it.
    """

    divide: Literal["parameters", "optimizer"] = "parameters"
    sequence: bool = False
    pipeline: Pipeline = Pipeline()
    max_replicated: int = 1 << 22
    optimizer_on_host: bool = False

    def rules(self) -> Rules:
        """Returns the sharding table."""
        parameters, activations = dict(DEFAULT_RULES.parameters), dict(DEFAULT_RULES.activations)
        optimizer = None
        if self.divide == "optimizer":
            optimizer = parameters | {"embed": (*TOKEN_AXES, "data"), "latent": (*LATENT_AXES, "data")}
            parameters |= {"embed": (), "latent": ()}
        if self.sequence:
            activations["residual_length"] = (*activations["residual_length"], "tensor")
        return Rules(parameters, activations, self.pipeline, optimizer, self.optimizer_on_host)
