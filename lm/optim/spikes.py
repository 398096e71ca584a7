"""Whether a step's loss or gradient is out of bounds, told inside the step from a running median of the good ones.

Owns the bounds and their running figures, which are part of the train state, so that a run which goes on decides
alike. Knows no loop: what is done about a spike is the loop's. Law: a step that is out of bounds changes no bound.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class SpikeState(NamedTuple):
    """What the bounds are computed from.

    Attributes:
      losses: f32[window], of the last good steps, in no particular order.
      norms: f32[window], the gradient's norm at the same steps.
      count: i32[], good steps so far.
    """

    losses: Any
    norms: Any
    count: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bounds:
    """A step is a spike where its loss or its gradient's norm is more than a factor times the median of the window.

    Attributes:
      window: number of good steps whose median is taken; before there are so many, nothing is a spike.
      loss_factor: the loss may be so many times its median; none bounds no loss.
      norm_factor: the gradient's norm may be so many times its median; none bounds no norm.
    """

    window: int = 128
    loss_factor: float | None = 1.5
    norm_factor: float | None = 10.0

    @property
    def rolls_back(self) -> bool:
        """Whether a spike sends the run back to its last checkpoint."""
        return False

    def init(self) -> SpikeState:
        """Returns the state before the first step."""
        empty = jnp.zeros((self.window,), jnp.float32)
        return SpikeState(empty, jnp.zeros_like(empty), jnp.zeros((), jnp.int32))

    def judge(
        self, state: SpikeState, loss: jax.Array, norm: jax.Array, finite: jax.Array
    ) -> tuple[jax.Array, SpikeState]:
        """Returns bool[], whether a step is a spike, and the state after it; one that is not finite is none.

        Args:
          state: before the step.
          loss: f32[], of the step.
          norm: f32[], of its gradient, before clipping.
          finite: bool[], whether both are finite.
        """
        above = jnp.zeros((), jnp.bool_)
        for value, known, factor in (
            (loss, state.losses, self.loss_factor),
            (norm, state.norms, self.norm_factor),
        ):
            if factor is not None:
                above = above | (value > factor * jnp.median(known))
        spike = above & finite & (state.count >= self.window)
        good, place = finite & ~spike, state.count % self.window
        new = SpikeState(state.losses.at[place].set(loss), state.norms.at[place].set(norm), state.count + 1)
        return spike, jax.tree.map(lambda n, o: jnp.where(good, n, o), new, state)

    def problems(self) -> list[str]:
        """Returns one sentence for each reason why these settings cannot work; empty if none."""
        found = []
        if self.window < 1:
            found.append(f"health.spikes.window is a number of steps, got {self.window}")
        for name in ("loss_factor", "norm_factor"):
            factor = getattr(self, name)
            if factor is not None and factor <= 1:
                found.append(f"health.spikes.{name} is above 1 or none, got {factor}")
        if self.loss_factor is None and self.norm_factor is None:
            found.append("health.spikes bounds neither the loss nor the gradient: set a factor, or set it to none")
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Skip(Bounds):
    """Leaves the update of a spike out and goes on with the next batch.

    Attributes:
      window: number of good steps whose median is taken; before there are so many, nothing is a spike.
      loss_factor: the loss may be so many times its median; none bounds no loss.
      norm_factor: the gradient's norm may be so many times its median; none bounds no norm.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class RollBack(Bounds):
    """Goes back to the last checkpoint before a spike and on with the batch after it (PaLM, section 5.1).

    Attributes:
      max_times: roll backs to one checkpoint before the run stops.
      window: number of good steps whose median is taken; before there are so many, nothing is a spike.
      loss_factor: the loss may be so many times its median; none bounds no loss.
      norm_factor: the gradient's norm may be so many times its median; none bounds no norm.
    """

    max_times: int = 3

    @property
    def rolls_back(self) -> bool:
        """Whether a spike sends the run back to its last checkpoint."""
        return True

    def problems(self) -> list[str]:
        """Returns one sentence for each reason why these settings cannot work; empty if none."""
        found = super().problems()
        if self.max_times < 1:
            found.append(f"health.spikes.max_times is a number from 1 up, got {self.max_times}")
        return found
