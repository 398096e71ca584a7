"""Checkpoints: what is saved comes back bit for bit; damage falls back to the one before and says so."""

import contextlib
import errno
import os
import re
import resource
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.experiment import CheckpointConfig
from lm.training import checkpoints as checkpoints_module
from lm.training.assembly import assemble
from lm.training.checkpoints import CheckpointError, Checkpoints, restore_params
from lm.training.manifests import write_manifest
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


def _flip(folder):
    """Changes one bit in the middle of the largest file."""
    largest = max((p for p in (folder / "params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    return largest.relative_to(folder).as_posix()


def test_a_flipped_bit_falls_back_and_names_the_file(tmp_path, assembly, caplog):
    checkpoints, states = _save(tmp_path, assembly, 2)
    checkpoints.close()
    name = _flip(tmp_path / "checkpoints" / "2")
    with caplog.at_level("WARNING"):
        assert restore_params(tmp_path, assembly.state.params)[0] == 1
        checkpoints = Checkpoints(tmp_path, CheckpointConfig())
        found = checkpoints.restore(assembly.state)
    assert (found.step, found.damaged) == (1, [2])
    assert f"checkpoint 2 is damaged ({name} holds other bytes than were written)" in caplog.text
    _equal(found.state, states[0])
    assert (tmp_path / "checkpoints" / "2.damaged" / name).exists()
    checkpoints.close()


@contextlib.contextmanager
def _no_file_over(size):
    """The disk takes no file of more bytes, as if it were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def _full_for_the_manifest():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints_module, "write_manifest", _raise_full)
        yield


def _raise_full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("full", [lambda: _no_file_over(2000), _full_for_the_manifest], ids=["arrays", "manifest"])
def test_a_full_disk_loses_nothing_and_is_tried_again(tmp_path, assembly, caplog, full):
    checkpoints, states = _save(tmp_path, assembly, 1, CheckpointConfig(keep_last=1))
    two, three = list(_states(assembly, 3))[1:]
    with full():
        checkpoints.save(two, {"at": 2})
        with pytest.raises(
            CheckpointError, match=r"step 2 could not be saved in .*; the newest checkpoint is of step 1"
        ):
            checkpoints.wait()
    assert "checkpoint 2 could not be saved" in caplog.text
    assert checkpoints.steps() == [1]
    _equal(checkpoints.restore(assembly.state).state, states[0])
    checkpoints.save(three, {"at": 3})
    checkpoints.wait()
    assert checkpoints.steps() == [3]
    _equal(checkpoints.restore(assembly.state).state, three)
    checkpoints.close()
    assert not [p.name for p in (tmp_path / "checkpoints").iterdir() if "tmp" in p.name]


def test_a_folder_that_is_gone_or_cannot_be_used(tmp_path, assembly):
    checkpoints, _ = _save(tmp_path, assembly, 1)
    two, three = list(_states(assembly, 3))[1:]
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").write_text("not a folder")
    checkpoints.save(two, {"at": 2})
    with pytest.raises(CheckpointError, match=r"step 2 could not be saved in .*; there is no checkpoint"):
        checkpoints.wait()
    (tmp_path / "checkpoints").unlink()
    checkpoints.save(three, {"at": 3})
    checkpoints.wait()
    assert checkpoints.restore(assembly.state).step == 3
    checkpoints.close()


def test_the_clock_does_not_order_checkpoints(tmp_path, assembly):
    checkpoints, _ = _save(tmp_path, assembly, 3)
    checkpoints.close()
    for step in (1, 2, 3):
        for path in [tmp_path / "checkpoints" / str(step), *(tmp_path / "checkpoints" / str(step)).rglob("*")]:
            os.utime(path, (1e9 - step * 1e6, 1e9 - step * 1e6))
    assert restore_params(tmp_path, assembly.state.params)[0] == 3
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep_last=2))
    assert checkpoints.restore(assembly.state).step == 3
    checkpoints.save(list(_states(assembly, 4))[3], {"at": 4})
    checkpoints.wait()
    assert checkpoints.steps() == [3, 4]
    checkpoints.close()


def test_a_slow_disk_delays_the_next_save_and_nothing_else(tmp_path, assembly, monkeypatch):
    written = []

    def slow(folder, facts):
        # While this one is not proven, the one before it stands.
        assert [step for step in written if not (tmp_path / "checkpoints" / str(step)).is_dir()] == written[:-1]
        time.sleep(0.3)
        write_manifest(folder, facts)
        written.append(facts["step"])

    monkeypatch.setattr(checkpoints_module, "write_manifest", slow)
    checkpoints, _ = _save(tmp_path, assembly, 3, CheckpointConfig(keep_last=1))
    assert (written, checkpoints.steps()) == ([1, 2, 3], [3])
    checkpoints.close()


def test_an_interrupted_deletion_is_finished(tmp_path, assembly):
    checkpoints, _ = _save(tmp_path, assembly, 2)
    checkpoints.close()
    left = (tmp_path / "checkpoints" / "1").rename(tmp_path / "checkpoints" / "1.deleted")
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    assert checkpoints.steps() == [2]
    assert not left.exists()
    checkpoints.close()


def test_the_best_is_kept_over_a_restart(tmp_path, assembly):
    config = CheckpointConfig(keep_last=1, keep_best=1)
    checkpoints, _ = _save(tmp_path, assembly, 3, config, nll=[3.0, 1.0, 2.0])
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path, config)
    checkpoints.save(list(_states(assembly, 4))[3], {"at": 4}, {"nll": 1.5})
    checkpoints.wait()
    assert checkpoints.steps() == [2, 4]
    checkpoints.close()
