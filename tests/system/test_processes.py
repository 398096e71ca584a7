"""Many processes: a run moves between meshes of processes and devices as if nothing had changed, and ends cleanly."""

import dataclasses
import fcntl
import itertools
import json
import os
import signal
import time

import jax
import numpy as np
import pytest

from lm import parallel
from lm.evaluation.heldout import make_evaluate
from lm.parallel import MeshConfig, processes
from lm.training.events import read_events
from lm.training.loop import train
from tests.system import experiments, runs

pytestmark = pytest.mark.system

PREEMPTED = 75


def _hold_up(process, workdir):
    """Lets a process stand still until the watchdog of the first one has told of it; returns where both stand."""
    earlier = len(list(read_events(workdir, "slow")))
    for _ in range(8):
        process.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + 8
        while time.monotonic() < deadline:
            for event in itertools.islice(read_events(workdir, "slow"), earlier, None):
                first, held = event["processes"]
                if held["silent_seconds"] > 1.5 and held["step"] > 0:
                    process.send_signal(signal.SIGCONT)
                    return first, held
            time.sleep(0.05)
        # It met the first evaluation of this start, of which nobody knows how long it usually takes.
        process.send_signal(signal.SIGCONT)
        time.sleep(0.3)
    raise AssertionError("the watchdog told nothing of a process that stands still")


def _wait_for_evaluation(process, workdir):
    """Waits until a step is logged after which there is an evaluation, and that is not."""
    while process.poll() is None:
        last = (workdir / "metrics.jsonl").read_text().splitlines()[-1]
        if last.endswith("}") and '"train"' in last and json.loads(last)["step"] % 4 == 0:
            return
        time.sleep(0.001)


def _stop_all(started, workdir, after, victim):
    """Asks one process to stop when the run has logged a step; returns (status, messages) of all."""
    try:
        runs.wait_for_step(started[0], workdir, after)
        if len(started) == 2:
            first, held = _hold_up(started[1], workdir)
            assert first["silent_seconds"] < held["silent_seconds"]
            assert held["phase"]
        _wait_for_evaluation(started[0], workdir)
        started[victim].send_signal(signal.SIGTERM)
        ended = [runs.finish(process, 120) for process in started]
        return [(code, err) for code, _, err in ended]
    finally:
        for process in started:
            process.kill()


def _stopping_evaluate(left):
    """Asks this process to stop at an evaluation inside the loop, after `left`; the next start has to make it."""

    def make(assembly):
        evaluate, coming = make_evaluate(assembly), itertools.count()

        def wrapped(params, whole, check):
            if not whole and next(coming) == left:
                os.kill(os.getpid(), signal.SIGTERM)
            return evaluate(params, whole, check)

        return wrapped

    return make


@pytest.fixture
def experiment(tmp_path):
    """Half of the devices shard the parameters; saved only when it is asked to stop."""
    return experiments.decoder(
        tmp_path / "text",
        mesh=MeshConfig(data=-1, fsdp=2),
        num_steps=80,
        evaluation=dataclasses.replace(experiments.decoder(tmp_path / "text").evaluation, every=4),
        checkpoint=dataclasses.replace(experiments.decoder(tmp_path / "text").checkpoint, every=1000),
    )


def _leg(experiment, flags, workdir, shape, before, monkeypatch):
    """Goes on with a run as so many processes of so many devices each until it is asked to stop; returns its step."""
    number, devices = shape
    if number == 1:
        with monkeypatch.context() as patch:
            if devices == 1:
                patch.setattr(parallel, "build_mesh", lambda _: _one_device())
            # What was stopped at an evaluation makes it first.
            assert not train(experiment, str(workdir), _stopping_evaluate(min(before, 1)), force_config=True)
        return runs.last_step(workdir)
    # One is asked to stop, all stop at one step with a checkpoint of it.
    started = runs.start_many("lm.train", number, devices, *flags, "--force_config")
    ended = _stop_all(started, workdir, before + 5, number // 2)
    assert [code for code, _ in ended] == [PREEMPTED] * number, "\n".join(err for _, err in ended)
    step = runs.last_step(workdir)
    assert (workdir / "checkpoints" / str(step) / "manifest.json").exists()
    assert f"stopped after step {step}; saved" in ended[0][1]
    assert number == 4 or "\nprocess 1: step " in ended[0][1]
    assert "saved" not in ended[1][1]
    return step


# Processes x devices of each.
SHAPES = [(1, 8), (4, 2), (2, 4), (1, 1)]
# From each to each of the others.
ANY = [(1, 8), (4, 2), (1, 8), (2, 4), (1, 8), (1, 1), (4, 2), (2, 4), (4, 2), (1, 1), (2, 4), (1, 1), (1, 8)]
assert sorted(itertools.pairwise(ANY)) == sorted(itertools.permutations(SHAPES, 2))
ROUTES = [
    pytest.param(SHAPES, 80, id="1x8 4x2 2x4 1x1"),
    pytest.param(ANY, 120, id="any direction", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("route", "num_steps"), ROUTES)
def test_a_run_moves_between_processes_and_devices(tmp_path, experiment, monkeypatch, route, num_steps):
    experiment = dataclasses.replace(experiment, num_steps=num_steps)
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    assert train(experiment, str(whole), make_evaluate)
    flags = [experiments.save(experiment, tmp_path / "config.json"), f"--workdir={moved}"]
    at = [0]
    for shape in route[:-1]:
        at.append(_leg(experiment, flags, moved, shape, at[-1], monkeypatch))
        assert at[-2] < at[-1] < num_steps
        assert not (moved / "processes").exists()
    with monkeypatch.context() as patch:
        if route[-1] == (1, 1):
            patch.setattr(parallel, "build_mesh", lambda _: _one_device())
        assert train(experiment, str(moved), make_evaluate, force_config=True)

    expected, got = runs.history(whole), runs.history(moved)
    assert [line["step"] for line in got] == list(range(1, num_steps + 1))
    assert [line["data_order"] for line in got] == [line["data_order"] for line in expected]
    for name in ("loss", "nll", "gradient_norm", "seen_tokens", "total_tokens"):
        np.testing.assert_allclose([line[name] for line in got], [line[name] for line in expected], rtol=1e-5)
    for before, after in zip(runs.history(whole, "validation"), runs.history(moved, "validation"), strict=True):
        assert (before["step"], before["tokens"], before["bytes"]) == (after["step"], after["tokens"], after["bytes"])
        np.testing.assert_allclose(before["nll"], after["nll"], rtol=1e-5)
    starts = json.loads((moved / "run.json").read_text())["starts"]
    assert [(start["devices"]["processes"], start["from_step"]) for start in starts] == [
        (number, step) for (number, _), step in zip(route, at, strict=True)
    ]


def _one_device():
    return jax.make_mesh(
        (1,) * 6, parallel.MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * 6, devices=jax.devices()[:1]
    )


def test_a_process_that_never_joins_is_named(tmp_path, experiment):
    flags = [experiments.save(experiment, tmp_path / "config.json"), f"--workdir={tmp_path / 'run'}"]
    flags += [f"--coordinator=127.0.0.1:{runs.free_port()}", "--num_processes=3", "--join_timeout=3"]
    code, _, err = runs.run("lm.train", *flags, "--process_id=0")
    # Not 2: it may be late and not wrong, and a launcher may try again.
    assert code == processes.EXIT_NOT_JOINED == 69
    assert err.strip().splitlines()[-1] == (
        "train: processes 1, 2 of 3 did not join within 3 s: look at what they say, then start all 3 again"
    )


def test_what_stops_the_first_process_stops_all(tmp_path, experiment):
    flags = [experiments.save(experiment, tmp_path / "config.json"), f"--workdir={tmp_path / 'run'}"]
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / "lock.0").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        ended = runs.run_many("lm.train", 2, 1, *flags, timeout=120)
    for code, _, err in ended:
        assert code == 2, err
        assert "is in use by process" in err
