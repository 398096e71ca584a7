"""How tokens reach their experts and come back: with a capacity, without one, or all to all.

Knows no router and no weights: experts are a function of rows, given how a row finds its expert. J in a
shape is the number of experts per token, A the number of selections (tokens times J). Laws: where
nothing is dropped, all dispatches agree; what is padding or dropped comes back as zero, with zero gradient.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lm.models.grouped import grouped_product
from lm.models.products import Product, contract
from lm.models.routing import Routing
from lm.parallel import constrain

# (rows, axes of the rows, product) -> results of the experts. The axes are the letters of the rows without the last
# one, E for experts where there is such an axis; the product finds the expert of each row where there is none.
Experts = Callable[[jax.Array, str, Product], jax.Array]


def combine(y_BTJD: jax.Array, routing: Routing, dtype: jnp.dtype) -> jax.Array:
    """Returns the weighted sum of the results of a token's experts, summed in float32; zero for padding."""
    gates_BTJ = jnp.where(routing.valid_BT[:, :, None], routing.gates_BTJ, 0.0)
    return jnp.einsum("BTJD,BTJ->BTD", y_BTJD.astype(jnp.float32), gates_BTJ).astype(dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense:
    """Every expert computes every token; the reference, at num_experts / num_selected times the cost."""

    def run(self, x_BTD: jax.Array, routing: Routing, experts: Experts) -> tuple[jax.Array, jax.Array]:
        """Returns [B, T, D], and f32[], how many selections were dropped."""
        num_experts = routing.probabilities_BTE.shape[-1]
        # Rows of every expert are the same: broadcast, and left to the compiler not to copy.
        x_EBTD = jnp.broadcast_to(x_BTD[None], (num_experts, *x_BTD.shape))
        y_EBTD = experts(x_EBTD, "EBT", contract)
        hot_BTJE = jax.nn.one_hot(routing.experts_BTJ, num_experts, dtype=jnp.float32)
        gates_BTE = jnp.einsum("BTJE,BTJ->BTE", hot_BTJE, routing.gates_BTJ) * routing.valid_BT[:, :, None]
        y_BTD = jnp.einsum("EBTD,BTE->BTD", y_EBTD.astype(jnp.float32), gates_BTE)
        return y_BTD.astype(x_BTD.dtype), jnp.zeros((), jnp.float32)

    def problems(self) -> list[str]:
        """Returns no problem."""
        return []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capacity:
    """Each expert takes a fixed number of tokens of each row and drops the rest (GShard; Switch, section 2.2).

    First choices come before second choices, and within them earlier tokens before later ones. What is dropped passes
    by on the residual stream. A cache is filled as if each call were a row of its own.

    Attributes:
      factor: room of an expert, times that which even routing needs.
    """

    factor: float = 1.25

    def slots(self, length: int, num_selected: int, num_experts: int) -> int:
        """Returns C, the room of an expert for tokens of one row."""
        return min(length, max(1, math.ceil(self.factor * length * num_selected / num_experts)))

    def run(self, x_BTD: jax.Array, routing: Routing, experts: Experts) -> tuple[jax.Array, jax.Array]:
        """Returns [B, T, D], and f32[], how many selections were dropped."""
        batch, length, width = x_BTD.shape
        num_experts, num_selected = routing.probabilities_BTE.shape[-1], routing.experts_BTJ.shape[-1]
        size = self.slots(length, num_selected, num_experts)
        assign = functools.partial(_assign_slots, num_experts=num_experts, size=size)
        tokens_BEC, slots_BTJ = jax.vmap(assign)(routing.experts_BTJ, routing.valid_BT)
        rows = jax.vmap(lambda x_TD, ids: jnp.take(x_TD, ids, axis=0, mode="fill", fill_value=0))
        x_EBCD = jnp.swapaxes(rows(x_BTD, tokens_BEC), 0, 1)
        x_EBCD = constrain(x_EBCD, "activation_experts", "batch", "capacity", "activation_embed")
        y_EBCD = experts(x_EBCD, "EBC", contract)
        y_BSD = jnp.swapaxes(y_EBCD, 0, 1).reshape(batch, num_experts * size, width)
        y_BTJD = rows(constrain(y_BSD, "batch", None, "activation_embed"), slots_BTJ)
        dropped_BTJ = (slots_BTJ == num_experts * size) & routing.valid_BT[:, :, None]
        return combine(y_BTJD, routing, x_BTD.dtype), jnp.sum(dropped_BTJ.astype(jnp.float32))

    def problems(self) -> list[str]:
        """Returns one sentence for each reason why this cannot work."""
        if self.factor <= 0:
            return [f"config.model.mlp.dispatch.factor: {self.factor} is not a positive number"]
        return []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dropless:
    """Tokens are sorted by expert and multiplied group by group; nothing is dropped (MegaBlocks, Gale et al. 2022)."""

    def run(self, x_BTD: jax.Array, routing: Routing, experts: Experts) -> tuple[jax.Array, jax.Array]:
        """Returns [B, T, D], and f32[], how many selections were dropped."""
        batch, length, width = x_BTD.shape
        num_experts, num_selected = routing.probabilities_BTE.shape[-1], routing.experts_BTJ.shape[-1]
        # Padding sorts behind the last expert, where no group reaches.
        ids_A = jnp.where(routing.valid_BT[:, :, None], routing.experts_BTJ, num_experts).reshape(-1)
        order_A, inverse_A, sizes_E = sort_by_expert(ids_A, num_experts)
        x_AD = jnp.repeat(x_BTD.reshape(batch * length, width), num_selected, axis=0)
        product = functools.partial(grouped_product, sizes_E)
        y_AD = experts(permute(x_AD, order_A, inverse_A), "A", product)
        y_BTJD = permute(y_AD, inverse_A, order_A).reshape(batch, length, num_selected, width)
        return combine(y_BTJD, routing, x_BTD.dtype), jnp.zeros((), jnp.float32)

    def problems(self) -> list[str]:
        """Returns no problem."""
        return []


def sort_by_expert(ids_A: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sorts selections by expert, stably; `num_experts` stands for none.

    Returns:
      The order, i32[A]; its inverse, i32[A]; and i32[E], how many selections each expert has.
    """
    order_A = jnp.argsort(ids_A, stable=True)
    inverse_A = jnp.argsort(order_A)
    sizes_E = jnp.sum(jax.nn.one_hot(ids_A, num_experts, dtype=jnp.int32), axis=0)
    return order_A, inverse_A, sizes_E


@jax.custom_vjp
def permute(x_AD: jax.Array, order_A: jax.Array, inverse_A: jax.Array) -> jax.Array:
    """Returns x[order]; both directions are gathers, where the gradient of one would be a scatter."""
    del inverse_A
    return jnp.take(x_AD, order_A, axis=0)


def _permute_forward(x_AD: jax.Array, order_A: jax.Array, inverse_A: jax.Array) -> tuple[jax.Array, jax.Array]:
    return permute(x_AD, order_A, inverse_A), inverse_A


def _permute_backward(inverse_A: jax.Array, gradient_AD: jax.Array) -> tuple[jax.Array, None, None]:
    return jnp.take(gradient_AD, inverse_A, axis=0), None, None


permute.defvjp(_permute_forward, _permute_backward)


def _assign_slots(
    experts_TJ: jax.Array, valid_T: jax.Array, num_experts: int, size: int
) -> tuple[jax.Array, jax.Array]:
    """Gives the selections of one row their slots.

    Returns:
      i32[E, C], the token in each slot, or T; and i32[T, J], the slot of each selection, or E * C.
    """
    length, num_selected = experts_TJ.shape
    # First choices first.
    ids_A = jnp.where(valid_T[:, None], experts_TJ, num_experts).T.reshape(-1)
    _, inverse_A, sizes_E = sort_by_expert(ids_A, num_experts)
    starts_E = jnp.cumsum(sizes_E) - sizes_E
    place_A = inverse_A - starts_E[jnp.minimum(ids_A, num_experts - 1)]
    nowhere = num_experts * size
    slots_A = jnp.where((ids_A < num_experts) & (place_A < size), ids_A * size + place_A, nowhere)
    tokens_A = jnp.tile(jnp.arange(length), num_selected)
    tokens_S = jnp.full((nowhere,), length).at[slots_A].set(tokens_A, mode="drop")
    return tokens_S.reshape(num_experts, size), slots_A.reshape(num_selected, length).T
