"""The search for the first number that is not finite: by layer and module, and silent on healthy models."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.models import MixtureOfExperts
from lm.training.assembly import assemble
from lm.training.diagnosis import find_first_bad
from tests.training.experiments import TOKENIZER, random_batch, tiny

BLOCK = ("decoder", "stack", "layers", "block_0")


@pytest.fixture(scope="module")
def parts():
    assembly = assemble(tiny(), TOKENIZER)
    return assembly, jax.device_get(assembly.init().params)


def _changed(params, path, index, value):
    params = jax.tree.map(np.copy, params)
    leaf = params
    for name in path:
        leaf = leaf[name]
    leaf[index] = value
    return jax.tree.map(jnp.asarray, params)


def _find(assembly, params, batch=None):
    return find_first_bad(assembly, params, batch or random_batch(8), jax.random.key(0))


def test_the_layer_and_the_module_are_named(parts):
    assembly, params = parts
    # Finite, and products with it are not.
    sick = _changed(params, (*BLOCK, "mlp", "up", "kernel"), (1, slice(None), 0), 3e38)
    found = _find(assembly, sick)
    assert found.endswith("an activation that is not finite is decoder/stack/layers/block_0/mlp/up (layer 1)"), found


def test_a_parameter_and_a_loss_are_told_from_activations(parts):
    assembly, params = parts
    sick = _changed(params, (*BLOCK, "attention", "query", "kernel"), (0, 0, 0, 0), np.nan)
    assert "parameter decoder/stack/layers/block_0/attention/query/kernel" in _find(assembly, sick)
    batch = random_batch(8)
    batch = batch._replace(weights=np.full_like(batch.weights, np.inf))
    assert "the loss of tokens is not" in _find(assembly, params, batch)


def test_a_healthy_model_has_nothing_to_find(parts):
    assembly, params = parts
    assert _find(assembly, jax.tree.map(jnp.asarray, params)) == "every activation, loss and gradient is finite"


@pytest.mark.slow
def test_a_healthy_model_of_experts_with_remat_has_nothing_to_find():
    model = dataclasses.replace(tiny().model, num_layers=1, remat="full", mlp=MixtureOfExperts(num_experts=4))
    assembly = assemble(tiny(model=model), TOKENIZER)
    params = assembly.init().params
    assert _find(assembly, params) == "every activation, loss and gradient is finite"
