"""Which experts a token goes to, and how evenly: scores, selection, balance.

Owns the router's arithmetic, all of it in float32. Knows no weights of experts and not how tokens reach
them (lm.models.dispatch). J in a shape is the number of experts selected per token. Laws: padding
counts nowhere; with one expert selected the load-balance loss of uniform routing is 1, with k it is k,
and of collapsed routing it is the number of experts.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from lm.batch import WeightedSum
from lm.models.layers import draw


class Routing(NamedTuple):
    """Where tokens go.

    Attributes:
      probabilities_BTE: f32, each token's scores as a distribution over experts.
      experts_BTJ: i32, the selected experts, all different.
      gates_BTJ: f32, the weight of each selected expert's result.
      valid_BT: bool, false for padding, which goes nowhere.
    """

    probabilities_BTE: jax.Array
    experts_BTJ: jax.Array
    gates_BTJ: jax.Array
    valid_BT: jax.Array


# Of more experts than this only the extremes of the load are logged.
MOST_LOGGED = 64

SCORES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "softmax": lambda logits: jax.nn.softmax(logits, axis=-1),
    "sigmoid": jax.nn.sigmoid,
}
# The score of a group of experts, by those of its members.
GROUP_SCORES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "best": lambda scores: jnp.max(scores, axis=-1),
    "best_two": lambda scores: jnp.sum(jax.lax.top_k(scores, 2)[0], axis=-1),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertGroups:
    """Selects experts only from the best few groups, so that a token goes to few devices (DeepSeek-V2, section 2.2.2).

    Attributes:
      num_groups: number of groups; neighbouring experts are one.
      num_selected: number of groups that a token may go to.
      score: a group's score: that of its best expert (DeepSeek-V2), or the sum of its best two (DeepSeek-V3).
    """

    num_groups: int = 8
    num_selected: int = 4
    score: Literal["best", "best_two"] = "best_two"

    def limit(self, scores_BTE: jax.Array) -> jax.Array:
        """Returns the scores, minus infinity outside the best groups."""
        num_experts = scores_BTE.shape[-1]
        grouped = scores_BTE.reshape(*scores_BTE.shape[:-1], self.num_groups, num_experts // self.num_groups)
        _, best = jax.lax.top_k(GROUP_SCORES[self.score](grouped), self.num_selected)
        allowed = jnp.sum(jax.nn.one_hot(best, self.num_groups, dtype=jnp.int32), axis=-2) > 0
        return jnp.where(allowed[..., None], grouped, -jnp.inf).reshape(scores_BTE.shape)

    def problems(self, num_experts: int, num_selected: int) -> list[str]:
        """Returns one sentence for each reason why this cannot work.

        Args:
          num_experts: number of experts.
          num_selected: number of experts that a token goes to.
        """
        where = "config.model.mlp.router.groups"
        if self.num_groups < 1 or num_experts % self.num_groups:
            return [f"{where}.num_groups: {self.num_groups} groups do not divide {num_experts} experts"]
        size = num_experts // self.num_groups
        problems = []
        if not 1 <= self.num_selected <= self.num_groups:
            problems.append(f"{where}.num_selected: {self.num_selected} is not between 1 and {self.num_groups} groups")
        elif self.num_selected * size < num_selected:
            problems.append(
                f"{where}.num_selected: {self.num_selected} groups of {size} experts have fewer than the {num_selected}"
                " experts that a token goes to"
            )
        if self.score == "best_two" and size < 2:
            problems.append(f"{where}.score: best_two needs groups of two experts or more; choose best")
        return problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class BiasBalancing:
    """Balances by a bias that selects but does not weigh, moved after each step (Wang et al. 2024; DeepSeek-V3).

    Attributes:
      step: how far the bias of an expert moves: down if its load was above the mean, up if below.
    """

    step: float = 1e-3

    def update(self, value: jax.Array, statistic: jax.Array) -> jax.Array:
        """Returns the next bias f32[..., E], given how many tokens each expert was selected for."""
        mean = jnp.mean(statistic, axis=-1, keepdims=True)
        return value + self.step * jnp.sign(mean - statistic)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Router:
    """Settings of a router, from its logits to the selected experts and their weights.

    Switch and DeepSeek-V2 take the defaults, Mixtral `normalize`, DeepSeek-V3 sigmoid scores with all of the rest.

    Attributes:
      score: how logits become scores: softmax over all experts, or sigmoid of each (DeepSeek-V3).
      normalize: whether the weights of the selected experts are divided by their sum (Mixtral, Qwen3).
      scale: factor on the weights (the routed scaling factor of DeepSeek).
      jitter: in training the router's input is multiplied by noise uniform in [1 - jitter, 1 + jitter] (Switch).
      groups: limits a token to some groups of experts; None does not.
      balancing: balances by a bias instead of a loss; None does not.
    """

    score: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = False
    scale: float = 1.0
    jitter: float = 0.0
    groups: ExpertGroups | None = None
    balancing: BiasBalancing | None = None

    def disturb(self, x_BTD: jax.Array, key: jax.Array | None) -> jax.Array:
        """Returns the router's input, f32, with noise if there is a key (Fedus et al. 2022, section 2.4)."""
        x_BTD = x_BTD.astype(jnp.float32)
        if key is None or self.jitter == 0.0:
            return x_BTD
        noise = functools.partial(jax.random.uniform, minval=1.0 - self.jitter, maxval=1.0 + self.jitter)
        return x_BTD * draw(key, x_BTD.shape, noise)

    def route(self, logits_BTE: jax.Array, bias_E: jax.Array | None, num_selected: int, valid_BT: jax.Array) -> Routing:
        """Selects experts for each token.

        Args:
          logits_BTE: f32.
          bias_E: f32, is added to scores when selecting and has no gradient; None is zero.
          num_selected: J, experts per token.
          valid_BT: bool, false for padding.
        """
        scores_BTE = SCORES[self.score](logits_BTE)
        choice_BTE = jax.lax.stop_gradient(scores_BTE)
        if bias_E is not None:
            choice_BTE = choice_BTE + jax.lax.stop_gradient(bias_E)[None, None]
        if self.groups is not None:
            choice_BTE = self.groups.limit(choice_BTE)
        _, experts_BTJ = jax.lax.top_k(choice_BTE, num_selected)
        gates_BTJ = jnp.take_along_axis(scores_BTE, experts_BTJ, axis=-1)
        if self.normalize:
            gates_BTJ = gates_BTJ / (jnp.sum(gates_BTJ, axis=-1, keepdims=True) + 1e-20)
        # A distribution also where scores are none; for softmax this divides by one.
        probabilities_BTE = scores_BTE / (jnp.sum(scores_BTE, axis=-1, keepdims=True) + 1e-20)
        return Routing(probabilities_BTE, experts_BTJ, self.scale * gates_BTJ, valid_BT)

    def problems(self, num_experts: int, num_selected: int) -> list[str]:
        """Returns one sentence for each reason why these settings cannot work; arguments as of `ExpertGroups`."""
        problems = [] if self.groups is None else self.groups.problems(num_experts, num_selected)
        if not 0 <= self.jitter < 1:
            problems.append(f"config.model.mlp.router.jitter: {self.jitter} is not in [0, 1)")
        return problems


class Tally(NamedTuple):
    """Sums over tokens that a router's losses and metrics follow from; those of the pieces of a batch are to be added.

    Attributes:
      counts_E: f32, how many tokens selected each expert, padding left out.
      mass_E: f32, sum of the tokens' probabilities of each expert.
      tokens: f32[], number of tokens.
      balance_of_rows: f32[], the load-balance loss of each row times its tokens, summed.
      squared_normalizers: f32[], sum of the squared log-sum-exp of the logits.
      entropy: f32[], sum of the entropies of the tokens' distributions, in nats.
      dropped: f32[], selections that an expert had no room for.
    """

    counts_E: jax.Array
    mass_E: jax.Array
    tokens: jax.Array
    balance_of_rows: jax.Array
    squared_normalizers: jax.Array
    entropy: jax.Array
    dropped: jax.Array


def tally(routing: Routing, logits_BTE: jax.Array, dropped: jax.Array) -> Tally:
    """Sums what is to be known of the routing of a batch, or of a piece of it.

    Args:
      routing: of all tokens.
      logits_BTE: f32, the router's.
      dropped: f32[], selections that were dropped.
    """
    num_experts = routing.probabilities_BTE.shape[-1]
    valid_BT = routing.valid_BT.astype(jnp.float32)
    hot_BTJE = jax.nn.one_hot(routing.experts_BTJ, num_experts, dtype=jnp.float32)
    counts_BE = jnp.sum(hot_BTJE * valid_BT[:, :, None, None], axis=(1, 2))
    mass_BE = jnp.sum(routing.probabilities_BTE * valid_BT[:, :, None], axis=1)
    tokens_B = jnp.sum(valid_BT, axis=1)
    log_sum_BT = jax.nn.logsumexp(logits_BTE, axis=-1)
    entropy_BT = jnp.sum(jax.scipy.special.entr(jax.lax.stop_gradient(routing.probabilities_BTE)), axis=-1)
    return Tally(
        counts_E=jnp.sum(counts_BE, axis=0),
        mass_E=jnp.sum(mass_BE, axis=0),
        tokens=jnp.sum(tokens_B),
        balance_of_rows=jnp.sum(_balance(counts_BE, mass_BE, tokens_B)),
        squared_normalizers=jnp.sum(valid_BT * jnp.square(log_sum_BT)),
        entropy=jnp.sum(entropy_BT * valid_BT),
        dropped=dropped,
    )


def _balance(counts_BE: jax.Array, mass_BE: jax.Array, tokens_B: jax.Array) -> jax.Array:
    """Returns f32[B], E * sum_e f_e p_e of each row times its tokens."""
    share_BE = counts_BE / jnp.maximum(tokens_B, 1.0)[:, None]
    return counts_BE.shape[-1] * jnp.sum(share_BE * mass_BE, axis=-1)


def load_balance_loss(tally: Tally, *, per_row: bool) -> WeightedSum:
    """Computes E * sum_e f_e p_e, weighted by tokens (Fedus et al. 2022, equation 4).

    f_e is the number of times that e was selected per token, p_e the mean probability of e. DeepSeek's form, which
    divides f by the number of experts per token, is this with a coefficient divided by it.

    Args:
      tally: of all tokens.
      per_row: whether f and p are taken over each row (DeepSeek's sequence-wise loss), or over the batch.
    """
    if per_row:
        return WeightedSum(tally.balance_of_rows, tally.tokens)
    whole = _balance(tally.counts_E[None], tally.mass_E[None], tally.tokens[None])
    return WeightedSum(whole[0], tally.tokens)


def z_loss(tally: Tally) -> WeightedSum:
    """Computes the square of log-sum-exp of the router's logits, weighted by tokens (ST-MoE, equation 5)."""
    return WeightedSum(tally.squared_normalizers, tally.tokens)


def routing_metrics(tally: Tally) -> dict[str, WeightedSum]:
    """Computes what is logged of a router: each divided by its weight is the mean over layers.

    `router/load_of_E` is f32[E], the share of the selections that each of E experts got (at most `MOST_LOGGED`),
    `router/max_load` and `router/min_load` the largest and the smallest load over the mean load, `router/entropy` the
    mean entropy of a token's distribution in nats, `router/drop_rate` the share of selections that an expert had no
    room for.
    """
    num_selections, num_experts = jnp.sum(tally.counts_E), tally.counts_E.shape[0]
    load_E = tally.counts_E * num_experts / jnp.maximum(num_selections, 1.0)
    found = {
        "router/max_load": WeightedSum(tally.tokens * jnp.max(load_E), tally.tokens),
        "router/min_load": WeightedSum(tally.tokens * jnp.min(load_E), tally.tokens),
        "router/entropy": WeightedSum(tally.entropy, tally.tokens),
        "router/drop_rate": WeightedSum(tally.dropped, num_selections),
    }
    if num_experts <= MOST_LOGGED:
        # Layers may differ in how many experts they have, and only what is of one number can be summed over them.
        found[f"router/load_of_{num_experts}"] = WeightedSum(tally.counts_E, num_selections)
    return found
