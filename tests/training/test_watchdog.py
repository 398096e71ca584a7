"""The watchdog: silent on usual steps, one report for a slow one, with the phase and the place in the program."""

import time

import pytest

from lm.experiment import EvaluationConfig
from lm.training.events import Events, read_events
from lm.training.timeline import Timeline
from lm.training.watchdog import Watchdog
from tests.training.test_timeline import Clock, _spend, _steps

PATIENCE = 120.0


@pytest.fixture
def watched(tmp_path):
    clock, said = Clock(), []
    timeline = Timeline(clock=clock)
    return clock, timeline, Watchdog(timeline, Events(tmp_path), lambda: 6, said.append, PATIENCE), said


def _hang_here(watchdog):
    return watchdog.look()


def test_a_step_of_ten_medians_is_reported_once_with_its_place(watched, tmp_path):
    clock, timeline, watchdog, said = watched
    _steps(timeline, clock, 10)
    with timeline.phase("data"):
        clock.now += 9.9
        assert not watchdog.look()
        clock.now += 0.2
        assert _hang_here(watchdog)
        assert not watchdog.look()
        clock.now += 11
        assert watchdog.look()  # twice as long
    assert not watchdog.look()
    first, second = read_events(tmp_path, "slow")
    assert (first["phase"], first["step"]) == ("data", 7)
    assert first["seconds"] == pytest.approx(10.1)
    assert first["usual_seconds"] == pytest.approx(1.0)
    assert any("_hang_here" in line for line in first["stack"])
    assert second["seconds"] == pytest.approx(21.1)
    assert "step 7 is in phase data for 10.1 s; a usual one takes 1 s" in said[0]


def test_what_has_no_usual_time_is_told_by_the_limit_of_the_config_and_each_time_it_doubled(watched):
    clock, timeline, watchdog, said = watched
    with timeline.phase("compile"):
        clock.now += PATIENCE - 1
        assert not watchdog.look()
        clock.now += 2
        assert watchdog.look()
        clock.now += PATIENCE
        assert not watchdog.look()
        clock.now += 3
        assert watchdog.look()
    assert "phase compile for 121.0 s; it is one of the first of its kind, nothing is known of what is usual" in said[0]


def test_a_first_evaluation_is_measured_by_its_batches_and_a_second_by_the_first(watched):
    clock, timeline, watchdog, said = watched
    _spend(timeline, clock, "compile", 2)
    _steps(timeline, clock, 10, 0.05, 0.05)
    timeline.expect("evaluate", 8)
    with timeline.phase("evaluate"):
        clock.now += 10 * (8 * 0.1 + 2) - 0.1  # ten times its eight steps and a compilation as long as the step's
        assert not watchdog.look()
        clock.now += 0.2
        assert watchdog.look()
    assert "it is one of the first of its kind, 28 s would be much" in said[0]
    timeline.expect("evaluate", 10_000)
    other = Timeline(clock=clock)
    _steps(other, clock, 10)
    other.expect("evaluate", 10_000)
    late = Watchdog(other, watchdog._events, lambda: 6, said.append, PATIENCE)
    with other.phase("evaluate"):
        clock.now += PATIENCE + 1  # an estimate of a day and more keeps nobody quiet
        assert late.look()
    _spend(other, clock, "save", 3)
    with other.phase("save"):
        clock.now += 29
        assert not late.look()
        clock.now += 2
        assert late.look()
    assert len(said) == 3


def test_an_evaluation_is_compared_with_evaluations(watched):
    clock, timeline, watchdog, _ = watched
    _steps(timeline, clock, 10)
    for _ in range(5):
        _spend(timeline, clock, "evaluate", 60)
    with timeline.phase("evaluate"):
        clock.now += 500
        assert not watchdog.look()


def test_an_evaluation_of_the_whole_split_is_not_compared_with_those_of_some_batches(watched):
    clock, timeline, watchdog, said = watched
    config = EvaluationConfig(num_batches=2)
    for _ in range(5):
        _spend(timeline, clock, config.phase(whole=False), 2)
    with timeline.phase(config.phase(whole=True)):
        clock.now += PATIENCE - 1
        assert not watchdog.look()
        clock.now += 2
        assert watchdog.look()
    assert "it is one of the first of its kind, nothing is known" in said[0]
    assert not any(timeline.stalls.values())
    # Where all are of the whole split they are of one kind.
    assert EvaluationConfig().phase(whole=True) == EvaluationConfig().phase(whole=False)


def test_a_recompilation_is_told_once(watched, tmp_path):
    _, timeline, watchdog, said = watched
    assert not watchdog.look()
    assert not said
    timeline.recompilations = 1
    with watchdog.watching(interval=60.0):
        pass
    timeline.recompilations = 2
    watchdog.look()
    assert len(said) == 1
    assert said[0].startswith("recompiled: a program was compiled again at step 7 or the one before it")
    (event,) = read_events(tmp_path, "recompiled")
    assert (event["step"], event["recompilations"]) == (7, 1)


def test_the_thread_looks_by_itself_and_ends(tmp_path):
    said = []
    timeline = Timeline(factor=2, least_seconds=0.01)
    for _ in range(5):
        with timeline.phase("step"):
            time.sleep(0.001)
        timeline.step_done()
    with Watchdog(timeline, Events(tmp_path), lambda: 5, said.append, PATIENCE).watching(0.005), timeline.phase("step"):
        deadline = time.monotonic() + 20
        while not said and time.monotonic() < deadline:
            time.sleep(0.005)
    assert "step 6 is in phase step" in said[0]
