"""`python -m lm.plan` as a process: a plan beside XLA's figures, and its sentences."""

import pytest

from tests.system import runs

pytestmark = pytest.mark.system
TINY = ("--config=configs/llama3.py:tiny", "--devices=4", "--config.mesh.data=1", "--config.mesh.fsdp=4")


def _end(*flags):
    process = runs.start("lm.plan", *flags)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def test_plans_and_compiles_for_devices_that_are_not_here():
    status, out, err = _end(*TINY, "--hardware=h100", "--compile")
    assert status == 0, err
    assert "mesh fsdp 4: 4 devices; 8 rows of 64 tokens a step" in out
    arguments = next(line.split() for line in out.splitlines() if line.startswith("  arguments"))
    assert arguments[1:3] == arguments[4:6]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--hardware=v99",), "--hardware=v99 is not known; there are v4, v5e"),
        (("--config.mesh.tensor=3",), "config.mesh: fsdp 4 x tensor 3 makes 12 devices, there are 4"),
        (("--topology=v5e:2x2x2",), "v5e has 2 dimensions, not 3"),
        (("--topology=v5e:4x4",), "has 16 devices, --devices=4"),
    ],
)
def test_what_is_wrong_is_one_sentence(flags, sentence):
    status, out, err = _end(*TINY, *flags)
    assert (status, out) == (2, "")
    assert sentence in err
    assert err.count("\n") == 1
