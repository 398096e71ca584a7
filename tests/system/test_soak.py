"""The soak program in short: three kills of an encoder-decoder with UL2 on a mixture; the long form is slow."""

import json
import random
import shutil
import subprocess
import sys
from concurrent import futures

import pytest

from tests import moments, soak
from tests.system.runs import ROOT

pytestmark = pytest.mark.system

KILLS = [("evaluation", "SIGTERM"), ("commit", "SIGKILL"), ("resume", "SIGSTOP, SIGKILL")]


def test_three_kills_change_no_bit_nor_does_another_installation(tmp_path):
    """The unbroken run is made by a copy of the package in another folder, which compiles everything anew."""
    shutil.copytree(ROOT / "lm", tmp_path / "copy" / "lm", ignore=shutil.ignore_patterns("__pycache__"))
    case = soak.Soak(tmp_path, soak.CASES[1], KILLS, random.Random(1), print, steps_per_kill=20)
    with futures.ThreadPoolExecutor(2) as lanes:
        whole = lanes.submit(case.leave_alone, tmp_path / "copy", compilation_cache=str(tmp_path / "cache"))
        done = lanes.submit(case.kill_all).result()
        whole.result()
    assert [(kill.moment, kill.signal) for kill in done] == KILLS
    (start,) = json.loads((tmp_path / "whole" / "run.json").read_text())["starts"]
    assert start["argv"][0] == str(tmp_path / "copy" / "lm" / "train.py")
    assert any((tmp_path / "cache").iterdir())
    case.compare()


def test_a_start_that_is_through_a_moment_already_is_given_up(tmp_path):
    """A moment that comes once a start is not waited for until the run's end."""

    class Running:
        def poll(self) -> None:
            return None

    seen = moments.Watched(tmp_path)
    seen.first_step, seen.step = 30, 41
    hunt = moments.Hunt("compilation", 0, random.Random(0))
    assert hunt.hit([Running()], seen) == "passed"  # type: ignore[list-item]  # only asked whether it runs
    assert hunt.missed == 1


@pytest.mark.slow
def test_twenty_five_kills_change_no_bit(tmp_path):
    command = [sys.executable, "-m", "tests.soak", "--kills=25", "--seed=0", f"--folder={tmp_path}"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=3600)
