"""The benchmark of the train step runs to its end and prints one line for each contestant."""

import pytest
from absl import flags
from absl.testing import flagsaver

from benchmarks import train_step


@pytest.fixture(autouse=True)
def _parsed_flags():
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["test"])


def test_prints_a_line_for_each_contestant(capsys):
    with flagsaver.flagsaver(
        sizes=["1x64"], dtypes=["bfloat16"], batch_size=2, length=16, vocab_size=64, rounds=1, steps=1
    ):
        train_step.main([])
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("1x64")]
    assert lines[0][:3] == ["1x64", "bfloat16", "lm"]
    assert all(float(line[-1]) > 0 for line in lines if train_step.has_torch())
