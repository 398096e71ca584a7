"""The guard's stored counts hold, and growth is told in a sentence; two of its cases, all by `benchmarks.guard`."""

import json

import jax
import pytest

from benchmarks import guard


@pytest.mark.parametrize("name", ["decoder on fsdp", "experts on fsdp x tensor"])
def test_no_count_has_grown(name):
    assert guard.guard([name]) == []


def test_growth_is_told_by_how_much():
    found = guard.compare(
        "decoder", {"products": 10, "loops": 2}, {"products": 12, "loops": 1, "all-gather messages": 3}
    )
    assert found == [
        "decoder: products grew by 20.0%, 10 to 12",
        "decoder: all-gather messages grew from nothing, 0 to 3",
    ]


def test_every_case_is_stored_for_some_version():
    stored = json.loads(guard.STORED.read_text())
    assert all(set(counts) == set(guard.cases()) for counts in stored.values())
    if jax.__version__ == "0.10.2":
        assert jax.__version__ in stored
