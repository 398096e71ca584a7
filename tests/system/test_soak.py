"""The soak program in short: three kills of an encoder-decoder with UL2 on a mixture; the long form is slow."""

import random
import subprocess
import sys

import pytest

from tests import soak
from tests.system.runs import ROOT

pytestmark = pytest.mark.system


def test_three_kills_change_no_bit(tmp_path):
    done = soak.soak(tmp_path, soak.CASES[1], 3, random.Random(1), print)
    assert len(done) == 3


@pytest.mark.slow
def test_twenty_five_kills_change_no_bit(tmp_path):
    command = [sys.executable, "-m", "tests.soak", "--kills=25", "--seed=0", f"--folder={tmp_path}"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=3600)
