"""Laws of every schedule, then known values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.optim import Constant, Cosine, InverseSquareRoot, Linear, OptimizerConfig, WarmupStableDecay

NUM_STEPS = 100
SCHEDULES = [
    Constant(warmup_steps=10),
    Cosine(warmup_steps=10, final_factor=0.1),
    Linear(warmup_steps=10, final_factor=0.2),
    WarmupStableDecay(warmup_steps=10, decay_steps=20, final_factor=0.1),
    WarmupStableDecay(warmup_steps=10, decay_steps=20, shape="one_minus_sqrt"),
    InverseSquareRoot(warmup_steps=10, plateau_steps=10),
]


def values(schedule, steps, num_steps=NUM_STEPS):
    return np.asarray(jax.jit(jax.vmap(schedule.build(num_steps)))(jnp.asarray(steps)))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_laws(schedule):
    factor = values(schedule, np.arange(3 * NUM_STEPS))
    assert factor.dtype == np.float32
    assert factor.max() == 1.0
    assert factor[0] > 0
    np.testing.assert_allclose(factor[:11], np.arange(1, 12) / 11, rtol=1e-6)
    assert (np.diff(factor[10:]) <= 0).all()
    # sqrt falls fastest, at the first step of the decay
    assert np.abs(np.diff(factor)).max() <= np.sqrt(1 / 20) + 1e-6
    if not isinstance(schedule, InverseSquareRoot):
        np.testing.assert_array_equal(factor[NUM_STEPS:], factor[NUM_STEPS])
    assert schedule.problems(NUM_STEPS) == []


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_warm_up_longer_than_the_run_is_a_problem(schedule):
    (problem,) = schedule.problems(10)
    assert "warmup_steps" in problem


def test_known_values():
    np.testing.assert_allclose(values(Cosine(final_factor=0.1), [0, 50, 100]), [1, 0.55, 0.1], rtol=1e-6)
    np.testing.assert_allclose(values(Linear(final_factor=0.2), [0, 50, 100]), [1, 0.6, 0.2], rtol=1e-6)
    wsd = WarmupStableDecay(decay_steps=20)
    np.testing.assert_allclose(values(wsd, [0, 80, 85, 100]), [1, 1, 0.75, 0], rtol=1e-6)
    wsd = WarmupStableDecay(decay_steps=20, shape="one_minus_sqrt")
    np.testing.assert_allclose(values(wsd, [80, 85, 100]), [1, 0.5, 0], rtol=1e-6)


def test_inverse_square_root_is_t5s():
    """1/sqrt(max(n, 10^4)); at the last pre-training step 2^19 it is .0013811 (Raffel et al., 2020, 3.1.2)."""
    rate = OptimizerConfig(learning_rate=0.01, schedule=InverseSquareRoot()).learning_rate_at(2**19)
    np.testing.assert_allclose(
        [float(rate(n)) for n in (0, 9_999, 10_000, 40_000)], [0.01, 0.01, 0.01, 0.005], rtol=1e-6
    )
    assert round(float(rate(2**19)), 7) == 0.0013811


def test_inverse_square_root_is_the_transformers():
    """d^-.5 min(n^-.5, n w^-1.5), n from 1 (Vaswani et al., 2017, 5.3): the shape beyond the warm-up."""
    warm = 400
    steps = np.arange(warm, 4000)
    np.testing.assert_allclose(
        values(InverseSquareRoot(warmup_steps=warm, plateau_steps=warm), steps), np.sqrt(warm / steps), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("schedule", "field"),
    [
        (Cosine(final_factor=2.0), "final_factor"),
        (Linear(warmup_steps=-1), "warmup_steps"),
        (WarmupStableDecay(decay_steps=0), "decay_steps"),
        (WarmupStableDecay(warmup_steps=60, decay_steps=60), "decay_steps"),
        (WarmupStableDecay(warmup_steps=-60, decay_steps=200), "warmup_steps is -60"),
        (InverseSquareRoot(plateau_steps=0), "plateau_steps"),
    ],
    ids=repr,
)
def test_problems_name_the_field(schedule, field):
    (problem,) = schedule.problems(NUM_STEPS)
    assert field in problem
