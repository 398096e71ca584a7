"""Held-out scoring: every token once, whatever the batch size, the packing or the mesh."""

import dataclasses
import json
import math
import pathlib

import numpy as np
import pytest

from lm.evaluation.curves import draw_curves, load_history
from lm.evaluation.heldout import HeldOut, make_evaluate
from lm.parallel import MeshConfig
from lm.training.assembly import load_run
from lm.training.workdir import read_config


@pytest.fixture(scope="module")
def run(trained):
    return load_run(str(trained))


def test_the_answer_does_not_depend_on_the_batch_size(run):
    answers = [make_evaluate(run.assembly, batch_size=size)(run.params, True) for size in (1, 9, 40)]
    for other in answers[1:]:
        for name in ("tokens", "bytes", "unigram_bits_per_byte"):
            assert other[name] == answers[0][name]
        for name in ("nll", "bits_per_byte", "perplexity", "accuracy"):
            np.testing.assert_allclose(other[name], answers[0][name], rtol=1e-6)


def test_every_byte_of_the_split_is_counted_once(run, corpus):
    data = run.experiment.data
    whole = make_evaluate(run.assembly)(run.params, True)
    everything = dataclasses.replace(data, validation_fraction=1.0)
    total = make_evaluate(run.assembly, everything)(run.params, True)
    sizes = [len(p.read_bytes()) for p in pathlib.Path(corpus).parent.glob("*.txt")]
    assert total["bytes"] == sum(sizes)
    # A byte tokenizer has one token a byte, and each document an end.
    assert total["tokens"] == sum(sizes) + len(sizes)
    assert 0 < whole["bytes"] < total["bytes"]


def test_packing_does_not_change_the_answer(run):
    packed = make_evaluate(run.assembly)(run.params, True)
    alone = make_evaluate(run.assembly, dataclasses.replace(run.experiment.data, packing=False))(run.params, True)
    assert alone["tokens"] == packed["tokens"]
    np.testing.assert_allclose(alone["nll"], packed["nll"], rtol=1e-5)


def test_another_mesh_agrees(trained):
    experiment = dataclasses.replace(read_config(trained), mesh=MeshConfig(data=2, fsdp=4))
    sharded = load_run(str(trained), experiment=experiment)
    copies = load_run(str(trained), experiment=read_config(trained))
    replicated = make_evaluate(copies.assembly, batch_size=8)(copies.params, True)
    eight = make_evaluate(sharded.assembly, batch_size=8)(sharded.params, True)
    np.testing.assert_allclose(replicated["nll"], eight["nll"], rtol=1e-5)


def test_figures_known_answer():
    """Four equally common tokens of one byte each: two bits a byte; a uniform model over 16 needs four."""
    total = HeldOut(np.array([5, 5, 5, 5]), nll=20 * math.log(16), weight=20, correct=5, tokens=20, bytes=20)
    figures = total.figures()
    np.testing.assert_allclose(figures["unigram_bits_per_byte"], 2.0)
    np.testing.assert_allclose(figures["bits_per_byte"], 4.0)
    np.testing.assert_allclose(figures["perplexity"], 16.0)
    assert figures["accuracy"] == 0.25


def test_history_and_picture(trained, tmp_path):
    history = load_history(trained)
    assert [line["step"] for line in history.train] == [1, 2, 3, 4, 5, 6]
    assert history.validation[-1]["step"] == 6
    # A diverged run has figures written as strings; speeds are not in every line.
    history.train[2]["bits_per_byte"] = "nan"
    draw_curves([history, history], tmp_path / "speed.png", "tokens_per_second")
    draw_curves([history], tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_run_record(trained):
    record = json.loads((trained / "run.json").read_text())
    start = record["starts"][0]
    assert start["from_step"] == 0
    assert start["packages"]["jax"]
    assert start["mesh"]["data"] == 8
    assert len(start["data_fingerprint"]) >= 16
    assert record["config"]["type"] == "Experiment"
