"""Bounds on loss and gradient: what is a spike, what moves the bounds, and what does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.optim import Bounds, RollBack, Skip


def _run(bounds, losses, norms=None):
    norms = np.ones(len(losses)) if norms is None else norms
    judge, state, told = jax.jit(bounds.judge), bounds.init(), []
    for loss, norm in zip(losses, norms, strict=True):
        loss, norm = jnp.float32(loss), jnp.float32(norm)
        spike, state = judge(state, loss, norm, jnp.isfinite(loss) & jnp.isfinite(norm))
        told.append(bool(spike))
    return told, state


def test_a_spike_is_above_the_factor_times_the_median_and_moves_nothing():
    told, state = _run(Skip(window=3, loss_factor=2.0, norm_factor=None), [1, 2, 3, 4.1, 4.0, 6.1, 5.9, np.nan])
    # Median 2, then still 2, then of 2, 3, 4, then of 3, 4, 5.9.
    assert told == [False, False, False, True, False, True, False, False]
    assert int(state.count) == 5
    assert sorted(np.asarray(state.losses).tolist()) == pytest.approx([3, 4, 5.9])


def test_nothing_is_a_spike_before_the_window_is_full():
    assert not any(_run(Skip(window=4), [1, 100, 1, 100])[0])


def test_each_bound_stands_alone():
    losses, norms = [1, 1, 1, 9], [1, 1, 1, 9]
    assert _run(Skip(window=3, loss_factor=2.0, norm_factor=None), losses, [1] * 4)[0][-1]
    assert _run(Skip(window=3, loss_factor=None, norm_factor=2.0), [1] * 4, norms)[0][-1]
    assert not _run(Skip(window=3, loss_factor=None, norm_factor=2.0), losses, [1] * 4)[0][-1]


def test_only_one_kind_rolls_back():
    assert (Skip().rolls_back, RollBack().rolls_back) == (False, True)


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        (Skip(window=0), "window"),
        (Skip(loss_factor=1.0), "loss_factor"),
        (RollBack(norm_factor=0.5), "norm_factor"),
        (Skip(loss_factor=None, norm_factor=None), "bounds neither"),
        (RollBack(max_times=0), "max_times"),
    ],
)
def test_settings_that_cannot_work_are_told(bounds: Bounds, words):
    (line,) = bounds.problems()
    assert line.startswith("health.spikes")
    assert words in line
