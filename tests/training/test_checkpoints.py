"""Checkpoints: what is saved comes back bit for bit; damage falls back to the one before and says so."""

import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.experiment import CheckpointConfig
from lm.training.assembly import assemble
from lm.training.checkpoints import CheckpointError, Checkpoints, restore_params
from tests.training.experiments import TOKENIZER, tiny


@pytest.fixture(scope="module")
def assembly():
    return assemble(tiny(), TOKENIZER)


def _states(assembly, number):
    state = assembly.init()
    for step in range(1, number + 1):
        yield state._replace(
            step=jnp.asarray(step, jnp.int32), params=jax.tree.map(lambda x, s=step: x + s, state.params)
        )


def _save(folder, assembly, number, config=None, nll=None):
    checkpoints = Checkpoints(folder, config or CheckpointConfig(keep_last=10))
    states = list(_states(assembly, number))
    for step, state in enumerate(states, 1):
        checkpoints.save(state, {"at": step}, None if nll is None else {"nll": nll[step - 1]})
    checkpoints.wait()
    return checkpoints, states


def _equal(a, b):
    a, b = (x._replace(key=jax.random.key_data(x.key)) for x in (a, b))
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_round_trip_and_shardings(tmp_path, assembly):
    checkpoints, states = _save(tmp_path, assembly, 2)
    found = checkpoints.restore(assembly.state)
    assert (found.step, found.data, found.damaged) == (2, {"at": 2}, [])
    _equal(found.state, states[-1])
    jax.tree.map(lambda x, like: None if x.sharding == like.sharding else 1 / 0, found.state, assembly.state)
    checkpoints.close()


def test_no_checkpoint_is_none(tmp_path, assembly):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    assert checkpoints.restore(assembly.state) is None
    checkpoints.close()


def _truncate(folder):
    """Cuts the largest file of a checkpoint short."""
    largest = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    with largest.open("r+b") as file:
        file.truncate(largest.stat().st_size // 2)


def _remove_state(folder):
    shutil.rmtree(folder / "state")


def _remove_data_file(folder):
    next((folder / "params").rglob("d/*")).unlink()


@pytest.mark.parametrize("damage", [_truncate, _remove_state, _remove_data_file])
def test_damage_falls_back_to_the_one_before(tmp_path, assembly, damage):
    checkpoints, states = _save(tmp_path, assembly, 3)
    damage(tmp_path / "checkpoints" / "3")
    found = checkpoints.restore(assembly.state)
    assert (found.step, found.damaged) == (2, [3])
    _equal(found.state, states[1])
    # Nothing is lost, and the step can be saved again.
    assert (tmp_path / "checkpoints" / "3.damaged").exists()
    checkpoints.save(states[2], {"at": 3})
    checkpoints.wait()
    assert checkpoints.restore(assembly.state).step == 3
    checkpoints.close()


def test_all_damaged_is_an_error_and_deletes_nothing(tmp_path, assembly):
    checkpoints, _ = _save(tmp_path, assembly, 2)
    for step in (1, 2):
        _truncate(tmp_path / "checkpoints" / str(step))
    with pytest.raises(CheckpointError, match="can be read"):
        checkpoints.restore(assembly.state)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.is_dir()) == ["1", "2"]
    checkpoints.close()


def test_keeps_the_last_and_the_best(tmp_path, assembly):
    config = CheckpointConfig(keep_last=2, keep_best=1)
    checkpoints, _ = _save(tmp_path, assembly, 5, config, nll=[3.0, 1.0, 2.0, 2.5, 2.7])
    assert checkpoints.steps() == [2, 4, 5]
    checkpoints.close()


def test_params_alone(tmp_path, assembly):
    checkpoints, states = _save(tmp_path, assembly, 2)
    checkpoints.close()
    step, params = restore_params(tmp_path, assembly.state.params)
    assert step == 2
    jax.tree.map(np.testing.assert_array_equal, params, states[-1].params)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 7; there are \[1, 2\]"):
        restore_params(tmp_path, assembly.state.params, 7)
    with pytest.raises(CheckpointError, match="has no checkpoints"):
        restore_params(tmp_path / "elsewhere", assembly.state.params)


def test_params_of_another_model_are_told_by_the_first_that_differs(tmp_path, assembly):
    checkpoints, _ = _save(tmp_path, assembly, 1)
    checkpoints.close()
    like = assembly.state.params
    table = like["tokens"]["embedding"]
    longer = {**like, "tokens": {"embedding": jax.ShapeDtypeStruct((7, *table.shape[1:]), table.dtype)}}
    words = f"with shape {list(table.shape)}, which in this model has {[7, *table.shape[1:]]}"
    with pytest.raises(CheckpointError, match=f"1 holds the parameter tokens/embedding {re.escape(words)}$"):
        restore_params(tmp_path, longer)
    with pytest.raises(CheckpointError, match=r"1 lacks this model's parameter tower/kernel$"):
        restore_params(tmp_path, {**like, "tower": {"kernel": jax.ShapeDtypeStruct((3,), table.dtype)}})
    with pytest.raises(CheckpointError, match=r"1 holds the parameter .*, which this model has not \(and \d+ more\)$"):
        restore_params(tmp_path, {"tokens": like["tokens"]})
