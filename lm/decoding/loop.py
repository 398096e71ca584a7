"""The decoding loop: prefill, then one token a step, jitted, over the model's own cache.

Knows no architecture: it uses `apply(params, batch, cache=...)`, `logits` and `init_cache` of any
model. Knows no text. Laws: with and without cache the same; a row's tokens do not depend on the rows
beside it; generating at once or in chunks is the same.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.batch import Batch
from lm.decoding.prompts import DecodingError, Prompts
from lm.decoding.sampling import Sampling, log_probability


class State(NamedTuple):
    """What the loop carries. M is `Decoder.max_tokens`.

    Attributes:
      cache: the model's.
      key: key[], of the whole run; rows and steps are folded in.
      rows: i32[B], the number that keys each row's randomness.
      step: i32[], how many tokens each unfinished row has.
      places: i32[B], place of each row's next token, counted from its first.
      sources: i32[B], as in `Prompts`.
      gaps: i32[B], as in `Prompts`.
      done: bool[B], whether the row has made a stop token.
      tokens: i32[B, M], what was made; 0 beyond `lengths`.
      log_probs: f32[B, M], log-probability of each under the model itself (temperature 1, nothing cut).
      lengths: i32[B], how many were made, the stop token included.
    """

    cache: Any
    key: Any
    rows: Any
    step: Any
    places: Any
    sources: Any
    gaps: Any
    done: Any
    tokens: Any
    log_probs: Any
    lengths: Any


class Generation(NamedTuple):
    """What was generated, on the host. Fields as in `State`."""

    tokens: np.ndarray
    log_probs: np.ndarray
    lengths: np.ndarray
    done: np.ndarray

    def row(self, i: int) -> np.ndarray:
        """Returns i32[lengths[i]], the tokens of row i, the stop token included."""
        return self.tokens[i, : self.lengths[i]]


def _padded(tokens: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns segment ids (1, and 0 for padding) and positions of prompts, both i32[B, T]."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    is_real = positions < lengths[:, None]
    # Padding may be longer than a table of positions, and what lies beyond such a table is not a number.
    return is_real.astype(jnp.int32), jnp.where(is_real, positions, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoder:
    """Generates with one model. One compilation serves all prompts of one padded shape.

    Attributes:
      model: an `lm.models.Model`, or anything with its `apply`, `logits` and `init_cache`.
      sampling: how a token is drawn.
      max_tokens: most tokens made for a prompt.
      stop_ids: a row ends when it makes one of these (the tokenizer's eos).
      num_ids: ids from here on are never made (rows that fill up the model's table); None for all.
      banned_ids: ids below that which are never made either (special tokens).
      bidirectional_prompt: whether the tokens of a prompt's source see each other both ways (a prefix LM).
      strides: how far apart the positions and the second positions of neighbours are in the answer; see
        `lm.document.Frame`.
    """

    model: Any
    sampling: Sampling = Sampling()
    max_tokens: int = 128
    stop_ids: tuple[int, ...] = ()
    num_ids: int | None = None
    banned_ids: tuple[int, ...] = ()
    bidirectional_prompt: bool = False
    strides: tuple[int, int] = (1, 0)

    @functools.partial(jax.jit, static_argnums=0)
    def start(self, params: Any, prompts: Prompts, key: jax.Array) -> State:
        """Reads the prompts (an encoder's too, once) and makes the first token of each row."""
        num_rows, length = prompts.tokens.shape
        segment_ids, positions = _padded(prompts.tokens, prompts.lengths)
        sources = prompts.lengths if prompts.sources is None else prompts.sources
        gaps = sources - 1 if prompts.gaps is None else prompts.gaps
        batch = self._batch(prompts.tokens, segment_ids, positions, sources, gaps)
        if prompts.encoder_tokens is not None and prompts.encoder_lengths is not None:
            encoder_segment_ids, encoder_positions = _padded(prompts.encoder_tokens, prompts.encoder_lengths)
            batch = batch._replace(
                encoder_inputs=prompts.encoder_tokens,
                encoder_segment_ids=encoder_segment_ids,
                encoder_positions=encoder_positions,
            )
        cache = self.model.init_cache(params, num_rows, length + self.max_tokens - 1, batch)
        empty = not self.bidirectional_prompt
        output = self.model.apply(params, batch, cache=cache, empty=empty, with_logits=False)
        last_B11 = (prompts.lengths - 1)[:, None, None]
        state = State(
            cache=output.cache,
            key=key,
            rows=prompts.rows,
            step=jnp.int32(0),
            places=prompts.lengths,
            sources=sources,
            gaps=gaps,
            done=jnp.zeros((num_rows,), bool),
            tokens=jnp.zeros((num_rows, self.max_tokens), jnp.int32),
            log_probs=jnp.zeros((num_rows, self.max_tokens), jnp.float32),
            lengths=jnp.zeros((num_rows,), jnp.int32),
        )
        return self._append(params, state, jnp.take_along_axis(output.hidden, last_B11, axis=1))

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
    def advance(self, params: Any, state: State, until: jax.Array) -> State:
        """Makes tokens until each row has `until` (i32[]) of them or is done. Consumes `state`."""
        until = jnp.minimum(until, self.max_tokens)
        shapes = jax.tree.map(jnp.shape, state.cache)

        def carry(state: State) -> State:
            # Without an axis of one row: XLA:CPU writes a cache with it and without, and copies both for each token.
            return state._replace(cache=jax.tree.map(lambda x: x[0] if x.shape[:1] == (1,) else x, state.cache))

        def is_unfinished(state: State) -> jax.Array:
            return (state.step < until) & ~jnp.all(state.done)

        def make_one(state: State) -> State:
            last_B1 = jax.lax.dynamic_slice_in_dim(state.tokens, state.step - 1, 1, axis=1)
            # A finished row is padding from now on: it reads nothing and nothing reads it.
            segment_ids = (~state.done).astype(jnp.int32)[:, None]
            batch = self._batch(last_B1, segment_ids, (state.places - 1)[:, None], state.sources, state.gaps)
            cache = jax.tree.map(jnp.reshape, state.cache, shapes)
            output = self.model.apply(params, batch, cache=cache, with_logits=False)
            return carry(self._append(params, state._replace(cache=output.cache), output.hidden))

        state = jax.lax.while_loop(is_unfinished, make_one, carry(state))
        return state._replace(cache=jax.tree.map(jnp.reshape, state.cache, shapes))

    def _batch(
        self, tokens: jax.Array, segment_ids: jax.Array, places: jax.Array, sources: jax.Array, gaps: jax.Array
    ) -> Batch:
        """Returns a batch of which nothing is to be predicted.

        Args:
          tokens: i32[B, T].
          segment_ids: i32[B, T].
          places: i32[B, T], counted from the first token of the row.
          sources: i32[B], as in `Prompts`.
          gaps: i32[B], as in `Prompts`.
        """
        # How far into the answer: 0 in the source, whose places are its positions.
        inside = jnp.maximum(places - (sources - 1)[:, None], 0)
        stride, second_stride = self.strides
        # On from the source's end, or all at the gap.
        answers = stride * places + (1 - stride) * gaps[:, None]
        return Batch(
            inputs=tokens,
            targets=jnp.zeros_like(tokens),
            weights=jnp.zeros(tokens.shape, jnp.float32),
            segment_ids=segment_ids,
            positions=jnp.where(inside > 0, answers, places),
            bidirectional=(inside == 0) & self.bidirectional_prompt,
            block_positions=second_stride * inside,
        )

    def _append(self, params: Any, state: State, hidden_B1D: jax.Array) -> State:
        """Draws the next token of each row from its hidden state."""
        logits_BV = self.model.logits(params, hidden_B1D)[:, 0].astype(jnp.float32)
        keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(state.key, row), state.step))(state.rows)
        choices_BV = logits_BV
        if self.num_ids is not None or self.banned_ids:
            allowed_V = jnp.arange(logits_BV.shape[1]) < (logits_BV.shape[1] if self.num_ids is None else self.num_ids)
            allowed_V = allowed_V.at[jnp.asarray(self.banned_ids, jnp.int32)].set(False)
            choices_BV = jnp.where(allowed_V[None], logits_BV, -jnp.inf)
        drawn = self.sampling.sample(choices_BV, keys)
        token = jnp.where(state.done, 0, drawn)
        log_prob = jnp.where(state.done, 0.0, log_probability(logits_BV, token))[:, None]
        stops = functools.reduce(jnp.logical_or, [token == i for i in self.stop_ids], jnp.zeros_like(state.done))
        going = (~state.done).astype(jnp.int32)
        return state._replace(
            step=state.step + 1,
            places=state.places + going,
            done=state.done | stops,
            tokens=jax.lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], state.step, axis=1),
            log_probs=jax.lax.dynamic_update_slice_in_dim(state.log_probs, log_prob, state.step, axis=1),
            lengths=state.lengths + going,
        )

    def generate(self, params: Any, prompts: Prompts, seed: int = 0) -> Generation:
        """Generates for every prompt at once; call inside `lm.parallel.use(mesh, rules)`.

        Raises:
          DecodingError: see `check`.
        """
        self.check(prompts)
        state = self.advance(params, self.start(params, prompts, jax.random.key(seed)), np.int32(self.max_tokens))
        return Generation(*jax.device_get((state.tokens, state.log_probs, state.lengths, state.done)))

    def stream(self, params: Any, prompts: Prompts, seed: int = 0, chunk: int = 4) -> Iterator[list[np.ndarray]]:
        """Yields, for every row, the tokens made since the last time, about `chunk` steps apart.

        The tokens are those of `generate`. Call inside `lm.parallel.use(mesh, rules)`.

        Raises:
          DecodingError: see `check`.
        """
        self.check(prompts)
        state, seen = self.start(params, prompts, jax.random.key(seed)), np.zeros(len(prompts.lengths), np.int32)
        while True:
            tokens, lengths, done, step = jax.device_get((state.tokens, state.lengths, state.done, state.step))
            yield [row[begin:end] for row, begin, end in zip(tokens, seen, lengths, strict=True)]
            if step >= self.max_tokens or done.all():
                return
            seen = lengths
            state = self.advance(params, state, np.int32(step + chunk))

    def check(self, prompts: Prompts) -> None:
        """Checks what would otherwise fail deep inside, or silently.

        Raises:
          DecodingError: the settings, or the prompts with `max_tokens`, cannot work with this model.
        """
        problems = self.sampling.problems()
        if self.max_tokens < 1:
            problems.append(f"max_tokens is {self.max_tokens}; it is 1 or more")
        longest, limit = int(np.max(prompts.lengths)), self.model.config.max_length
        # The last token made is never read.
        if longest + self.max_tokens - 1 > limit:
            problems.append(
                f"a prompt of {longest} tokens and max_tokens {self.max_tokens} exceed the model's max_length {limit}; "
                "shorten the prompt or lower max_tokens"
            )
        second = self.strides[1] * self.max_tokens  # the last second position that is read
        if second >= max(self.model.config.num_block_positions, 1):
            problems.append(
                f"max_tokens {self.max_tokens} exceeds the second positions that the model has inside a blank; "
                f"give at most {self.model.config.num_block_positions - 1}"
            )
        if prompts.encoder_lengths is not None and int(np.max(prompts.encoder_lengths)) > limit:
            longest = int(np.max(prompts.encoder_lengths))
            problems.append(f"an encoder prompt of {longest} tokens exceeds the model's max_length {limit}; shorten it")
        if problems:
            raise DecodingError("; ".join(problems))
