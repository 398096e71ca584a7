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
from lm.models import division
from lm.models import routing as balance
from lm.models.dispatch import AllToAll, Capacity, Dense, Dropless
from lm.models.layers import Constant, Einsum, declare, dropout, fold
from lm.models.mlp import ACTIVATIONS, Activation, Mlp, MlpResult, Summary
from lm.models.multihead import Context
from lm.models.products import Product, contract
from lm.models.routing import Router, Routing
from lm.parallel import own_part

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
      dispatch: how tokens reach experts: none dropped, sent to other devices, a capacity, or all to all tokens.
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
    dispatch: Dropless | AllToAll | Capacity | Dense = Dropless()
    load_balance: float = 0.01
    balance_rows: bool = False
    z_loss: float = 0.0

    def build(self, config: "Transformer", *, gain: float, name: str) -> nn.Module:
        """Returns the module, its initial weights multiplied by `gain`; called in a compact method."""
        return MixtureLayer(self, config, gain, name=name)

    def summarize(self, tallies: balance.Tally) -> Summary:
        """Returns the router's losses times their coefficients, and what is logged of it, summed over layers.

        Args:
          tallies: of the whole batch, each leaf with a leading axis of layers.
        """
        losses = {}
        if self.load_balance:
            loss = jax.vmap(functools.partial(balance.load_balance_loss, per_row=self.balance_rows))(tallies)
            losses["load_balance"] = WeightedSum(self.load_balance * loss.sum, loss.weight)
        if self.z_loss:
            loss = balance.z_loss(tallies)
            losses["router_z"] = WeightedSum(self.z_loss * loss.sum, loss.weight)
        metrics = jax.vmap(balance.routing_metrics)(jax.lax.stop_gradient(tallies))
        return jax.tree.map(lambda x: jnp.sum(x, axis=0), (losses, metrics))

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
        """Returns [B, T, D], and the sums for `MixtureOfExperts.summarize`."""
        mixture = self.mixture
        logits_BTE, routing = self._route(x_BTD, context)
        experts = Experts(mixture, self.config, self.gain, name="experts")()
        key = fold(context.key, HIDDEN) if mixture.dropout_rate else None
        y_BTD, num_dropped = mixture.dispatch.run(x_BTD, routing, experts, key)
        if mixture.shared is not None:
            y_BTD = y_BTD + self._shared(mixture.shared, x_BTD, context)
        tally = balance.tally(routing, logits_BTE, num_dropped)
        if mixture.router.balancing is not None:
            counts_E = tally.counts_E
            self.sow("statistics", "router_bias", counts_E, init_fn=lambda: jnp.zeros_like(counts_E), reduce_fn=jnp.add)
        return y_BTD, tally

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
        y_BTD, _ = expert(x_BTD, context._replace(key=fold(context.key, SHARED)))
        if shared.gated:
            gate = Einsum("BTD,D->BT", self.config, float32_result=True, name="shared_gate")
            y_BTD = y_BTD * jax.nn.sigmoid(gate(x_BTD))[:, :, None].astype(y_BTD.dtype)
        return y_BTD


class Experts(nn.Module):
    """The experts' weights, and what they compute; which rows meet which of them is up to the dispatch.

    Attributes:
      mixture: settings of the mixture.
      config: the model's settings.
      gain: multiplies the initial weights.
    """

    mixture: MixtureOfExperts
    config: "Transformer"
    gain: float

    @nn.compact
    def __call__(self) -> division.Experts:
        """Declares the weights and returns them with the function of rows that they make."""
        mixture, config = self.mixture, self.config
        sizes = (("E", mixture.num_experts), ("F", mixture.dim or config.mlp_dim))

        def weight(name: str, operand: str, result: str, residual: bool = False) -> jax.Array:
            linear = Einsum(
                f"EA{operand},E{operand}{result}->EA{result}",
                config,
                residual=residual,
                sizes=sizes,
                scale=self.gain,
                active_share=mixture.num_selected / mixture.num_experts,
                float32_result=True,
                name=name,
            )
            return linear(jnp.zeros(()), product=kernel_alone)

        weights = {"up": weight("up", "D", "F"), "down": weight("down", "F", "D", residual=True)}
        if mixture.gated:
            weights["gate"] = weight("gate", "D", "F")
        axes = dict.fromkeys(weights, ("experts", "embed", "mlp")) | {"down": ("experts", "mlp", "embed")}
        return division.Experts(weights, axes, self._compute)

    def _compute(
        self, weights: dict[str, jax.Array], x: jax.Array, axes: str, product: Product, key: jax.Array | None
    ) -> jax.Array:
        """Applies each row's expert: x[*axes, D] gives the same shape; see `lm.models.division.Experts`."""
        dtype = self.config.compute_dtype
        # A row of "A" is of one expert each, which the weight's equation writes as an axis as well.
        rows = axes if axes.startswith("E") else f"E{axes}"

        def linear(name: str, operand: str, result: str, x: jax.Array) -> jax.Array:
            equation = f"{rows}{operand},E{operand}{result}->{rows}{result}"
            return product(equation, x, weights[name], dtype).astype(dtype)

        activate = ACTIVATIONS[self.mixture.activation]
        hidden = linear("up", "D", "F", x)
        if self.mixture.gated:
            hidden = activate(linear("gate", "D", "F", x)) * hidden
        else:
            hidden = activate(hidden)
        if key is not None:
            # Drawn for all hidden units, of which this device may have a part.
            width = self.mixture.dim or self.config.mlp_dim
            scale = dropout(jnp.ones((*hidden.shape[:-1], width), dtype), self.mixture.dropout_rate, key)
            hidden = hidden * own_part(scale, "mlp")
        return linear("down", "F", "D", hidden)


def kernel_alone(equation: str, x: jax.Array, kernel: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Hands out the weight instead of a product: what multiplies it is said by the dispatch, on each device."""
    del equation, x, dtype
    return kernel


def float32_product(equation: str, x: jax.Array, kernel: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Computes the product in float32 whatever the compute dtype: routing is decided by small differences."""
    del dtype
    return contract(equation, x, kernel, jnp.dtype(jnp.float32))
