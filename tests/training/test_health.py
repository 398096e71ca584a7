"""Bad numbers in a run: left out, rolled back or the end of it, and the same again after a kill."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from lm.experiment import CheckpointConfig, HealthConfig
from lm.optim import RollBack, Skip
from lm.training.advance import Advance
from lm.training.events import read_events
from lm.training.health import SickRunError
from lm.training.logging import read_metrics
from lm.training.loop import train
from lm.training.replay import replay
from lm.training.workdir import read_config
from tests.system import runs
from tests.training.experiments import tiny
from tests.training.poison import Killed, Poison

BOUNDS = {"window": 2, "loss_factor": None, "norm_factor": 20.0}


def _nothing_held_out(assembly):
    return lambda params, whole, check: {}


def _train(run, workdir):
    return train(run, str(workdir), _nothing_held_out)


def _history(workdir):
    lines = read_metrics(workdir / "metrics.jsonl")
    clock = (*runs.TIMES, *runs.TIME_PREFIXES)
    return [{k: v for k, v in line.items() if not k.startswith(clock)} for line in lines]


def _params(workdir):
    from lm.training.assembly import load_run

    return jax.device_get(load_run(str(workdir), experiment=read_config(workdir)).params)


def _run(corpus, **health):
    run = tiny(corpus, num_steps=8, checkpoint=CheckpointConfig(every=3, keep_last=3))
    return dataclasses.replace(run, health=HealthConfig(**health))


@pytest.mark.parametrize(
    ("health", "poison", "kill"),
    [
        ({}, {"not_finite": (4,)}, 6),
        ({"spikes": Skip(**BOUNDS)}, {"spikes": (5,), "not_finite": (4,)}, 6),
        # Killed when batch 5 was rolled back and before step 6, which reads batch 7, was saved.
        ({"spikes": RollBack(**BOUNDS)}, {"spikes": (5,)}, 7),
    ],
    ids=["not finite", "skip", "roll back"],
)
def test_a_killed_run_decides_alike(health, poison, kill, tmp_path, corpus, monkeypatch):
    run, whole, broken = _run(corpus, **health), tmp_path / "whole", tmp_path / "broken"
    Poison(**poison).apply(monkeypatch)
    assert _train(run, whole)
    Poison(**poison, kill=kill).apply(monkeypatch)
    with pytest.raises(Killed):
        _train(run, broken)
    Poison(**poison).apply(monkeypatch)
    assert _train(run, broken)
    history = _history(whole)
    assert [line["step"] for line in history] == list(range(1, 9))
    assert _history(broken) == history
    jax.tree.map(np.testing.assert_array_equal, _params(broken), _params(whole))
    # What was decided is done again, not decided again.
    assert len(list(read_events(broken, "roll_back"))) == len(list(read_events(whole, "roll_back")))
    bad = {*poison.get("not_finite", ()), *poison.get("spikes", ())}
    events = [event for event in read_events(whole) if event["kind"] in ("spike", "not_finite")]
    assert {event["batch"] for event in events} == bad
    rolled = isinstance(run.health.spikes, RollBack)
    assert history[-1]["skipped_steps"] == (0 if rolled else len(bad))
    for event in events:
        replayed = replay(str(whole), event["step"])[0]
        # What was passed over is no step's batch any more.
        assert replayed.number == event["batch"] + 2 * rolled
        assert rolled or replayed.document_ids == event["document_ids"]


def test_a_roll_back_passes_over_the_batches_since_the_checkpoint(tmp_path, corpus, monkeypatch):
    run, workdir = _run(corpus, spikes=RollBack(**BOUNDS)), tmp_path / "run"
    Poison(spikes=(5, 7)).apply(monkeypatch)
    assert _train(run, workdir)
    # Step 5 went back to 3 and on with batch 6; step 5 then read batch 7 and went back once more.
    assert json.loads((workdir / "rollbacks.json").read_text()) == [
        {"after": 3, "batches": 2, "spike": 5},
        {"after": 3, "batches": 2, "spike": 5},
    ]
    assert [event["to_step"] for event in read_events(workdir, "roll_back")] == [3, 3]
    for step, number in ((3, 3), (4, 8), (8, 12)):
        replayed = replay(str(workdir), step)[0]
        assert (replayed.number, replayed.checked) == (number, step)


def test_a_spike_that_comes_again_stops_the_run(tmp_path, corpus, monkeypatch):
    run, workdir = _run(corpus, spikes=RollBack(max_times=1, **BOUNDS)), tmp_path / "run"
    Poison(spikes=(5, 6)).apply(monkeypatch)
    with pytest.raises(SickRunError, match="1 roll backs to step 3 did not get past"):
        _train(run, workdir)


def test_too_many_in_a_row_stop_the_run_with_a_report(tmp_path, corpus, monkeypatch):
    run, workdir = _run(corpus, max_skipped_in_a_row=3), tmp_path / "run"
    Poison(not_finite=(2, 4, 5, 6, 7)).apply(monkeypatch)
    with pytest.raises(SickRunError) as error:
        _train(run, workdir)
    (event,) = read_events(workdir, "stopped")
    assert event["step"] == 6
    assert event["document_ids"] == replay(str(workdir), 6)[0].document_ids
    report = str(error.value)
    assert report.startswith("stopped at step 6: 3 updates in a row were not finite or out of bounds")
    assert "every activation is finite, and the loss of tokens is not" in report
    assert event["document_ids"][0] in report
    assert f"python -m lm.replay --workdir={workdir} --step=6" in report


def test_a_step_is_computed_twice_and_told_if_a_bit_differs(tmp_path, corpus, monkeypatch):
    plain, twice = tmp_path / "plain", tmp_path / "twice"
    run = dataclasses.replace(_run(corpus), num_steps=4)
    assert _train(run, plain)
    again = dataclasses.replace(run, health=HealthConfig(recompute_every=2))
    assert _train(again, twice)
    assert _history(twice) == _history(plain)
    # The first step of its kind is compiled, not compiled again.
    assert {line["recompilations"] for line in read_metrics(twice / "metrics.jsonl") if line["split"] == "train"} == {0}
    assert not list(read_events(twice, "recompiled"))
    made = Advance.__init__

    def broken_hardware(self, assembly):
        made(self, assembly)
        healthy, calls = self._repeatable, []

        def flip_a_bit(state, batch):
            new, metrics = healthy(state, batch)
            calls.append(1)
            if len(calls) == 4:
                path = new.params["decoder"]["final_norm"]
                scale = np.asarray(path["scale"]).copy()
                scale.view(np.uint32)[3] ^= 1
                path["scale"] = jax.device_put(scale, path["scale"].sharding)
            return new, metrics

        self._repeatable = flip_a_bit

    monkeypatch.setattr(Advance, "__init__", broken_hardware)
    with pytest.raises(
        SickRunError, match=r"step 4 was computed twice and differs in 1 arrays, first in .*scale, in 1"
    ):
        _train(again, tmp_path / "sick")


def test_the_same_run_has_the_same_figures_with_other_workers_too(tmp_path, corpus):
    histories = []
    for number, workers in enumerate((0, 0, 2)):
        run = dataclasses.replace(_run(corpus), num_steps=4)
        run = dataclasses.replace(run, data=dataclasses.replace(run.data, num_workers=workers))
        assert _train(run, tmp_path / str(number))
        histories.append(_history(tmp_path / str(number)))
    assert histories[0] == histories[1] == histories[2]
    assert all(line["data_order"] for line in histories[0])


@pytest.mark.system
def test_a_sick_run_ends_with_a_status_of_its_own(tmp_path):
    """A learning rate beyond reason: the first update is finite, and no number after it."""
    source = runs.write_corpus(tmp_path / "corpus")
    changes = {"optimizer.learning_rate": 1e30, "optimizer.clip_norm": "none", "optimizer.schedule": "Constant"}
    flags = runs.tiny_flags(source, **changes, **{"health.max_skipped_in_a_row": 3, "num_steps": 50})
    code, _, err = runs.run("lm.train", *flags, f"--workdir={tmp_path / 'run'}")
    assert code == 70, err
    assert "train: stopped at step 4: 3 updates in a row" in err
    assert "the first module with an activation that is not finite is decoder/" in err
