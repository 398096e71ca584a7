"""The train step: microbatches are one batch, bad numbers change nothing, counts are counts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import deepseek_v3
from lm.batch import WeightedSum
from lm.experiment import LossConfig
from lm.models import Electra, Encoder, Output
from lm.optim import SGD, Adafactor, Average, Lion, Muon, OptimizerConfig, build_optimizer
from lm.training.state import init_state
from lm.training.step import compute_sums, gradients, make_evaluation_step, make_train_step
from tests.training.experiments import TOKENIZER, one_device, random_batch, tiny


def _parts(config):
    model = config.model.build()
    params = jax.eval_shape(model.init, jax.random.key(0))
    return model, build_optimizer(config.optimizer, config.num_steps, params, model.axes())


def _state(config):
    model, optimizer = _parts(config)
    make = jax.jit(lambda: init_state(model, optimizer, jnp.asarray(0), config.optimizer.average))
    return model, optimizer, make()


AVERAGED = tiny(optimizer=dataclasses.replace(tiny().optimizer, average=Average(decay=0.5, warmup=False)))


@functools.cache
def _averaged_step():
    """The first state and the compiled step of `AVERAGED`."""
    model, optimizer, state = _state(AVERAGED)
    return state, jax.jit(make_train_step(AVERAGED, model, optimizer, TOKENIZER.token_bytes))


@pytest.mark.parametrize("num", [2, 4])
def test_microbatches_are_one_batch(num):
    config = tiny(loss=LossConfig(z_loss=1e-3))
    model = config.model.build()
    batch, key = random_batch(), jax.random.key(0)
    with one_device():
        params = jax.jit(model.init)(key)
        whole, sums = jax.jit(lambda p, b: gradients(model, p, b, key, config))(params, batch)
        pieces = dataclasses.replace(config, num_microbatches=num)
        parts, part_sums = jax.jit(lambda p, b: gradients(model, p, b, key, pieces))(params, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), whole, parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), sums, part_sums)


@pytest.mark.parametrize("kind", [Encoder, Electra])
def test_microbatches_divide_labels_once(kind):
    """Rows have two, one or no label, and uneven padding: means of means would weigh them unequally."""
    sizes = {"generator_dim": 16, "generator_heads": 2, "generator_mlp_dim": 16, "generator_layers": 1}
    sizes = sizes if kind is Electra else {"num_classes": 3}
    batch = random_batch()
    segments = batch.segment_ids.copy()
    segments[2, 4:] = 0
    labels = np.zeros(batch.weights.shape, np.float32)
    labels[0, [0, 8]] = labels[1, 0] = labels[3, [0, 8]] = 1
    batch = batch._replace(
        segment_ids=segments, label_weights=labels, label_targets=(np.cumsum(labels, axis=1) % 3).astype(np.int32)
    )
    model = kind(vocab_size=TOKENIZER.size, num_layers=1, model_dim=16, num_heads=2, mlp_dim=16, **sizes).build()
    # Draws of Electra's generator depend on the microbatch; with sharp logits they are always the same.
    key = jax.random.key(0)
    results = []
    with one_device():
        params = jax.jit(model.init)(key)
        if kind is Electra:
            params["generator"]["head"]["bias"] = params["generator"]["head"]["bias"].at[70].set(1e4)
        for num in (1, 2):
            config = tiny(num_microbatches=num)
            results.append(jax.jit(lambda p, b, c=config: gradients(model, p, b, key, c))(params, batch)[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *results)


class _Fixed:
    """A model whose loss at each position is the input there, and whose parameter scales it."""

    def apply(self, params, batch, *, key, with_logits):
        # Two logits whose cross-entropy at target 0 is the wanted one.
        loss = batch.inputs.astype(jnp.float32) * params["scale"]
        hidden = jnp.stack([jnp.zeros_like(loss), jnp.log(jnp.expm1(loss))], -1)
        return Output(hidden, None, {}, {}, None, {})

    def logits(self, params, hidden):
        return hidden

    def loss_weights(self, batch):
        return {}


def test_normalisation_known_answer():
    """facts/objectives 1.4: microbatches with sums 6 (3 tokens) and 4 (1 token): 2.5, not 3 and not 6."""
    batch = jax.tree.map(lambda x: x[:2, :4], random_batch())
    # split_microbatches gives row r to microbatch r % num.
    batch = batch._replace(
        inputs=np.array([[1, 2, 3, 9], [4, 9, 9, 9]], np.int32),
        targets=np.zeros((2, 4), np.int32),
        weights=np.array([[1, 1, 1, 0], [1, 0, 0, 0]], np.float32),
    )
    config = tiny(batch_size=2, num_microbatches=2)
    params = {"scale": jnp.ones(())}
    grads, ((tokens, _, _), _) = gradients(_Fixed(), params, batch, jax.random.key(0), config)
    np.testing.assert_allclose(tokens.loss / tokens.weight, 2.5, rtol=1e-6)
    np.testing.assert_allclose(grads["scale"], 2.5, rtol=1e-6)


class _WithRouter(_Fixed):
    """Adds a loss of its own, as routers do."""

    def apply(self, params, batch, *, key, with_logits):
        output = super().apply(params, batch, key=key, with_logits=with_logits)
        return output._replace(losses={"balance": WeightedSum(8.0 * params["scale"], jnp.asarray(4.0))})


def test_losses_of_the_model_are_added_once():
    batch = random_batch()
    batch = batch._replace(inputs=batch.inputs % 7 + 1, targets=np.zeros((4, 16), np.int32))
    for num in (1, 2):
        config = tiny(num_microbatches=num)
        with_router, _ = gradients(_WithRouter(), {"scale": jnp.ones(())}, batch, jax.random.key(0), config)
        without, _ = gradients(_Fixed(), {"scale": jnp.ones(())}, batch, jax.random.key(0), config)
        np.testing.assert_allclose(with_router["scale"] - without["scale"], 2.0, rtol=1e-4)


def test_step_trains_and_averages():
    with one_device():
        state, step = _averaged_step()
        batch = random_batch()
        losses = []
        for _ in range(8):
            before = state
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
            expected = jax.tree.map(lambda a, p: 0.5 * a + 0.5 * p, before.average, state.params)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), expected, state.average)
    assert losses[-1] < losses[0] - 0.5
    assert int(state.step) == 8
    # Bits per byte of a byte tokenizer: nats per token / ln 2, since every target is a byte.
    np.testing.assert_allclose(metrics["bits_per_byte"], metrics["nll"] / np.log(2), rtol=1e-5)


def test_bad_numbers_change_nothing_but_the_counter():
    with one_device():
        state, step = _averaged_step()
        broken = jax.tree.map(np.array, state.params)
        for leaf in jax.tree.leaves(broken):
            leaf[(0,) * leaf.ndim] = np.nan
        bad = state._replace(params=broken)
        new, metrics = step(bad, random_batch())
        assert metrics["skipped"] == 1.0
        jax.tree.map(np.testing.assert_array_equal, new.params, broken)
        jax.tree.map(np.testing.assert_array_equal, new.opt_state, state.opt_state)
        jax.tree.map(np.testing.assert_array_equal, new.average, state.average)
        assert int(new.step) == 1
        _, metrics = step(state, random_batch())
        assert metrics["skipped"] == 0.0


def test_chunked_loss_gives_the_same_step():
    with one_device():
        results = []
        for chunk in (None, 5):
            config = tiny(loss=LossConfig(chunk=chunk, z_loss=1e-4))
            model, optimizer, state = _state(config)
            step = jax.jit(make_train_step(config, model, optimizer, TOKENIZER.token_bytes))
            results.append(step(state, random_batch())[1])
    for name in ("loss", "gradient_norm", "accuracy"):
        np.testing.assert_allclose(results[0][name], results[1][name], rtol=1e-5)


def test_evaluation_counts_every_target():
    config = tiny()
    model = config.model.build()
    batch = random_batch()
    with one_device():
        params = jax.jit(model.init)(jax.random.key(0))
        (tokens, _, _), counts = jax.jit(make_evaluation_step(config.loss, model, TOKENIZER.token_bytes))(params, batch)
        (expected, _, _), _ = jax.jit(lambda p, b: compute_sums(model, p, b, None, LossConfig()))(params, batch)
    counted = batch.weights > 0
    np.testing.assert_array_equal(counts["targets"], np.bincount(batch.targets[counted], minlength=TOKENIZER.size))
    assert counts["loss_tokens"] == counted.sum()
    assert counts["seen_tokens"] == (batch.segment_ids > 0).sum()
    np.testing.assert_allclose(tokens.nll, expected.nll, rtol=1e-6)


def test_dropout_depends_on_the_step_and_on_nothing_else():
    config = tiny(
        model=dataclasses.replace(tiny().model, dropout_rate=0.3), optimizer=OptimizerConfig(learning_rate=0.0)
    )
    with one_device():
        model, optimizer, state = _state(config)
        step = jax.jit(make_train_step(config, model, optimizer, TOKENIZER.token_bytes))
        batch = random_batch()
        second, first = step(state, batch)
        _, again = step(state, batch)
        _, other = step(second, batch)
    assert first["loss"] == again["loss"]
    assert first["loss"] != other["loss"]


def _mixture():
    """DeepSeek's tiny model without the losses that are over a batch, so that microbatches can be compared."""
    model = deepseek_v3.get_model("tiny")
    return dataclasses.replace(model, mlp=dataclasses.replace(model.mlp, load_balance=0.0))


def _biases(params):
    return params["decoder"]["stack"]["layers"]["block_0"]["mlp"]["router_bias"]


def test_routers_are_balanced_by_the_counts_of_all_microbatches():
    config = tiny(model=_mixture(), optimizer=OptimizerConfig(decayed="everything", learning_rate=1e-3))
    batch, results = random_batch(), []
    with one_device():
        for num in (1, 4):
            model, optimizer, state = _state(dataclasses.replace(config, num_microbatches=num))
            step = make_train_step(
                dataclasses.replace(config, num_microbatches=num), model, optimizer, TOKENIZER.token_bytes
            )
            counts = jax.jit(model.apply)(state.params, batch).statistics
            state, metrics = jax.jit(step)(state, batch)
            results.append((state.params, metrics))
    (whole, metrics), (pieces, metrics_of_pieces) = results
    load = np.asarray(_biases(counts))
    np.testing.assert_array_equal(_biases(whole), np.float32(1e-3) * np.sign(load.mean(-1, keepdims=True) - load))
    np.testing.assert_array_equal(_biases(whole), _biases(pieces))
    assert metrics["router/max_load"] >= 1.0
    assert metrics["router/drop_rate"] == 0.0
    np.testing.assert_allclose(metrics["router/load_of_8"], load.sum(0) / load.sum(), rtol=1e-6)
    np.testing.assert_allclose(metrics_of_pieces["router/load_of_8"], metrics["router/load_of_8"], rtol=1e-6)
    assert metrics["skipped"] == 0.0


def test_every_rule_knows_the_axes_of_experts():
    for rule in (Adafactor(), Muon(), Lion(), SGD()):
        config = tiny(model=deepseek_v3.get_model("tiny"), optimizer=OptimizerConfig(rule=rule))
        model, optimizer = _parts(config)
        params = jax.eval_shape(model.init, jax.random.key(0))
        updates, _ = jax.eval_shape(lambda p, o=optimizer: o.update(p, o.init(p), p), params)
        assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
