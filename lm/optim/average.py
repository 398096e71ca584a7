"""An exponential moving average of the parameters, for evaluation and sampling.

A tree like the parameters that the train state carries beside them; it is no part of the optimizer.
Law: the average of constant parameters is those parameters.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Average:
    """Keeps average <- decay * average + (1 - decay) * parameters, in float32.

    Attributes:
      decay: weight of the past, below 1.
      warmup: let the decay grow as (1 + n) / (10 + n), so that the start is forgotten soon.
    """

    decay: float = 0.9999
    warmup: bool = True

    def init(self, params: Any) -> Any:
        """Returns the average after no update: a float32 copy, never the same buffers, of `params`."""
        return jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params)

    def update(self, average: Any, params: Any, step: jax.typing.ArrayLike) -> Any:
        """Returns the average after update number `step` (from 0) made `params`."""
        step = jnp.asarray(step, jnp.float32)
        decay = jnp.minimum(self.decay, (1 + step) / (10 + step)) if self.warmup else jnp.float32(self.decay)
        # a + (1 - d)(p - a) and not d a + (1 - d) p: exact when p equals a.
        return jax.tree.map(lambda a, p: a + (1 - decay) * (p.astype(jnp.float32) - a), average, params)

    def problems(self) -> list[str]:
        """Returns why these settings cannot work."""
        return [] if 0 <= self.decay < 1 else [f"optimizer.average.decay is {self.decay}; it is at least 0 and below 1"]
