"""A run that is killed and started again has the history of one that never was, bit for bit."""

import signal

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.system import runs

pytestmark = pytest.mark.system


def _arrays(workdir, step):
    folder = workdir / "checkpoints" / str(step)
    with ocp.StandardCheckpointer() as reader:
        items = {item: reader.restore(folder / item) for item in ("params", "state")}
    items["state"]["key"] = jax.random.key_data(items["state"]["key"])
    return items


def test_killed_twice_and_stopped_once_equals_unbroken(tmp_path):
    source = runs.write_corpus(tmp_path / "corpus")
    flags = runs.tiny_flags(source, **{"model.dropout_rate": 0.1, "num_microbatches": 2})
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    code, _, err = runs.run("lm.train", *flags, f"--workdir={whole}")
    assert code == 0, err
    for after in (60, 150):
        process = runs.start("lm.train", *flags, f"--workdir={broken}")
        runs.wait_for_step(process, broken, after)
        process.send_signal(signal.SIGKILL)
        assert runs.finish(process)[0] == -signal.SIGKILL
    process = runs.start("lm.train", *flags, f"--workdir={broken}")
    runs.wait_for_step(process, broken, 200)
    process.send_signal(signal.SIGTERM)
    code, _, err = runs.finish(process)
    assert code == 75, err
    assert "The same command goes on from here" in err
    code, _, err = runs.run("lm.train", *flags, f"--workdir={broken}")
    assert code == 0, err
    expected, got = runs.history(whole), runs.history(broken)
    assert [line["step"] for line in got] == list(range(1, 301))
    assert got == expected
    assert runs.history(whole, "validation")[-1] == runs.history(broken, "validation")[-1]
    a, b = _arrays(whole, 300), _arrays(broken, 300)
    jax.tree.map(np.testing.assert_array_equal, a, b)
