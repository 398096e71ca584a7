"""The same steps on any mesh: data, fsdp, tensor and their products agree with each other in float32."""

import dataclasses

import jax
import numpy as np
import pytest

from lm.config import ConfigError
from lm.models import MixtureOfExperts
from lm.optim import SGD, Constant, OptimizerConfig
from lm.parallel import MeshConfig
from lm.training.assembly import assemble
from lm.training.step import make_train_step
from tests.training.experiments import TOKENIZER, random_batch, tiny

MESHES = {
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(data=1, fsdp=8),
    "data x fsdp": MeshConfig(data=2, fsdp=4),
    "fsdp x tensor": MeshConfig(data=1, fsdp=4, tensor=2),
    "data x fsdp x tensor": MeshConfig(data=2, fsdp=2, tensor=2),
}


def _run(mesh: MeshConfig):
    # Plain descent: Adam would blow rounding of near-zero gradients up to whole steps.
    descent = OptimizerConfig(rule=SGD(), schedule=Constant(), learning_rate=0.5)
    config = tiny(mesh=mesh, model=dataclasses.replace(tiny().model, dropout_rate=0.1), optimizer=descent)
    assembly = assemble(config, TOKENIZER)
    state = assembly.init()
    step = jax.jit(make_train_step(config, assembly.model, assembly.optimizer, TOKENIZER.token_bytes))
    history = []
    with assembly.placed():
        for number in range(3):
            state, metrics = step(state, assembly.place(random_batch(rows=8, seed=number)))
            history.append([float(metrics[name]) for name in ("loss", "gradient_norm", "parameter_norm")])
    return np.array(history), jax.device_get(state.params)


@pytest.fixture(scope="module")
def expected():
    return _run(MESHES["data"])


@pytest.mark.parametrize("name", [n for n in MESHES if n != "data"])
def test_the_mesh_does_not_change_the_run(name, expected):
    history, params = _run(MESHES[name])
    np.testing.assert_allclose(history, expected[0], rtol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), params, expected[1])


def test_an_expert_count_that_does_not_divide_is_named():
    experts = MixtureOfExperts(num_experts=6, num_selected=2)
    config = tiny(model=dataclasses.replace(tiny().model, mlp=experts), mesh=MeshConfig(data=2, expert=4))
    with pytest.raises(ConfigError, match=r"config\.mesh\.expert 4 does not divide the 6 experts of decoder/"):
        assemble(config, TOKENIZER)


def test_fsdp_divides_parameters_and_optimizer_state():
    assembly = assemble(tiny(mesh=MESHES["fsdp"]), TOKENIZER)
    state = assembly.init()
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves((state.params, state.opt_state)))
    local = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves((state.params, state.opt_state)))
    # Norm scales stay whole; everything else is an eighth.
    assert local < whole / 8 * 1.2
