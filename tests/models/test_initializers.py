"""What is drawn has the deviation that was asked for."""

import jax
import jax.numpy as jnp
import pytest

from lm.models import initializers


def test_truncated_draws_have_the_deviation_that_was_asked_for():
    x = initializers.Gaussian(0.5, truncated=True).sample(jax.random.key(0), (50_000,))
    assert float(jnp.std(x)) == pytest.approx(0.5, rel=0.02)
    assert float(jnp.abs(x).max()) < 0.5 * 2 / 0.8796


def test_schemes_answer_for_every_kind_of_weight():
    """GPT-2's residual projections shrink with depth; fan-in keeps the variance of sums."""
    normal = initializers.NormalInitializer()
    assert normal.matrix(fan_in=64, residual_layers=0).stddev == 0.02
    assert normal.matrix(fan_in=64, residual_layers=8).stddev == pytest.approx(0.02 / 4)
    assert initializers.FanInInitializer().matrix(fan_in=64, residual_layers=8).stddev == pytest.approx(1 / 8)
    assert initializers.FanInInitializer(table_stddev=0.5).table().stddev == 0.5
    assert (initializers.Constant(3.0).sample(jax.random.key(0), (2, 2)) == 3).all()
