"""One train step: a pure function of (state, batch), the same for every model, objective and mesh.

Knows none of the three. Laws: the gradient of M microbatches is the gradient of the one batch, because
every sum is divided once by the weight of the whole batch; an update that is not finite changes
nothing but the step counter.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lm import optim
from lm.batch import Batch, WeightedSum
from lm.experiment import Experiment, LossConfig
from lm.training.losses import Components, TokenLosses, chunked_cross_entropy
from lm.training.state import TrainState, Tree, divide_gradients, fetch, keep_in_place

Metrics = dict[str, jax.Array]
TrainMetrics = dict[str, jax.Array | WeightedSum]
Sums = tuple[TokenLosses, dict[str, WeightedSum], dict[str, WeightedSum]]
Statistics = Tree  # what layers counted, for `Model.after_update`


class Updated(NamedTuple):
    """What an update changes in a `TrainState`."""

    params: Tree
    opt_state: Tree
    average: Tree


def compute_sums(
    model: Any, params: Tree, batch: Batch, key: jax.Array | None, config: LossConfig, num_components: int = 0
) -> tuple[Sums, Statistics]:
    """Runs the model on a batch and returns the token losses, the model's own losses and metrics; and its statistics.

    Args:
      model: a built model.
      params: its parameters.
      batch: [B, T] arrays.
      key: for dropout; None is deterministic.
      config: what is minimised.
      num_components: of the mixture that made the batch, whose losses are to be told apart; 0 for none.
    """
    output = model.apply(params, batch, key=key, with_logits=False)
    components = Components(batch.components, num_components) if batch.components is not None else None
    tokens = chunked_cross_entropy(
        lambda hidden_BTD: model.logits(params, hidden_BTD),
        output.hidden,
        batch.targets,
        batch.weights,
        config,
        components if num_components else None,
    )
    return (tokens, output.losses, output.metrics), output.statistics


def _mean(pair: WeightedSum) -> jax.Array:
    return pair.sum / jnp.maximum(pair.weight, 1e-9)


def split_microbatches(batch: Batch, num: int) -> Batch:
    """Returns [num, B / num, ...] arrays; row r goes to microbatch r % num, so no row changes device."""

    def split(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(x.reshape(x.shape[0] // num, num, *x.shape[1:]), 0, 1)

    return jax.tree.map(split, batch)


def gradients(model: Any, params: Tree, batch: Batch, key: jax.Array, config: Experiment) -> Any:
    """Returns the gradient of the batch's mean loss, and (the sums behind it, the model's statistics).

    Microbatches run one after another; each one's token loss is divided by the weight of the whole
    batch, and so are those of the model's own losses whose weight the batch decides (`Model.loss_weights`); its
    other losses, routers', are averaged over microbatches.
    """
    num = config.num_microbatches
    num_components = len(config.objective.traits.component_names)
    total_weight = jnp.maximum(jnp.sum(batch.weights), 1e-9)
    own_weights = {name: jnp.maximum(weight, 1e-9) for name, weight in model.loss_weights(batch).items()}

    def loss(params: Tree, batch: Batch, key: jax.Array) -> tuple[jax.Array, Any]:
        sums, statistics = compute_sums(model, params, batch, key, config.loss, num_components)
        tokens, losses, _ = sums
        value = tokens.loss / total_weight
        for name, pair in losses.items():
            value = value + (pair.sum / own_weights[name] if name in own_weights else _mean(pair) / num)
        return value, (sums, statistics)

    grad = jax.grad(loss, has_aux=True)
    if num == 1:
        return grad(params, batch, key)
    pieces = split_microbatches(batch, num)

    def body(total: Any, piece: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        part = grad(params, piece[0], jax.random.fold_in(key, piece[1]))
        return jax.tree.map(jnp.add, total, part), None

    first = jax.tree.map(lambda x: x[0], pieces)
    shapes = jax.eval_shape(grad, params, first, key)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, _ = jax.lax.scan(body, zeros, (pieces, jnp.arange(num)))
    return total


def batch_counts(batch: Batch, token_bytes: jax.Array) -> Metrics:
    """Counts, as f32[]: tokens read (encoder's too), loss tokens, and UTF-8 bytes those stand for."""
    seen = jnp.sum(batch.segment_ids != 0)
    if batch.encoder_segment_ids is not None:
        seen = seen + jnp.sum(batch.encoder_segment_ids != 0)
    counted = batch.weights > 0
    return {
        "seen_tokens": seen.astype(jnp.float32),
        "loss_tokens": jnp.sum(counted).astype(jnp.float32),
        "loss_bytes": jnp.sum(jnp.where(counted, token_bytes[batch.targets], 0)).astype(jnp.float32),
    }


def describe(sums: Sums, counts: Metrics) -> Metrics:
    """Turns sums into the means that are logged: loss and nll in nats a token, bits a byte, accuracy."""
    tokens, losses, extra = sums
    weight = jnp.maximum(tokens.weight, 1e-9)
    nll = tokens.nll / weight
    # Weights other than 0 and 1 cancel: nats per token times tokens per byte.
    bits = nll * counts["loss_tokens"] / jnp.maximum(counts["loss_bytes"], 1.0) / np.log(2.0)
    found = {"loss": tokens.loss / weight, "nll": nll, "bits_per_byte": bits, "accuracy": tokens.correct / weight}
    found |= {f"loss/{name}": _mean(pair) for name, pair in losses.items()}
    found |= {name: _mean(pair) for name, pair in extra.items()}
    return found | counts


def describe_components(parts: WeightedSum, names: tuple[str, ...]) -> TrainMetrics:
    """Returns, for each component of a mixture, nll/NAME (nats a token, as a pair) and loss_tokens/NAME, its weight."""
    found: TrainMetrics = {f"nll/{name}": WeightedSum(parts.sum[i], parts.weight[i]) for i, name in enumerate(names)}
    return found | {f"loss_tokens/{name}": parts.weight[i] for i, name in enumerate(names)}


def means(metrics: TrainMetrics) -> dict[str, float]:
    """Returns plain figures of metrics on the host.

    A mean over nothing is left out, and N figures of one name are name/0, name/1, and so on.
    """
    found = {}
    for name, value in metrics.items():
        if isinstance(value, WeightedSum):
            if not value.weight > 0:
                continue
            value = np.asarray(value.sum, np.float64) / value.weight
        found |= _named(name, np.asarray(value))
    return found


def _named(name: str, value: np.ndarray) -> dict[str, float]:
    if not value.ndim:
        return {name: float(value)}
    width = len(str(len(value) - 1))  # so that sorted by name is sorted by number
    return {f"{name}/{i:0{width}}": float(figure) for i, figure in enumerate(value)}


def make_train_step(
    config: Experiment, model: Any, optimizer: optax.GradientTransformationExtraArgs, token_bytes: np.ndarray
) -> Callable[[TrainState, Batch], tuple[TrainState, TrainMetrics]]:
    """Returns the pure train step; jit it with the state donated.

    The metrics are f32[] scalars, or f32[N] for N figures of one name: those of `describe`, gradient_norm,
    parameter_norm, learning_rate, and skipped (1 where the update was left out, because the loss or the gradient was
    not finite, or because they were out of the bounds of `config.health.spikes`, where there are any; then `spike`
    tells which); for a mixture of objectives also those of `describe_components`, pairs whose weight is 0 where a batch
    has nothing of a component.

    Args:
      config: the run.
      model: a built model.
      optimizer: a built optimizer.
      token_bytes: i32[V], UTF-8 bytes of each token.
    """
    learning_rate_at = config.optimizer.learning_rate_at(config.num_steps)
    averaging, bounds = config.optimizer.average, config.health.spikes
    names = config.objective.traits.component_names

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, TrainMetrics]:
        key = jax.random.fold_in(state.key, state.step)
        grads, (sums, statistics) = gradients(model, state.params, batch, key, config)
        grads = divide_gradients(model, grads)
        squares = optim.square_sums(grads)
        norm = optim.norm(squares)
        metrics = describe(sums, batch_counts(batch, jnp.asarray(token_bytes)))
        finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])
        spike, spikes = jnp.zeros((), jnp.bool_), None
        if bounds is not None:
            spike, spikes = bounds.judge(state.spikes, metrics["loss"], norm, finite)
        good = finite & ~spike
        # Old parameters are read before the update begins, so that it can be done in their place.
        before = Updated(state.params, fetch(state.opt_state), state.average)
        before, parameter_norm = jax.lax.optimization_barrier((before, optim.norm(optim.square_sums(state.params))))

        def update(before: Updated) -> Updated:
            updates, opt_state = optimizer.update(grads, before.opt_state, before.params, squares=squares)
            params = model.after_update(before.params, optax.apply_updates(before.params, updates), statistics)
            average = None if averaging is None else averaging.update(before.average, params, state.step)
            return Updated(params, opt_state, average)

        # A branch, and not a choice element by element: that would read and copy everything once more.
        after = jax.lax.cond(good, update, lambda before: before, before)
        new = keep_in_place(model, state._replace(step=state.step + 1, spikes=spikes, **after._asdict()))
        metrics |= {
            "gradient_norm": norm,
            "parameter_norm": parameter_norm,
            "learning_rate": jnp.asarray(learning_rate_at(state.step), jnp.float32),
            "skipped": 1.0 - good.astype(jnp.float32),
        }
        if bounds is not None:
            metrics["spike"] = spike.astype(jnp.float32)
        return new, metrics | describe_components(sums[0].parts, names)

    return step


def make_evaluation_step(
    config: LossConfig, model: Any, token_bytes: np.ndarray
) -> Callable[[Tree, Batch], tuple[Sums, Metrics]]:
    """Returns a pure function (params, batch) -> (sums, counts), without dropout or smoothing.

    The counts are those of `batch_counts` and `targets`: i32[V], how often each id was a target.

    Args:
      config: gives the chunk; the loss measured is the plain negative log-likelihood.
      model: a built model.
      token_bytes: i32[V], UTF-8 bytes of each token.
    """
    plain = LossConfig(chunk=config.chunk)

    def step(params: Tree, batch: Batch) -> tuple[Sums, Metrics]:
        sums, _ = compute_sums(model, params, batch, None, plain)
        counted = (batch.weights > 0).astype(jnp.int32)
        histogram = jnp.zeros(len(token_bytes), jnp.int32).at[batch.targets].add(counted)
        return sums, batch_counts(batch, jnp.asarray(token_bytes)) | {"targets": histogram}

    return step
