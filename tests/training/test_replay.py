"""Replay: the batch of any step, bit for bit, for every objective, checked against the log; and as a program."""

import dataclasses
import json

import numpy as np
import pytest

from lm import config as configs
from lm.config import ConfigError
from lm.data import Bytes, join_digests, load_tokenizer, train_batches
from lm.evaluation import cells
from lm.evaluation.heldout import make_evaluate
from lm.experiment import CheckpointConfig, LoggingConfig
from lm.training.logging import read_metrics
from lm.training.loop import train
from lm.training.order import chain
from lm.training.replay import first_rows, replay, segments, show, to_json
from lm.training.workdir import WorkdirError
from tests.system import runs
from tests.training.experiments import tiny

RUNS = {" on ".join(key): run for key, run in cells.cells().items() if not run.problems()}
# One architecture for each objective is enough: the batch knows no model but by its layout.
CHOSEN = {name.split(" on ")[0] + "/" + run.model.layout: run for name, run in RUNS.items()}


def _log(workdir, run, every, steps):
    """Writes what a run of `steps` steps leaves behind, without a model; returns the batches that it read."""
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps(configs.to_json(run)))
    tokenizer = load_tokenizer(run.data.tokenizer, run.data, workdir / "tokenizer")
    batches = train_batches(run.data, run.objective, tokenizer, run.batch_size)
    order, read, lines = "", [], []
    for step in range(1, steps + 1):
        batch = next(batches)
        order = chain(order, join_digests(batches.digests()))
        read.append((batch, batches.document_ids()))
        if step % every == 0:
            lines.append(json.dumps({"step": step, "split": "train", "data_order": order}) + "\n")
    (workdir / "metrics.jsonl").write_text("".join(lines))
    batches.close()
    return read


@pytest.mark.parametrize("name", CHOSEN)
def test_every_objective_is_replayed_bit_for_bit(name, tmp_path, corpus):
    run = dataclasses.replace(CHOSEN[name], num_steps=6)
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, source=corpus, sources=()))
    read = _log(tmp_path / "run", run, 2, 4)
    replayed, vocabulary, _ = replay(str(tmp_path / "run"), 3)
    batch, ids = read[2]
    for got, expected in zip(replayed.batch, batch, strict=True):
        np.testing.assert_array_equal(got, expected)
    assert replayed.document_ids == ids
    assert (replayed.number, replayed.checked) == (3, 4)
    found = list(segments(replayed))
    assert [one["document"] for one in found] == ids
    assert sum(len(one["inputs"]) for one in found) == np.count_nonzero(batch.segment_ids)
    np.testing.assert_allclose(sum(sum(one["weights"]) for one in found), batch.weights.sum(), rtol=1e-6)
    lines = list(show(replayed, vocabulary, run.objective.traits.component_names))
    assert sum(line.startswith("  targets") for line in lines) == len(ids)
    json.dumps(to_json(replayed))


def test_what_is_shown_is_what_was_written(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "one.txt").write_text("to be\n")
    data = dataclasses.replace(tiny(f"{tmp_path}/text/*.txt").data, validation_fraction=0.0, tokenizer=Bytes())
    run = tiny(data=data, batch_size=1)
    _log(tmp_path / "run", run, 1, 1)
    replayed, vocabulary, _ = replay(str(tmp_path / "run"), 1)
    lines = list(show(first_rows(replayed, 1), vocabulary, ()))
    assert "one.txt#0" in lines[2]
    assert r"to be\n" in lines[3]
    assert lines[4].startswith(r"  targets  to be\n")


def test_a_trained_run_is_checked_at_its_logged_steps(tmp_path, corpus):
    """Sparse logging, checkpoints in between, worker processes: step 5 is proven by the line of step 6."""
    run = tiny(corpus, num_steps=7, checkpoint=CheckpointConfig(every=3, keep_last=1), logging=LoggingConfig(every=6))
    workdir = tmp_path / "run"
    assert train(run, str(workdir), make_evaluate)
    assert [line["step"] for line in read_metrics(workdir / "metrics.jsonl") if line["split"] == "train"] == [1, 6, 7]
    for step, checked in ((1, 1), (2, 6), (5, 6), (7, 7)):
        assert replay(str(workdir), step)[0].checked == checked, step
    text = (workdir / "metrics.jsonl").read_text()
    order = next(line for line in read_metrics(workdir / "metrics.jsonl") if line["step"] == 6)["data_order"]
    (workdir / "metrics.jsonl").write_text(text.replace(order, "0" * 16))
    with pytest.raises(WorkdirError, match="up to step 6"):
        replay(str(workdir), 4)


def test_what_cannot_be_replayed_is_told_in_one_sentence(tmp_path, corpus):
    run = tiny(corpus)
    _log(tmp_path / "run", run, 1, 2)
    with pytest.raises(ConfigError, match=r"steps of .* are 1 to 6"):
        replay(str(tmp_path / "run"), 7)
    with pytest.raises(ConfigError, match=r"no config\.json"):
        replay(str(tmp_path / "none"), 1)
    assert replay(str(tmp_path / "run"), 5)[0].checked is None
    (tmp_path / "run" / "run.json").write_text(json.dumps({"starts": [{"data_fingerprint": "another"}]}))
    with pytest.raises(WorkdirError, match="the text changed"):
        replay(str(tmp_path / "run"), 1)
    ends = dataclasses.replace(run, num_steps=1000, data=dataclasses.replace(run.data, num_epochs=1))
    _log(tmp_path / "ends", ends, 1, 2)
    with pytest.raises(ConfigError, match="the data end after"):
        replay(str(tmp_path / "ends"), 1000)


@pytest.mark.system
def test_the_program_prints_the_batch(trained):
    code, out, err = runs.run("lm.replay", f"--workdir={trained}", "--step=4", "--json", "--rows=2")
    assert code == 0, err
    found = json.loads(out)
    assert (found["step"], found["checked"]) == (4, 4)
    assert {one["row"] for one in found["examples"]} == {0, 1}
    code, out, err = runs.run("lm.replay", f"--workdir={trained}", "--step=99")
    assert (code, out) == (2, "")
    assert err.strip().endswith("are 1 to 6")
