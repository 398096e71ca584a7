"""How tokens and experts are divided over the devices of a mesh, for dispatches that run on each device.

Owns the data that a dispatch cuts and sends, and the way into and out of the code of one device. Knows
no dispatch and no router. Law: a device's part of the weights is gathered to whole experts, of which it
has some, and some of their hidden units.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lm import parallel
from lm.models.layers import fold
from lm.models.products import Product
from lm.models.routing import Routing


class Experts(NamedTuple):
    """All experts, as data and a function of it, since devices may hold parts of them.

    Attributes:
      weights: f32[E, ...] by name; a device's part has fewer experts, and fewer hidden units.
      axes: logical names of the axes of each.
      compute: (weights, rows, axes of the rows, product, keys for dropout or None) -> results. The axes are the letters
        of the rows without the last one, E for experts where there is such an axis; the product finds the expert of
        each row where there is none. Keys have the rows' axes.
    """

    weights: dict[str, jax.Array]
    axes: dict[str, tuple[str, ...]]
    compute: Callable[[dict[str, jax.Array], jax.Array, str, Product, jax.Array | None], jax.Array]


def token_keys(key_B: jax.Array | None, tokens_BX: jax.Array, experts_BX: jax.Array) -> jax.Array | None:
    """Returns a key for each pair of token and expert, so that dropout does not depend on where they meet.

    Args:
      key_B: a key for each row.
      tokens_BX: i32, index of the token in its row.
      experts_BX: i32, of the same shape, whatever the axes behind the rows are.
    """
    if key_B is None:
        return None
    key_B = key_B.reshape(-1, *(1,) * (tokens_BX.ndim - 1))
    return fold(fold(jnp.broadcast_to(key_B, tokens_BX.shape), tokens_BX), experts_BX)


class Selections(NamedTuple):
    """Tokens and where they go; the arrays that dispatches cut, send and sort, or the places of these.

    Attributes:
      x_BTD: the tokens.
      experts_BTJ: i32, the number of each selected expert, and one that no expert has for padding.
      gates_BTJ: f32, weight of each result.
      keys_BTJ: raw PRNG keys for dropout, u32[B, T, J, words], or None.
    """

    x_BTD: Any
    experts_BTJ: Any
    gates_BTJ: Any
    keys_BTJ: Any


def select(x_BTD: jax.Array, routing: Routing, key_B: jax.Array | None) -> Selections:
    """Returns the tokens with where they go.

    Args:
      x_BTD: the tokens.
      routing: of them.
      key_B: a key for each row, or None.
    """
    num_experts = routing.probabilities_BTE.shape[-1]
    tokens_BTJ = jax.lax.broadcasted_iota(jnp.int32, routing.experts_BTJ.shape, 1)
    keys_BTJ = token_keys(key_B, tokens_BTJ, routing.experts_BTJ)
    valid_BT1 = routing.valid_BT[:, :, None]
    return Selections(
        x_BTD,
        jnp.where(valid_BT1, routing.experts_BTJ, num_experts),
        jnp.where(valid_BT1, routing.gates_BTJ, 0.0),
        None if keys_BTJ is None else jax.random.key_data(keys_BTJ),
    )


@dataclasses.dataclass(frozen=True)
class Division:
    """How tokens and experts are divided over the devices of the mesh, for code of one device.

    Attributes:
      tokens: where x_BTD lies.
      weights: where each weight lies.
      experts: mesh axes that divide the experts.
      hidden: mesh axes that divide hidden units.
    """

    tokens: PartitionSpec
    weights: dict[str, PartitionSpec]
    experts: tuple[str, ...]
    hidden: tuple[str, ...]

    @classmethod
    def of(cls, selected: Selections, experts: Experts) -> "Division":
        """Returns the division that the rules in force make."""
        mesh, rules = parallel.current()
        weights = {name: parallel.spec(axes, rules.parameters) for name, axes in experts.axes.items()}

        def carriers(name: str) -> tuple[str, ...]:
            return tuple(axis for axis in rules.parameters.get(name, ()) if mesh.shape[axis] > 1)

        tokens = parallel.activation_spec(selected.x_BTD.shape, "batch", "length", None)
        return cls(tokens, weights, carriers("experts"), carriers("mlp"))

    @property
    def exchanged(self) -> tuple[str, ...]:
        """The mesh axes of the experts that divide tokens too."""
        return tuple(axis for axis in self.experts if axis in parallel.carriers(self.tokens[0]))

    def run(
        self,
        dispatch: Callable[["Division", Selections, dict[str, jax.Array]], tuple[jax.Array, jax.Array]],
        selected: Selections,
        experts: Experts,
    ) -> tuple[jax.Array, jax.Array]:
        """Runs a dispatch on each device's tokens with its experts.

        Args:
          dispatch: from this, the device's tokens and weights to f32[B, T, D], which is summed over devices with other
            hidden units, and f32[], dropped selections.
          selected: all tokens.
          experts: all experts.
        """

        def on_device(selected: Selections, weights: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
            weights = {
                name: parallel.gather_weight(
                    weight, self.weights[name], tuple(axis in ("experts", "mlp") for axis in experts.axes[name])
                )
                for name, weight in weights.items()
            }
            y_BTD, dropped = dispatch(self, selected, weights)
            return y_BTD.astype(selected.x_BTD.dtype), jax.lax.psum(dropped, self._token_axes)

        each = PartitionSpec(*self.tokens[:2])
        placed = Selections(self.tokens, each, each, None if selected.keys_BTJ is None else each)
        run = parallel.by_device(on_device, (placed, self.weights), (self.tokens, PartitionSpec()))
        return run(selected, experts.weights)

    @property
    def _token_axes(self) -> tuple[str, ...]:
        return tuple(axis for entry in self.tokens for axis in parallel.carriers(entry))

    def first_expert(self, weights: dict[str, jax.Array]) -> jax.Array | int:
        """Returns the number of the device's first expert."""
        return jax.lax.axis_index(self.experts) * len(weights["up"]) if self.experts else 0

    def sum_hidden(self, y_BTD: jax.Array) -> jax.Array:
        """Adds up what devices with other hidden units found."""
        return jax.lax.psum(y_BTD, self.hidden) if self.hidden else y_BTD
