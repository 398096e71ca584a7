"""Update rules: from gradient to direction. The learning rate, decay and clipping are not theirs.

Each is a frozen dataclass with `build(roles) -> optax.GradientTransformation`, which returns the
direction to subtract, before the learning rate. Knows no schedule and no model. Law: a rule acts on
stacked layers as on each layer alone.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from lm.optim.factored import clip_by_block_rms, scale_by_block_rms, scale_by_factored_rms
from lm.optim.quantized import SMALLEST_BLOCK, scale_by_quantized_adam
from lm.optim.roles import Role


def _decay_problems(rule: Any, *names: str) -> list[str]:
    """Returns a sentence for each named field that is no decay rate."""
    values = {name: getattr(rule, name) for name in names}
    return [
        f"optimizer.rule.{name} is {v}; it is at least 0 and below 1" for name, v in values.items() if not 0 <= v < 1
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW:
    """Adam; with the optimizer's weight decay, which is decoupled, AdamW (Loshchilov and Hutter, 2019).

    Attributes:
      b1: decay of the mean of the gradient.
      b2: decay of the mean of its square.
      epsilon: added to the root of the latter.
      mean_dtype: dtype in which the mean is kept; bfloat16 saves a quarter of the state. The mean square stays
        float32: at b2 = 0.999 bfloat16 would round its changes away.
    """

    b1: float = 0.9
    b2: float = 0.95
    epsilon: float = 1e-8
    mean_dtype: Literal["float32", "bfloat16"] = "float32"

    def build(self, roles: Any) -> optax.GradientTransformation:
        """Returns the rule for parameters with these roles."""
        del roles
        return optax.scale_by_adam(self.b1, self.b2, self.epsilon, mu_dtype=jnp.dtype(self.mean_dtype))

    def problems(self) -> list[str]:
        """Returns why these settings cannot work."""
        return _decay_problems(self, "b1", "b2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW8Bit:
    """AdamW that keeps both moments of matrices in 8 bits (Dettmers et al., 2022); see `lm.optim.quantized`.

    Attributes:
      b1: decay of the mean of the gradient.
      b2: decay of the mean of its square.
      epsilon: added to the root of the latter.
      block: most elements along a matrix's last axis that share a scale: the axis is cut into blocks of its largest
        divisor from 32 up to this; where it has none, the whole axis is one block.
    """

    b1: float = 0.9
    b2: float = 0.95
    epsilon: float = 1e-8
    block: int = 256

    def build(self, roles: Any) -> optax.GradientTransformation:
        """Returns the rule for parameters with these roles."""
        return scale_by_quantized_adam(roles, self.b1, self.b2, self.epsilon, self.block)

    def problems(self) -> list[str]:
        """Returns why these settings cannot work."""
        problems = _decay_problems(self, "b1", "b2")
        if self.block < SMALLEST_BLOCK:
            problems.append(f"optimizer.rule.block is {self.block}; it is {SMALLEST_BLOCK} or more")
        return problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adafactor:
    """Adafactor with relative steps (Shazeer and Stern, 2018), as T5 used it; see `lm.optim.factored`.

    Attributes:
      decay_rate: the second moment's decay at update t is 1 - t^-decay_rate.
      clip_threshold: largest root mean square of an update; None for no clipping.
      scale_by_parameter: multiply by the parameter's root mean square, so the rate is relative.
      min_parameter_scale: the least such factor.
      momentum: decay of a mean of the updates; None for none, which saves its memory.
      min_size_to_factor: a matrix with a side below this keeps its whole second moment.
      epsilon: added to the squared gradient.
    """

    decay_rate: float = 0.8
    clip_threshold: float | None = 1.0
    scale_by_parameter: bool = True
    min_parameter_scale: float = 1e-3
    momentum: float | None = None
    min_size_to_factor: int = 128
    epsilon: float = 1e-30

    def build(self, roles: Any) -> optax.GradientTransformation:
        """Returns the rule for parameters with these roles."""
        steps = [scale_by_factored_rms(roles, self.decay_rate, self.epsilon, self.min_size_to_factor)]
        if self.clip_threshold is not None:
            steps.append(clip_by_block_rms(roles, self.clip_threshold))
        if self.scale_by_parameter:
            steps.append(scale_by_block_rms(roles, self.min_parameter_scale))
        if self.momentum is not None:
            steps.append(optax.ema(self.momentum, debias=False))
        return optax.chain(*steps)

    def problems(self) -> list[str]:
        """Returns why these settings cannot work."""
        problems = [] if self.momentum is None else _decay_problems(self, "momentum")
        if self.decay_rate <= 0:
            problems.append(f"optimizer.rule.decay_rate is {self.decay_rate}; it is above 0")
        if self.clip_threshold is not None and self.clip_threshold <= 0:
            problems.append(f"optimizer.rule.clip_threshold is {self.clip_threshold}; it is above 0, or None")
        return problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lion:
    """The sign of an interpolated momentum (Chen et al., 2023); wants a rate 3 to 10 times below AdamW's.

    Attributes:
      b1: weight of the momentum in the update.
      b2: decay of the momentum.
    """

    b1: float = 0.9
    b2: float = 0.99

    def build(self, roles: Any) -> optax.GradientTransformation:
        """Returns the rule for parameters with these roles."""
        del roles
        return optax.scale_by_lion(self.b1, self.b2)

    def problems(self) -> list[str]:
        """Returns why these settings cannot work."""
        return _decay_problems(self, "b1", "b2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SGD:
    """The gradient, or its trace (sum with decay) when there is momentum.

    Attributes:
      momentum: decay of the trace; 0 keeps no state.
      nesterov: look one step ahead.
    """

    momentum: float = 0.0
    nesterov: bool = False

    def build(self, roles: Any) -> optax.GradientTransformation:
        """Returns the rule for parameters with these roles."""
        del roles
        return optax.trace(self.momentum, self.nesterov) if self.momentum else optax.identity()

    def problems(self) -> list[str]:
        """Returns why these settings cannot work."""
        problems = _decay_problems(self, "momentum")
        if self.nesterov and not self.momentum:
            problems.append("optimizer.rule.nesterov needs optimizer.rule.momentum above 0")
        return problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class Muon:
    """Orthogonalised momentum for the matrices, Adam for tables (embeddings, heads) and vectors.

    Source: Jordan et al., 2024; `consistent_rms` from Liu et al., 2025 (Moonlight), section 2.2,
    with which AdamW's learning rate and weight decay carry over.

    Attributes:
      momentum: decay of the mean of the gradient.
      nesterov: look one step ahead.
      num_iterations: Newton-Schulz iterations.
      consistent_rms: scale updates by this times sqrt(max(fan_in, fan_out)); None for
        sqrt(max(1, fan_out / fan_in)).
      others: the rule for what is no matrix.
      others_rate: its learning rate, as a multiple of the optimizer's.
    """

    momentum: float = 0.95
    nesterov: bool = True
    num_iterations: int = 5
    consistent_rms: float | None = 0.2
    others: AdamW = AdamW()
    others_rate: float = 1.0

    def build(self, roles: Any) -> optax.GradientTransformation:
        """Returns the rule for parameters with these roles."""
        masked = jax.tree.map(lambda role: role if role.kind == "matrix" else optax.MaskedNode(), roles)
        numbers = jax.tree.map(lambda role: MuonDimensionNumbers(role.rows, role.columns), masked)
        matrices = optax.chain(
            scale_by_muon(
                beta=self.momentum,
                nesterov=self.nesterov,
                ns_steps=self.num_iterations,
                weight_dimension_numbers=numbers,
            ),
            optax.stateless(lambda updates, _: jax.tree.map(self._scaled, updates, masked)),
        )
        others = optax.chain(self.others.build(roles), optax.scale(self.others_rate))
        labels = jax.tree.map(lambda role: "matrices" if role.kind == "matrix" else "others", roles)
        return optax.partition({"matrices": matrices, "others": others}, labels)

    def _scaled(self, update: jax.Array, role: Role) -> jax.Array:
        fan_in, fan_out = (math.prod(update.shape[i] for i in side) for side in (role.rows, role.columns))
        if self.consistent_rms is None:
            return update * math.sqrt(max(1.0, fan_out / fan_in))
        return update * self.consistent_rms * math.sqrt(max(fan_in, fan_out))

    def problems(self) -> list[str]:
        """Returns why these settings cannot work."""
        problems = _decay_problems(self, "momentum") + self.others.problems()
        if self.num_iterations < 1:
            problems.append(f"optimizer.rule.num_iterations is {self.num_iterations}; it is 1 or more")
        return problems


Rule = AdamW | AdamW8Bit | Adafactor | Lion | SGD | Muon
