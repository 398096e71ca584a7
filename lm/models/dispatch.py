"""How tokens reach their experts and come back: sorted on their device, sent, with a capacity, or all to all.

Knows no router and no weights: experts are a function of rows, given how a row finds its expert. J in a
shape is the number of experts per token, A the number of selections (tokens times J), S of slots. Laws:
where nothing is dropped, all dispatches agree on any mesh, dropout included; what is padding or dropped
comes back as zero, with zero gradient.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from lm import parallel
from lm.models.division import Division, Experts, Selections, select, token_keys
from lm.models.grouped import grouped_product
from lm.models.products import contract
from lm.models.routing import Routing
from lm.parallel import constrain


def combine(y_BTJD: jax.Array, routing: Routing) -> jax.Array:
    """Returns f32, the weighted sum of the results of a token's experts; zero for padding."""
    gates_BTJ = jnp.where(routing.valid_BT[:, :, None], routing.gates_BTJ, 0.0)
    return jnp.einsum("BTJD,BTJ->BTD", y_BTJD.astype(jnp.float32), gates_BTJ)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense:
    """Every expert computes every token; the reference, at num_experts / num_selected times the cost."""

    def run(
        self, x_BTD: jax.Array, routing: Routing, experts: Experts, key_B: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Returns [B, T, D], and f32[], how many selections were dropped."""
        num_experts = routing.probabilities_BTE.shape[-1]
        # Rows of every expert are the same: broadcast, and left to the compiler not to copy.
        x_EBTD = jnp.broadcast_to(x_BTD[None], (num_experts, *x_BTD.shape))
        tokens_BTE = jax.lax.broadcasted_iota(jnp.int32, routing.probabilities_BTE.shape, 1)
        experts_BTE = jax.lax.broadcasted_iota(jnp.int32, routing.probabilities_BTE.shape, 2)
        keys_BTE = token_keys(key_B, tokens_BTE, experts_BTE)
        keys_EBT = None if keys_BTE is None else jnp.moveaxis(keys_BTE, -1, 0)
        y_EBTD = experts.compute(experts.weights, x_EBTD, "EBT", contract, keys_EBT)
        hot_BTJE = jax.nn.one_hot(routing.experts_BTJ, num_experts, dtype=jnp.float32)
        gates_BTE = jnp.einsum("BTJE,BTJ->BTE", hot_BTJE, routing.gates_BTJ) * routing.valid_BT[:, :, None]
        y_BTD = jnp.einsum("EBTD,BTE->BTD", y_EBTD.astype(jnp.float32), gates_BTE)
        return y_BTD.astype(x_BTD.dtype), jnp.zeros((), jnp.float32)

    def problems(self) -> list[str]:
        """Returns no problem."""
        return []


def _multiply_sorted(
    x_AD: jax.Array, ids_A: jax.Array, keys_A: jax.Array | None, weights: dict[str, jax.Array], experts: Experts
) -> jax.Array:
    """Returns [A, D], what the experts of `weights` say of rows; zero for ids that are none of theirs."""
    num_experts = len(weights["up"])
    ids_A = jnp.where((ids_A >= 0) & (ids_A < num_experts), ids_A, num_experts)
    # What is of no expert here sorts behind the last one, where no group reaches.
    order_A, inverse_A, sizes_E = sort_by_expert(ids_A, num_experts)
    keys_A = None if keys_A is None else jax.random.wrap_key_data(jnp.take(keys_A, order_A, axis=0))
    product = functools.partial(grouped_product, sizes_E)
    y_AD = experts.compute(weights, permute(x_AD, order_A, inverse_A), "A", product, keys_A)
    return permute(y_AD, inverse_A, order_A)


def _mix_sorted(selected: Selections, weights: dict[str, jax.Array], experts: Experts) -> jax.Array:
    """Returns f32[B, T, D], the weighted sum over the experts of `weights`; their numbers start at 0."""
    batch, length, num_selected = selected.experts_BTJ.shape
    x_AD = jnp.repeat(selected.x_BTD.reshape(batch * length, -1), num_selected, axis=0)
    keys_A = None if selected.keys_BTJ is None else selected.keys_BTJ.reshape(len(x_AD), -1)
    y_AD = _multiply_sorted(x_AD, selected.experts_BTJ.reshape(-1), keys_A, weights, experts)
    y_BTJD = y_AD.reshape(batch, length, num_selected, -1).astype(jnp.float32)
    return jnp.einsum("BTJD,BTJ->BTD", y_BTJD, selected.gates_BTJ)


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

    def run(
        self, x_BTD: jax.Array, routing: Routing, experts: Experts, key_B: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Returns [B, T, D], and f32[], how many selections were dropped."""
        batch, length, width = x_BTD.shape
        num_experts, num_selected = routing.probabilities_BTE.shape[-1], routing.experts_BTJ.shape[-1]
        size = self.slots(length, num_selected, num_experts)
        assign = functools.partial(_assign_slots, num_experts=num_experts, size=size)
        tokens_BEC, slots_BTJ = jax.vmap(assign)(routing.experts_BTJ, routing.valid_BT)
        rows = jax.vmap(lambda x_TD, ids: jnp.take(x_TD, ids, axis=0, mode="fill", fill_value=0))
        x_EBCD = jnp.swapaxes(rows(x_BTD, tokens_BEC), 0, 1)
        x_EBCD = constrain(x_EBCD, "activation_experts", "batch", "capacity", "activation_embed")
        experts_BEC = jax.lax.broadcasted_iota(jnp.int32, tokens_BEC.shape, 1)
        keys_BEC = token_keys(key_B, tokens_BEC, experts_BEC)
        keys_EBC = None if keys_BEC is None else jnp.swapaxes(keys_BEC, 0, 1)
        y_EBCD = experts.compute(experts.weights, x_EBCD, "EBC", contract, keys_EBC)
        y_BSD = jnp.swapaxes(y_EBCD, 0, 1).reshape(batch, num_experts * size, width)
        y_BTJD = rows(constrain(y_BSD, "batch", None, "activation_embed"), slots_BTJ)
        dropped_BTJ = (slots_BTJ == num_experts * size) & routing.valid_BT[:, :, None]
        return combine(y_BTJD, routing).astype(x_BTD.dtype), jnp.sum(dropped_BTJ.astype(jnp.float32))

    def problems(self) -> list[str]:
        """Returns one sentence for each reason why this cannot work."""
        if self.factor <= 0:
            return [f"config.model.mlp.dispatch.factor: {self.factor} is not a positive number"]
        return []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dropless:
    """Tokens are sorted by expert and multiplied group by group; nothing is dropped (MegaBlocks, Gale et al. 2022).

    Each device sorts its own tokens. Where experts are divided over devices, each of these gets the tokens of all, adds
    up what its experts say of them, and the sums are scattered back: all-gather and reduce-scatter.
    """

    def run(
        self, x_BTD: jax.Array, routing: Routing, experts: Experts, key_B: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Returns [B, T, D], and f32[], how many selections were dropped."""
        selected = select(x_BTD, routing, key_B)
        if not parallel.is_divided():
            return _mix_sorted(selected, experts.weights, experts).astype(x_BTD.dtype), jnp.zeros((), jnp.float32)

        def dispatch(division: Division, own: Selections, weights: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
            exchanged = division.exchanged
            if exchanged:
                own = jax.tree.map(lambda x: jax.lax.all_gather(x, exchanged, axis=0, tiled=True), own)
            first = division.first_expert(weights)
            here = own._replace(experts_BTJ=own.experts_BTJ - first)
            y_BTD = division.sum_hidden(_mix_sorted(here, weights, experts))
            whole = tuple(axis for axis in division.experts if axis not in exchanged)
            if whole:
                y_BTD = jax.lax.psum(y_BTD, whole)
            if exchanged:
                y_BTD = jax.lax.psum_scatter(y_BTD, exchanged, scatter_dimension=0, tiled=True)
            return y_BTD, jnp.zeros((), jnp.float32)

        return Division.of(selected, experts).run(dispatch, selected, experts)

    def problems(self) -> list[str]:
        """Returns no problem."""
        return []


@dataclasses.dataclass(frozen=True, kw_only=True)
class AllToAll:
    """Tokens are sent to the devices of their experts and sent back, by two all-to-alls of buffers of fixed size.

    Where experts are not divided over devices this is `Dropless`.

    Attributes:
      factor: room for what one device sends another, times that which even routing needs; what finds no room is
        dropped, later tokens first, so that what is dropped depends on the mesh. None has room for all that can come,
        num_devices times as much as even routing needs, and drops nothing.
    """

    factor: float | None = None

    def room(self, num_selections: int, num_devices: int) -> int:
        """Returns how many selections one device may send another."""
        if self.factor is None:
            return num_selections
        return min(num_selections, max(1, math.ceil(self.factor * num_selections / num_devices)))

    def run(
        self, x_BTD: jax.Array, routing: Routing, experts: Experts, key_B: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Returns [B, T, D], and f32[], how many selections were dropped."""
        if not parallel.is_divided() or not Division.of(selected := select(x_BTD, routing, key_B), experts).experts:
            return Dropless().run(x_BTD, routing, experts, key_B)
        dispatch = functools.partial(self._dispatch, experts)
        return Division.of(selected, experts).run(dispatch, selected, experts)

    def _dispatch(
        self, experts: Experts, division: Division, own: Selections, weights: dict[str, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        num_selected, width = own.experts_BTJ.shape[-1], own.x_BTD.shape[-1]
        ids_A = own.experts_BTJ.reshape(-1)
        num_devices = jax.lax.axis_size(division.experts)
        num_here = len(weights["up"])
        device_A = ids_A // num_here  # num_devices for padding
        room = self.room(len(ids_A), num_devices)
        _, inverse_A, sizes = sort_by_expert(device_A, num_devices)
        starts = jnp.cumsum(sizes) - sizes
        place_A = inverse_A - starts[jnp.minimum(device_A, num_devices - 1)]
        nowhere = num_devices * room
        slots_A = jnp.where((device_A < num_devices) & (place_A < room), device_A * room + place_A, nowhere)
        selections_S = jnp.full((nowhere,), len(ids_A)).at[slots_A].set(jnp.arange(len(ids_A)), mode="drop")

        def send(x: jax.Array) -> jax.Array:
            return jax.lax.all_to_all(x, division.experts, split_axis=0, concat_axis=0, tiled=True)

        def fill(x: jax.Array, rows: jax.Array, value: int) -> jax.Array:
            return jnp.take(x, rows, axis=0, mode="fill", fill_value=value)

        x_SD = send(fill(own.x_BTD.reshape(-1, width), selections_S // num_selected, 0))
        ids_S = send(fill(ids_A, selections_S, num_devices * num_here)) - division.first_expert(weights)
        keys_S = None
        if own.keys_BTJ is not None:
            keys_S = send(fill(own.keys_BTJ.reshape(len(ids_A), -1), selections_S, 0))
        y_SD = send(_multiply_sorted(x_SD, ids_S, keys_S, weights, experts))
        y_BTJD = fill(y_SD, slots_A, 0).reshape(*own.experts_BTJ.shape, width)
        y_BTD = jnp.einsum("BTJD,BTJ->BTD", y_BTJD.astype(jnp.float32), own.gates_BTJ)
        dropped_A = (slots_A == nowhere) & (device_A < num_devices)
        return division.sum_hidden(y_BTD), jnp.sum(dropped_A.astype(jnp.float32))

    def problems(self) -> list[str]:
        """Returns one sentence for each reason why this cannot work."""
        if self.factor is not None and self.factor <= 0:
            return [f"config.model.mlp.dispatch.factor: {self.factor} is not a positive number"]
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
