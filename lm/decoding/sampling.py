"""How the next token is drawn from logits: greedy, temperature, top-k, top-p.

Knows no model, cache or text. Law: a row's token is a function of its own logits and key only.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from lm.parallel import is_divided


def _blocks(logits_BV: jax.Array) -> jax.Array:
    """Returns f32[B, N, M], rows in N blocks, at most sqrt(V): one, where V is prime or devices may divide it.

    Of blocks, XLA:CPU makes sums and maxima in parallel, and a second look need not read all of them.
    """
    rows, size = logits_BV.shape
    number = 1 if is_divided() else max(n for n in range(1, math.isqrt(size) + 1) if size % n == 0)
    return logits_BV.reshape(rows, number, size // number)


def _first(is_so_BM: jax.Array) -> jax.Array:
    """Returns i32[B], the first place that is so, by a plain maximum: XLA:CPU runs the pairs of an argmax one by one.

    Float32 holds every id exactly up to 2^24, and its maximum is the one that is vectorised.
    """
    size = is_so_BM.shape[1]
    ids_1M = jnp.arange(size, dtype=jnp.float32)[None]
    return -jnp.max(jnp.where(is_so_BM, -ids_1M, 1.0 - size), axis=1).astype(jnp.int32)


def _first_highest(logits_BV: jax.Array) -> jax.Array:
    """Returns i32[B], as `jnp.argmax` of rows without NaN: the first block that has the maximum, and its place there.

    32 rows of 8,192 take XLA:CPU 0.1 ms so, of 50,257 0.5; argmax takes 0.9 and 5.
    """
    blocks_BNM = _blocks(logits_BV)
    highest_BN = jnp.max(blocks_BNM, axis=2)
    highest_B1 = jnp.max(highest_BN, axis=1, keepdims=True)
    if highest_BN.shape[1] == 1:
        return _first(logits_BV == highest_B1)
    block_B = _first(highest_BN == highest_B1)
    block_BM = jnp.take_along_axis(blocks_BNM, block_B[:, None, None], axis=1)[:, 0]
    return block_B * blocks_BNM.shape[2] + _first(block_BM == highest_B1)


def log_probability(logits_BV: jax.Array, ids_B: jax.Array) -> jax.Array:
    """Returns f32[B], of one token in each row, under softmax(logits); what is common to a row's logits cancels."""
    blocks_BNM = _blocks(logits_BV)
    highest_BN = jnp.max(blocks_BNM, axis=2)
    highest_B1 = jnp.max(highest_BN, axis=1, keepdims=True)
    # A block of nothing but -inf has no highest that could be subtracted.
    from_BN = jnp.where(highest_BN == -jnp.inf, 0.0, highest_BN)
    sums_BN = jnp.sum(jnp.exp(blocks_BNM - from_BN[:, :, None]), axis=2)
    total_B1 = jnp.sum(sums_BN * jnp.exp(highest_BN - highest_B1), axis=1, keepdims=True)
    return (jnp.take_along_axis(logits_BV, ids_B[:, None], axis=1) - highest_B1 - jnp.log(total_B1))[:, 0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Draws from softmax(logits / temperature), cut to the top k, then to the top p of what is left.

    The order is that of `transformers`. Tokens that tie with the last one kept are kept too, so that
    the outcome never depends on the order of equal logits.

    Attributes:
      temperature: 0 is greedy: the most likely token, the lowest id among equals.
      top_k: keep the k most likely tokens; None for all.
      top_p: keep the fewest most likely tokens whose probabilities sum to at least p (nucleus
        sampling, Holtzman et al., 2020); None for all.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def filter(self, logits_BV: jax.Array) -> jax.Array:
        """Returns f32[B, V], logits of the distribution that is drawn from; -inf for what is cut off.

        Needs a temperature above 0.
        """
        logits_BV = logits_BV.astype(jnp.float32) / self.temperature
        if self.top_k is not None:
            highest_Bk, _ = jax.lax.top_k(logits_BV, min(self.top_k, logits_BV.shape[1]))
            logits_BV = jnp.where(logits_BV >= highest_Bk[:, -1:], logits_BV, -jnp.inf)
        if self.top_p is not None:
            descending_BV = -jnp.sort(-logits_BV, axis=1)
            probability_BV = jax.nn.softmax(descending_BV, axis=1)
            # The mass above a token: its own does not count, so that the one that crosses p stays.
            above_BV = jnp.cumsum(probability_BV, axis=1) - probability_BV
            lowest_B1 = jnp.min(jnp.where(above_BV < self.top_p, descending_BV, jnp.inf), axis=1, keepdims=True)
            logits_BV = jnp.where(logits_BV >= lowest_B1, logits_BV, -jnp.inf)
        return logits_BV

    def sample(self, logits_BV: jax.Array, keys: jax.Array) -> jax.Array:
        """Draws i32[B], one token a row.

        Args:
          logits_BV: f32[B, V], the model's.
          keys: key[B], one a row.
        """
        if self.temperature == 0:
            return _first_highest(logits_BV)
        return jax.vmap(jax.random.categorical)(keys, self.filter(logits_BV)).astype(jnp.int32)

    def problems(self) -> list[str]:
        """Returns one sentence for each reason why these settings cannot work."""
        problems = []
        if self.temperature < 0:
            problems.append(f"temperature is {self.temperature}; it is 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            problems.append(f"top_k is {self.top_k}; it is 1 or more, or None for all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            problems.append(f"top_p is {self.top_p}; it is above 0 and at most 1, or None for all tokens")
        return problems
