"""Losses of a mixture's components: the same as if the loss had been on that component's tokens alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.batch import WeightedSum
from lm.experiment import LossConfig
from lm.objectives import Causal, Component, FillInTheMiddle, Mixture
from lm.optim import build_optimizer
from lm.training.state import init_state
from lm.training.step import make_train_step, means
from tests.training.experiments import TOKENIZER, one_device, random_batch, tiny

MIXTURE = Mixture(
    components=tuple(
        Component(name=name, objective=objective)
        for name, objective in [("lm", Causal()), ("fim", FillInTheMiddle()), ("rare", Causal())]
    )
)


def _metrics(config, batch):
    model = config.model.build()
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    optimizer = build_optimizer(config.optimizer, config.num_steps, shapes, model.axes())
    with one_device():
        state = jax.jit(lambda: init_state(model, optimizer, jnp.asarray(0), None))()
        _, metrics = jax.jit(make_train_step(config, model, optimizer, TOKENIZER.token_bytes))(state, batch)
    return means(jax.device_get(metrics))


@pytest.mark.parametrize(("chunk", "num_microbatches"), [(None, 1), (5, 2)])
def test_components_are_told_apart(chunk, num_microbatches):
    batch = random_batch()
    ids = np.where(batch.segment_ids == 2, 1, 0).astype(np.int32)
    config = tiny(loss=LossConfig(chunk=chunk), num_microbatches=num_microbatches)
    mixed = _metrics(dataclasses.replace(config, objective=MIXTURE), batch._replace(components=ids))
    for number, name in enumerate(["lm", "fim"]):
        alone = _metrics(config, batch._replace(weights=batch.weights * (ids == number)))
        np.testing.assert_allclose(mixed[f"nll/{name}"], alone["nll"], rtol=1e-5)
        assert mixed[f"loss_tokens/{name}"] == alone["loss_tokens"]
    assert mixed["loss_tokens/lm"] + mixed["loss_tokens/fim"] == mixed["loss_tokens"]
    assert mixed["loss_tokens/rare"] == 0
    # The mean over nothing is no figure.
    assert "nll/rare" not in mixed
    # To look changes nothing.
    plain = _metrics(config, batch)
    for name in ("loss", "gradient_norm"):
        np.testing.assert_allclose(mixed[name], plain[name], rtol=1e-6)


def test_figures_of_one_name_are_numbered_so_that_they_sort():
    loads = jnp.arange(12.0) / 66
    found = means(jax.device_get({"loss": jnp.float32(2.0), "load": WeightedSum(loads * 3.0, jnp.float32(3.0))}))
    assert list(found) == [*(f"load/{i:02}" for i in range(12)), "loss"]
    np.testing.assert_allclose([found[f"load/{i:02}"] for i in range(12)], loads, rtol=1e-6)
    assert means({"load": WeightedSum(np.zeros(3), np.float32(0.0))}) == {}
