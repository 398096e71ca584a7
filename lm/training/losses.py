"""Token losses: cross-entropy with label smoothing and z-loss, whole or in chunks of the length.

Knows no objective, no architecture and no mesh. Law: every loss is a pair (sum, weight), so that
microbatches, devices and chunks add up and are divided once.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm.batch import WeightedSum
from lm.experiment import LossConfig
from lm.parallel import by_platform, is_divided


class TokenLosses(NamedTuple):
    """Sums over positions, each f32[].

    Attributes:
      loss: what is minimised, sum of weight * (nll + smoothing and z terms).
      nll: sum of weight * negative log-likelihood in nats, without smoothing and z-loss.
      correct: sum of weight where the most likely token is the target.
      weight: sum of the weights.
      parts: nll and weight of each component of a mixture, a pair of f32[C]; C is 0 where components are not told.
    """

    loss: jax.Array
    nll: jax.Array
    correct: jax.Array
    weight: jax.Array
    parts: WeightedSum

    def mean_loss(self) -> WeightedSum:
        """The minimised loss as a pair."""
        return WeightedSum(self.loss, self.weight)


@jax.custom_vjp
def reduce_vocabulary(logits_BTV: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, ...]:
    """Reduces f32 logits to logZ, the target's logit, the largest and the sum of all, each f32[B, T] or of one axis.

    The gradient is one pass over one array of the logits' size (derived step by step it would keep three). The
    largest one has no gradient.
    """
    return _reduce_forward(logits_BTV, targets_BT)[0]


def _is_target(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    return targets_BT[..., None] == jax.lax.broadcasted_iota(jnp.int32, logits_BTV.shape, logits_BTV.ndim - 1)


def _target_logit(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    # A one-hot product keeps a sharded vocabulary sharded; XLA:CPU writes it to memory, so there it is a gather.
    return by_platform(
        logits_BTV,
        targets_BT,
        cpu=lambda x, i: jnp.take_along_axis(x, i[..., None], axis=-1)[..., 0],
        default=lambda x, i: jnp.sum(jnp.where(_is_target(x, i), x, 0.0), axis=-1),
    )


def _reduce_forward(logits_BTV: jax.Array, targets_BT: jax.Array) -> tuple[tuple[jax.Array, ...], Any]:
    largest_BT = jnp.max(logits_BTV, axis=-1)
    exponentials_BTV = jnp.exp(logits_BTV - largest_BT[..., None])
    total_BT = jnp.sum(exponentials_BTV, axis=-1)
    normalizer_BT = largest_BT + jnp.log(total_BT)
    # An accelerator computes the exponentials again rather than write them down; XLA:CPU does not vectorize them well
    # where they are rounded to bfloat16 on the way, and sums them in one thread unless they are an array.
    kept_BTV, scale_BT = by_platform(
        logits_BTV,
        normalizer_BT,
        exponentials_BTV,
        total_BT,
        cpu=lambda _, __, exponentials, total: (exponentials, 1.0 / total),
        default=lambda logits, normalizer, _, __: (logits, normalizer),
    )
    reduced = normalizer_BT, _target_logit(logits_BTV, targets_BT), largest_BT, jnp.sum(logits_BTV, axis=-1)
    return reduced, (kept_BTV, scale_BT, targets_BT)


def _reduce_backward(saved: Any, gradients: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
    kept_BTV, scale_BT, targets_BT = saved
    to_normalizer_BT1, to_target_BT1, _, to_sum_BT1 = (g[..., None] for g in gradients)
    spread_BTV = by_platform(
        kept_BTV,
        scale_BT[..., None],
        to_normalizer_BT1,
        cpu=lambda exponentials, scale, gradient: exponentials * (scale * gradient),
        default=lambda logits, normalizer, gradient: gradient * jnp.exp(logits - normalizer),
    )
    spread_BTV = spread_BTV + to_sum_BT1
    return spread_BTV + jnp.where(_is_target(kept_BTV, targets_BT), to_target_BT1, 0.0), None


reduce_vocabulary.defvjp(_reduce_forward, _reduce_backward)


class Components(NamedTuple):
    """Which component of a mixture of objectives made each position.

    Attributes:
      ids: i32[B, T], below `count`.
      count: number of components.
    """

    ids: jax.Array
    count: int

    def split(self, values_BT: jax.Array) -> jax.Array:
        """Returns f32[count], the sum of f32[B, T] over the positions of each component."""
        return jnp.zeros((self.count,), jnp.float32).at[self.ids].add(values_BT)


def cross_entropy(
    logits_BTV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    config: LossConfig,
    components: Components | None = None,
) -> TokenLosses:
    """Sums the loss of `targets` under `logits` in float32.

    nll = logZ - z_target; label smoothing puts 1 - e on the target and e / (V - 1) on each other
    token and subtracts the constant entropy of that distribution, so that a perfect prediction costs
    0 (T5X); z-loss adds c * logZ^2 (PaLM, section 5).

    Args:
      logits_BTV: f32 or bf16 [B, T, V].
      targets_BT: i32[B, T], ids below V.
      weights_BT: f32[B, T].
      config: smoothing and z-loss.
      components: of a mixture, to be told apart; or None.
    """
    logits_BTV = logits_BTV.astype(jnp.float32)
    size = logits_BTV.shape[-1]
    # Where nothing is divided, as rows of one axis, as they come out of the product: XLA:CPU then computes the
    # exponentials in the logits' memory.
    shape = targets_BT.shape if is_divided() else (targets_BT.size,)
    reduced = reduce_vocabulary(logits_BTV.reshape(*shape, size), targets_BT.reshape(shape))
    normalizer_BT, target_logit_BT, largest_BT, sum_BT = (x.reshape(targets_BT.shape) for x in reduced)
    nll_BT = normalizer_BT - target_logit_BT
    loss_BT = nll_BT
    if config.label_smoothing:
        low = config.label_smoothing / (size - 1)
        high = 1.0 - config.label_smoothing
        others_BT = size * normalizer_BT - sum_BT - nll_BT
        entropy = -(high * jnp.log(high) + (size - 1) * low * jnp.log(low + 1e-20))
        loss_BT = high * nll_BT + low * others_BT - entropy
    if config.z_loss:
        loss_BT = loss_BT + config.z_loss * jnp.square(normalizer_BT)
    correct_BT = target_logit_BT >= largest_BT
    return TokenLosses(
        loss=jnp.sum(loss_BT * weights_BT),
        nll=jnp.sum(nll_BT * weights_BT),
        correct=jnp.sum(correct_BT * weights_BT),
        weight=jnp.sum(weights_BT),
        parts=_parts(nll_BT, weights_BT, components),
    )


def _parts(nll_BT: jax.Array, weights_BT: jax.Array, components: Components | None) -> WeightedSum:
    if components is None:
        return WeightedSum(jnp.zeros((0,)), jnp.zeros((0,)))
    # Only looked at: no gradient is to pay for it.
    nll_BT = jax.lax.stop_gradient(nll_BT)
    return WeightedSum(components.split(nll_BT * weights_BT), components.split(weights_BT))


def chunked_cross_entropy(
    logits_of: Callable[[jax.Array], jax.Array],
    hidden_BTD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    config: LossConfig,
    components: Components | None = None,
) -> TokenLosses:
    """Sums the loss without ever holding the logits of more than `config.chunk` positions per row.

    The logits of a chunk are computed, reduced and thrown away, and computed again for the gradient.

    Args:
      logits_of: maps hidden [B, t, D] to logits [B, t, V]; closes over the parameters.
      hidden_BTD: the last hidden states.
      targets_BT: i32[B, T].
      weights_BT: f32[B, T].
      config: its `chunk` may be None: everything at once.
      components: of a mixture, to be told apart; or None.
    """
    length = hidden_BTD.shape[1]
    chunk = config.chunk
    if chunk is None or chunk >= length:
        return cross_entropy(logits_of(hidden_BTD), targets_BT, weights_BT, config, components)
    count = 0 if components is None else components.count
    ids_BT = jnp.zeros_like(targets_BT) if components is None else components.ids
    padding = -length % chunk

    def split(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        # Position t goes to piece t % pieces: where devices divide the length, each has its part of every piece.
        return jnp.moveaxis(padded.reshape(x.shape[0], chunk, -1, *x.shape[2:]), 2, 0)

    @jax.checkpoint
    def body(total: TokenLosses, piece: tuple[jax.Array, ...]) -> tuple[TokenLosses, None]:
        hidden_BtD, targets_Bt, weights_Bt, ids_Bt = piece
        told = None if components is None else Components(ids_Bt, count)
        part = cross_entropy(logits_of(hidden_BtD), targets_Bt, weights_Bt, config, told)
        return jax.tree.map(jnp.add, total, part), None

    none, each = jnp.zeros((), jnp.float32), jnp.zeros((count,), jnp.float32)
    zero = TokenLosses(none, none, none, none, WeightedSum(each, each))
    total, _ = jax.lax.scan(body, zero, (split(hidden_BTD), split(targets_BT), split(weights_BT), split(ids_BT)))
    return total
