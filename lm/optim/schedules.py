"""Schedules: the factor, between 0 and 1, by which step n multiplies the peak learning rate.

Each is a frozen dataclass with `build(num_steps) -> optax.Schedule`. Knows no optimizer. Laws: the
factor is 1 at its highest, is continuous, and stays at its final value after the last step. Steps
count the updates already made, so the first update is step 0; its warm-up factor is not 0.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import optax


def _warmup(step: jax.typing.ArrayLike, warmup_steps: int) -> jax.Array:
    """Returns (n + 1) / (warmup_steps + 1), at most 1: it is 1 at n = warmup_steps, where decay starts."""
    return jnp.minimum(1.0, (jnp.asarray(step, jnp.float32) + 1) / (warmup_steps + 1))


def _progress(step: jax.typing.ArrayLike, start: int, stop: int) -> jax.Array:
    """Returns how far `step` is from `start` (0) to `stop` (1), clamped."""
    return jnp.clip((jnp.asarray(step, jnp.float32) - start) / max(stop - start, 1), 0.0, 1.0)


def _warmup_problems(warmup_steps: int, num_steps: int) -> list[str]:
    if warmup_steps < 0:
        return [f"schedule.warmup_steps is {warmup_steps}; it is 0 or more"]
    if warmup_steps >= num_steps > 0:
        return [f"schedule.warmup_steps is {warmup_steps}, but the run has only {num_steps} steps; lower it"]
    return []


def _final_problems(final_factor: float) -> list[str]:
    return [] if 0 <= final_factor <= 1 else [f"schedule.final_factor is {final_factor}; it is between 0 and 1"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant:
    """The peak, after a linear warm-up.

    Attributes:
      warmup_steps: steps of linear warm-up.
    """

    warmup_steps: int = 0

    def build(self, num_steps: int) -> optax.Schedule:
        """Returns step -> factor for a run of `num_steps`."""
        del num_steps
        return lambda step: _warmup(step, self.warmup_steps)

    def problems(self, num_steps: int) -> list[str]:
        """Returns why the schedule cannot serve a run of `num_steps`."""
        return _warmup_problems(self.warmup_steps, num_steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine:
    """Half a cosine from the peak to the final factor at the last step (Loshchilov and Hutter, 2017).

    Attributes:
      warmup_steps: steps of linear warm-up.
      final_factor: fraction of the peak at the end.
    """

    warmup_steps: int = 0
    final_factor: float = 0.1

    def build(self, num_steps: int) -> optax.Schedule:
        """Returns step -> factor for a run of `num_steps`."""

        def factor(step: jax.typing.ArrayLike) -> jax.Array:
            cosine = 0.5 * (1 + jnp.cos(jnp.pi * _progress(step, self.warmup_steps, num_steps)))
            return _warmup(step, self.warmup_steps) * (self.final_factor + (1 - self.final_factor) * cosine)

        return factor

    def problems(self, num_steps: int) -> list[str]:
        """Returns why the schedule cannot serve a run of `num_steps`."""
        return _warmup_problems(self.warmup_steps, num_steps) + _final_problems(self.final_factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """A straight line from the peak to the final factor at the last step.

    Attributes:
      warmup_steps: steps of linear warm-up.
      final_factor: fraction of the peak at the end.
    """

    warmup_steps: int = 0
    final_factor: float = 0.0

    def build(self, num_steps: int) -> optax.Schedule:
        """Returns step -> factor for a run of `num_steps`."""

        def factor(step: jax.typing.ArrayLike) -> jax.Array:
            decay = 1 - (1 - self.final_factor) * _progress(step, self.warmup_steps, num_steps)
            return _warmup(step, self.warmup_steps) * decay

        return factor

    def problems(self, num_steps: int) -> list[str]:
        """Returns why the schedule cannot serve a run of `num_steps`."""
        return _warmup_problems(self.warmup_steps, num_steps) + _final_problems(self.final_factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmupStableDecay:
    """Warm-up, a constant stretch, and a short decay at the end (WSD; Hu et al., 2024, MiniCPM).

    Attributes:
      warmup_steps: steps of linear warm-up.
      decay_steps: length of the decay that ends at the last step.
      final_factor: fraction of the peak at the end.
      shape: linear, or one_minus_sqrt (Haegele et al., 2024, section 3), which falls faster at first.
    """

    warmup_steps: int = 0
    decay_steps: int = 1000
    final_factor: float = 0.0
    shape: Literal["linear", "one_minus_sqrt"] = "linear"

    def build(self, num_steps: int) -> optax.Schedule:
        """Returns step -> factor for a run of `num_steps`."""
        power = 1.0 if self.shape == "linear" else 0.5

        def factor(step: jax.typing.ArrayLike) -> jax.Array:
            fallen = _progress(step, num_steps - self.decay_steps, num_steps) ** power
            return _warmup(step, self.warmup_steps) * (1 - (1 - self.final_factor) * fallen)

        return factor

    def problems(self, num_steps: int) -> list[str]:
        """Returns why the schedule cannot serve a run of `num_steps`."""
        problems = _final_problems(self.final_factor)
        if self.decay_steps < 1:
            problems.append(f"schedule.decay_steps is {self.decay_steps}; it is 1 or more")
        elif self.warmup_steps >= 0 and self.warmup_steps + self.decay_steps > num_steps > 0:
            # Also where the warm-up alone is too long: one cause, one sentence.
            return [
                f"schedule.warmup_steps {self.warmup_steps} and schedule.decay_steps {self.decay_steps} together "
                f"exceed the run's {num_steps} steps; lower them, or raise num_steps",
                *problems,
            ]
        return _warmup_problems(self.warmup_steps, num_steps) + problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class InverseSquareRoot:
    """sqrt(plateau / max(n, plateau)); T5's 1 / sqrt(max(n, 10^4)) is a peak of 0.01 with the defaults.

    Source: Raffel et al., 2020, section 3.1.2. The Transformer's schedule (Vaswani et al., 2017,
    section 5.3) is `warmup_steps` = `plateau_steps`.

    Attributes:
      warmup_steps: steps of linear warm-up.
      plateau_steps: steps during which the factor is 1.
    """

    warmup_steps: int = 0
    plateau_steps: int = 10_000

    def build(self, num_steps: int) -> optax.Schedule:
        """Returns step -> factor; it does not depend on `num_steps`."""
        del num_steps

        def factor(step: jax.typing.ArrayLike) -> jax.Array:
            decay = jnp.sqrt(self.plateau_steps / jnp.maximum(jnp.asarray(step, jnp.float32), self.plateau_steps))
            return _warmup(step, self.warmup_steps) * decay

        return factor

    def problems(self, num_steps: int) -> list[str]:
        """Returns why the schedule cannot serve a run of `num_steps`."""
        problems = _warmup_problems(self.warmup_steps, num_steps)
        if self.plateau_steps < 1:
            problems.append(f"schedule.plateau_steps is {self.plateau_steps}; it is 1 or more")
        return problems


Schedule = Constant | Cosine | Linear | WarmupStableDecay | InverseSquareRoot
