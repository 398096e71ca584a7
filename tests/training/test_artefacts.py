"""Runs that released versions left behind load and continue with the figures that they had then."""

import json
import pathlib
import shutil

import numpy as np
import pytest

import lm
from lm.evaluation.heldout import make_evaluate
from lm.training.assembly import load_run
from lm.training.logging import read_metrics
from lm.training.loop import train
from lm.training.workdir import read_config

ROOT = pathlib.Path(__file__).parent.parent.parent
ARTEFACTS = sorted(path for path in (ROOT / "tests" / "training" / "artefacts").iterdir() if path.name[0].isdigit())


def test_this_version_left_one():
    assert lm.__version__ in [path.name for path in ARTEFACTS]
    assert f'version="{lm.__version__}"' in (ROOT / "setup.py").read_text()


@pytest.mark.parametrize("artefact", ARTEFACTS, ids=lambda path: path.name)
def test_released_run_loads_and_continues(artefact, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    workdir = tmp_path / "run"
    shutil.copytree(artefact / "run", workdir)
    assert load_run(str(workdir)).step == 2
    # As it stands on disk: fields that came later have their defaults and are no other config.
    assert train(read_config(workdir), str(workdir), make_evaluate)
    lines = {(line["step"], line["split"]): line for line in read_metrics(workdir / "metrics.jsonl")}
    for expected in json.loads((artefact / "expected.json").read_text()):
        got = lines[expected.pop("step"), expected.pop("split")]
        # float32 sums, in another order on another number of devices or by another compiler.
        for name, value in expected.items():
            np.testing.assert_allclose(got[name], value, rtol=2e-5, err_msg=name)
    assert not list((workdir / "checkpoints").glob("*.damaged"))
