"""Where time goes, by a clock that only moves when told: phases add up, stalls are told apart, goodput is a share."""

import json

import jax
import jax.numpy as jnp
import pytest

from lm.training.timeline import Timeline, age, read_seconds


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def _spend(timeline, clock, phase, seconds):
    with timeline.phase(phase):
        clock.now += seconds


def _steps(timeline, clock, number, data=0.25, step=0.75):
    for _ in range(number):
        _spend(timeline, clock, "data", data)
        _spend(timeline, clock, "step", step)
        timeline.step_done()


def test_phases_add_up_and_the_innermost_counts(clock):
    timeline = Timeline(clock=clock)
    clock.now += 2  # start
    timeline.resume({}, 0.0)
    with timeline.phase("evaluate"):
        clock.now += 3
        _spend(timeline, clock, "save", 4)
        clock.now += 1
    _steps(timeline, clock, 10)
    figures = timeline.figures()
    times = {name.removeprefix("time/"): value for name, value in figures.items() if name.startswith("time/")}
    assert times == pytest.approx({"start": 2, "evaluate": 4, "save": 4, "data": 2.5, "step": 7.5, "lost": 0})
    assert figures["goodput"] == pytest.approx(7.5 / 20)


def test_stalls_are_told_apart(clock):
    timeline = Timeline(factor=10, least_seconds=1.0, clock=clock)
    _steps(timeline, clock, 3)
    _spend(timeline, clock, "data", 50)  # nobody knows yet what is usual
    timeline.step_done()
    _steps(timeline, clock, 20)
    for _ in range(5):
        _spend(timeline, clock, "save", 30)
        _spend(timeline, clock, "evaluate", 60)
    # An evaluation takes as long as one does, however much longer than a step that is.
    assert timeline.stalls == {"data": 0, "step": 0, "save": 0, "evaluate": 0}
    _spend(timeline, clock, "data", 10.5)
    assert timeline.stalls["data"] == 1
    timeline.step_done()
    _spend(timeline, clock, "step", 9.5)
    _spend(timeline, clock, "step", 11)
    timeline.step_done()
    _spend(timeline, clock, "save", 301)
    _spend(timeline, clock, "evaluate", 599)
    assert timeline.stalls == {"data": 1, "step": 1, "save": 1, "evaluate": 0}


def test_quick_steps_have_no_stalls_of_milliseconds(clock):
    timeline = Timeline(clock=clock)
    _steps(timeline, clock, 10, 0.001, 0.001)
    _spend(timeline, clock, "data", 0.9)
    assert timeline.stalls["data"] == 0


def test_goodput_is_of_the_whole_run_and_forgets_what_was_done_again(clock):
    first = Timeline(clock=clock)
    first.resume({}, 0.0)
    _steps(first, clock, 8)
    saved = first.so_far()
    _steps(first, clock, 8)  # killed: these are lost
    clock.now += 4  # and nobody was there
    second = Timeline(clock=clock)
    clock.now += 1
    second.resume(saved, age=21.0)
    _steps(second, clock, 8)
    figures = second.figures()
    assert figures["goodput"] == pytest.approx(12 / 29)
    assert figures["time/lost"] == pytest.approx(8 + 4)
    assert figures["time/start"] == pytest.approx(1)
    # A roll back loses its steps too.
    second.go_back(saved)
    assert second.figures()["goodput"] == pytest.approx(6 / 29)


def test_the_log_tells_what_a_run_took_up_to_a_step(clock, tmp_path):
    timeline, lines = Timeline(clock=clock), []
    timeline.resume({}, 0.0)
    for step in (1, 2, 3):
        _steps(timeline, clock, 1)
        lines.append(json.dumps({"step": step, "split": "train", **timeline.figures()}) + "\n")
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    assert read_seconds(tmp_path, 2) == pytest.approx({"start": 0, "data": 0.5, "step": 1.5})
    assert read_seconds(tmp_path, 0) == {}


def test_a_clock_that_went_backwards_makes_no_goodput_above_one(clock):
    timeline = Timeline(clock=clock)
    timeline.resume({"step": 1000.0}, age=0.0)
    assert timeline.figures()["goodput"] == pytest.approx(1.0)
    assert age([{"time": "2999-01-01T00:00:00Z"}]) == 0.0


def test_compilations_inside_steps_are_counted_and_no_others(clock):
    timeline = Timeline(clock=clock)
    function = jax.jit(lambda x: x * 2 + 1)
    with timeline.listening():
        with timeline.phase("compile"):
            function(jnp.ones(3))
        with timeline.phase("step"):
            function(jnp.ones(3))
        assert timeline.recompilations == 0
        longer = jnp.ones(4)
        with timeline.phase("step"):
            function(longer)
    assert timeline.recompilations == 1
    with timeline.phase("step"):
        function(jnp.ones(5))
    assert timeline.recompilations == 1
