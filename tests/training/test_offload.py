"""State on the host: the same bits as on the devices, saved and restored to where it was; 8-bit moments on the way."""

import types

import jax
import numpy as np
import pytest

from lm.config import ConfigError
from lm.experiment import CheckpointConfig
from lm.optim import AdamW8Bit, Constant, OptimizerConfig
from lm.parallel import MeshConfig, Sharding
from lm.training.assembly import assemble
from lm.training.checkpoints import Checkpoints
from lm.training.division import check_memory
from lm.training.step import make_train_step
from tests.training.experiments import TOKENIZER, random_batch, tiny


class _Run:
    """A run of two layers on eight devices."""

    def __init__(self, on_host):
        optimizer = OptimizerConfig(rule=AdamW8Bit(block=32), schedule=Constant(), learning_rate=1e-2)
        sharding = Sharding(optimizer_on_host=on_host)
        config = tiny(mesh=MeshConfig(data=2, fsdp=4), sharding=sharding, optimizer=optimizer)
        self.assembly = assembly = assemble(config, TOKENIZER)
        step = make_train_step(config, assembly.model, assembly.optimizer, TOKENIZER.token_bytes)
        self.step = jax.jit(step, donate_argnums=0)

    def __call__(self, state, *numbers):
        losses = []
        with self.assembly.placed():
            for number in numbers:
                state, metrics = self.step(state, self.assembly.place(random_batch(rows=8, seed=number)))
                losses.append(float(metrics["loss"]))
        return state, losses


def _kinds(state):
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state) if leaf.ndim}


def _assert_equal(one, other):
    found, wanted = jax.device_get(((one.params, one.opt_state), (other.params, other.opt_state)))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_state_on_the_host_trains_alike_and_is_restored_there(tmp_path):
    on_devices, on_host = _Run(False), _Run(True)
    assembly = on_host.assembly
    plain, expected = on_devices(on_devices.assembly.init(), 0, 1)
    state, losses = on_host(assembly.init(), 0, 1)
    assert losses == expected
    assert _kinds(plain.opt_state) == {"device"}
    assert _kinds(state.opt_state) == _kinds(assembly.state.opt_state) == {"pinned_host"}
    assert _kinds(state.params) == {"device"}
    _assert_equal(state, plain)
    places = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s.sharding, x.ndim), state, assembly.state)
    assert all(jax.tree.leaves(places))
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(state, {}, None)
    checkpoints.wait()
    found = checkpoints.restore(assembly.state)
    checkpoints.close()
    assert _kinds(found.state.opt_state) == {"pinned_host"}
    _assert_equal(found.state, plain)
    went_on, resumed = on_host(found.state, 2)
    unbroken, direct = on_devices(plain, 2)
    assert resumed == direct
    _assert_equal(went_on, unbroken)


def test_devices_that_cannot_read_the_host_are_refused():
    device = types.SimpleNamespace(device_kind="abacus", addressable_memories=list)
    mesh = types.SimpleNamespace(devices=np.array([device]))
    check_memory(Sharding(), mesh)
    with pytest.raises(ConfigError, match=r"sharding\.optimizer_on_host.*abacus"):
        check_memory(Sharding(optimizer_on_host=True), mesh)
