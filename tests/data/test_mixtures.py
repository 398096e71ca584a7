"""Weights are proportions of rows: of all rows, of every stretch, of every lane."""

import pytest

from lm.data.mixtures import Interleave


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, 1.0), (5, 3, 2), (1, 99), (0.25, 0.25, 0.25, 0.25)])
def test_proportions_of_every_prefix(weights):
    interleave = Interleave(weights)
    counts, total = [0] * len(weights), sum(weights)
    for row in range(5000):
        counts[interleave.source(row)] += 1
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - (row + 1) * weight / total) < 4


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 8, 48, 256])
@pytest.mark.parametrize("weights", [(1, 1), (1, 3), (0.7, 0.3)])
def test_every_lane_sees_every_source_in_proportion(batch_size, weights):
    interleave = Interleave(weights)
    for lane in {0, 1 % batch_size, batch_size - 1}:
        drawn = [interleave.source(number * batch_size + lane) for number in range(2000)]
        assert abs(drawn.count(0) / 2000 - weights[0] / sum(weights)) < 0.01


def test_one_source():
    assert {Interleave((2.0,)).source(row) for row in range(100)} == {0}
