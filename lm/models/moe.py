"""The feed-forward half of a block as a mixture of experts; stands wherever an `Mlp` may.

Owns the experts' weights and joins router, dispatch and shared expert. Knows neither how experts are
selected (lm.models.routing) nor how tokens reach them (lm.models.dispatch). Laws: the result does
not depend on the dispatch where nothing is dropped; padding gives zero and counts nowhere.
"""

import dataclasses
import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm.batch import WeightedSum
from lm.models import routing as balance
from lm.models.dispatch import Capacity, Dense, Dropless
from lm.models.layers import Constant, Einsum, declare, dropout, fold
from lm.models.mlp import ACTIVATIONS, Activation, Mlp, MlpResult
from lm.models.multihead import Context
from lm.models.products import Product, contract
from lm.models.routing import Router, Routing

if TYPE_CHECKING:
    from lm.models.transformer import Transformer

# What randomness is for; folded into the layer's key.
JITTER, HIDDEN, SHARED = 1, 2, 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedExpert:
    """An expert that every token meets besides those that it selects.

    Attributes:
      dim: its hidden units; several shared experts (DeepSeek) are one of all their units.
      gated: whether its result is multiplied by a learned sigmoid gate (Qwen2-MoE).
    """

    dim: int
    gated: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureOfExperts:
    """Settings of a mixture of experts (Shazeer et al. 2017; Fedus et al. 2022).

    Attributes:
      num_experts: number of experts.
      num_selected: number of experts that each token goes to.
      dim: hidden units of one expert; None means the model's mlp_dim.
      activation: the experts' nonlinearity.
      gated: whether the activation of one projection multiplies another.
      dropout_rate: probability that a hidden unit of an expert is dropped (Switch drops more there than elsewhere).
      router: how experts are selected and weighted.
      shared: an expert for every token; None for none.
      dispatch: how tokens reach experts: none dropped, a capacity, or all experts for all tokens.
      load_balance: coefficient of the load-balance loss, the mean over layers; 1 is even routing with one expert.
      balance_rows: whether that loss is over each row (DeepSeek, sequence-wise) or over the batch.
      z_loss: coefficient of the loss on the router's logits (ST-MoE).
    """

    num_experts: int = 8
    num_selected: int = 2
    dim: int | None = None
    activation: Activation = "silu"
    gated: bool = True
    dropout_rate: float = 0.0
    router: Router = Router(normalize=True)
    shared: SharedExpert | None = None
    dispatch: Dropless | Capacity | Dense = Dropless()
    load_balance: float = 0.01
    balance_rows: bool = False
    z_loss: float = 0.0

    def build(self, config: "Transformer", *, gain: float, name: str) -> nn.Module:
        """Returns the module, its initial weights multiplied by `gain`; called in a compact method."""
        return MixtureLayer(self, config, gain, name=name)

    def problems(self, config: "Transformer") -> list[str]:
        """Returns one sentence for each reason why these settings cannot work."""
        where = "config.model.mlp"
        if not 1 <= self.num_selected <= self.num_experts:
            return [f"{where}.num_selected: {self.num_selected} is not between 1 and num_experts {self.num_experts}"]
        problems = [
            f"{where}.{field}: {value} is not a positive number"
            for field, value in (("dim", self.dim), ("shared.dim", self.shared and self.shared.dim))
            if value is not None and value < 1
        ]
        if not 0 <= self.dropout_rate < 1:
            problems.append(f"{where}.dropout_rate: {self.dropout_rate} is not in [0, 1)")
        if config.share_layers and self.router.balancing is not None:
            problems.append(
                f"{where}.router.balancing: layers that share weights (share_layers) cannot balance by one bias;"
                " balance by load_balance"
            )
        return problems + self.router.problems(self.num_experts, self.num_selected) + self.dispatch.problems()


class MixtureLayer(nn.Module):
    """A mixture of experts.

    Attributes:
      mixture: its settings.
      config: the model's settings.
      gain: multiplies the initial weights (DeepNorm).
    """

    mixture: MixtureOfExperts
    config: "Transformer"
    gain: float = 1.0

    @nn.compact
    def __call__(self, x_BTD: jax.Array, context: Context) -> MlpResult:
        """Returns [B, T, D], the router's losses times their coefficients, and what is logged of it."""
        mixture = self.mixture
        logits_BTE, routing = self._route(x_BTD, context)
        experts = Experts(mixture, self.config, self.gain, name="experts")
        experts = functools.partial(experts, fold(context.key, HIDDEN))
        y_BTD, num_dropped = mixture.dispatch.run(x_BTD, routing, experts)
        if mixture.shared is not None:
            y_BTD = y_BTD + self._shared(mixture.shared, x_BTD, context)
        counts_BE = balance.selection_counts(routing)
        if mixture.router.balancing is not None:
            counts_E = jnp.sum(counts_BE, axis=0)
            self.sow("statistics", "router_bias", counts_E, init_fn=lambda: jnp.zeros_like(counts_E), reduce_fn=jnp.add)
        losses = {}
        if mixture.load_balance:
            loss = balance.load_balance_loss(routing, counts_BE, per_row=mixture.balance_rows)
            losses["load_balance"] = WeightedSum(mixture.load_balance * loss.sum, loss.weight)
        if mixture.z_loss:
            loss = balance.z_loss(logits_BTE, routing.valid_BT)
            losses["router_z"] = WeightedSum(mixture.z_loss * loss.sum, loss.weight)
        return y_BTD, losses, balance.routing_metrics(routing, counts_BE, num_dropped)

    def _route(self, x_BTD: jax.Array, context: Context) -> tuple[jax.Array, Routing]:
        """Returns the router's logits, f32[B, T, E], and the routing."""
        router, num_experts = self.mixture.router, self.mixture.num_experts
        bias_E = None
        if router.balancing is not None:
            bias = declare((num_experts,), ("experts",), "bias", distribution=Constant(0.0), rule=router.balancing)
            bias_E = self.param("router_bias", bias)
        linear = Einsum("BTD,DE->BTE", self.config, sizes=(("E", num_experts),), float32_result=True, name="router")
        logits_BTE = linear(router.disturb(x_BTD, fold(context.key, JITTER)), product=float32_product)
        valid_BT = context.queries.segment_ids != 0
        return logits_BTE, router.route(logits_BTE, bias_E, self.mixture.num_selected, valid_BT)

    def _shared(self, shared: SharedExpert, x_BTD: jax.Array, context: Context) -> jax.Array:
        """Returns the shared expert's result, [B, T, D]."""
        settings = Mlp(
            activation=self.mixture.activation,
            gated=self.mixture.gated,
            dim=shared.dim,
            dropout_rate=self.mixture.dropout_rate,
        )
        expert = settings.build(self.config, gain=self.gain, name="shared")
        y_BTD, _, _ = expert(x_BTD, context._replace(key=fold(context.key, SHARED)))
        if shared.gated:
            gate = Einsum("BTD,D->BT", self.config, float32_result=True, name="shared_gate")
            y_BTD = y_BTD * jax.nn.sigmoid(gate(x_BTD))[:, :, None].astype(y_BTD.dtype)
        return y_BTD


class Experts(nn.Module):
    """The experts' weights; which rows meet which of them is up to the caller's product.

    Attributes:
      mixture: settings of the mixture.
      config: the model's settings.
      gain: multiplies the initial weights.
    """

    mixture: MixtureOfExperts
    config: "Transformer"
    gain: float

    @nn.compact
    def __call__(self, key: jax.Array | None, x: jax.Array, axes: str, product: Product) -> jax.Array:
        """Applies each row's expert: x[*axes, D] gives the same shape; see `lm.models.dispatch.Experts`."""
        mixture, config = self.mixture, self.config
        # A row of "A" is of one expert each, which the weight's equation writes as an axis as well.
        rows = axes if axes.startswith("E") else f"E{axes}"
        sizes = (("E", mixture.num_experts), ("F", mixture.dim or config.mlp_dim))
        share = mixture.num_selected / mixture.num_experts

        def linear(name: str, operand: str, result: str, residual: bool = False) -> Einsum:
            equation = f"{rows}{operand},E{operand}{result}->{rows}{result}"
            return Einsum(
                equation,
                config,
                residual=residual,
                sizes=sizes,
                scale=self.gain,
                active_share=share,
                name=name,
            )

        activate = ACTIVATIONS[mixture.activation]
        hidden = linear("up", "D", "F")(x, product=product)
        if mixture.gated:
            hidden = activate(linear("gate", "D", "F")(x, product=product)) * hidden
        else:
            hidden = activate(hidden)
        hidden = dropout(hidden, mixture.dropout_rate, key)
        return linear("down", "F", "D", residual=True)(hidden, product=product)


def float32_product(equation: str, x: jax.Array, kernel: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Computes the product in float32 whatever the compute dtype: routing is decided by small differences."""
    del dtype
    return contract(equation, x, kernel, jnp.dtype(jnp.float32))
