"""How the next token is drawn from logits: greedy, temperature, top-k, top-p.

Knows no model, cache or text. Law: a row's token is a function of its own logits and key only.
"""

import dataclasses

import jax
import jax.numpy as jnp


def _first_highest(logits_BV: jax.Array) -> jax.Array:
    """Returns i32[B], as `jnp.argmax` of rows without NaN, by two plain maxima.

    XLA:CPU runs a reduction of pairs element by element: 0.87 ms for 32 rows of 8,192, these 0.18.
    """
    highest_B1 = jnp.max(logits_BV, axis=1, keepdims=True)
    # Float32 holds every id exactly up to 2^24, and its maximum is the one that is vectorised.
    ids_1V = jnp.arange(logits_BV.shape[1], dtype=jnp.float32)[None]
    last = float(logits_BV.shape[1] - 1)
    return -jnp.max(jnp.where(logits_BV == highest_B1, -ids_1V, -last), axis=1).astype(jnp.int32)


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
