"""The moving average of parameters."""

import jax.numpy as jnp
import numpy as np
import pytest

from lm.optim import Average


def test_average_of_a_constant_is_the_constant():
    params = {"a": jnp.asarray([0.1, -3.3, 1e-7])}
    average = Average(decay=0.9, warmup=False)
    state = average.init(params)
    for step in range(5):
        state = average.update(state, params, step)
    np.testing.assert_array_equal(state["a"], params["a"])


def test_formula():
    rng = np.random.default_rng(0)
    history = rng.normal(size=(6, 4))
    average = Average(decay=0.9, warmup=False)
    state = average.init(jnp.asarray(history[0], jnp.float32))
    expected = history[0]
    for step, params in enumerate(history[1:]):
        state = average.update(state, jnp.asarray(params, jnp.float32), step)
        expected = 0.9 * expected + 0.1 * params
    np.testing.assert_allclose(state, expected, rtol=1e-5)


def test_warmup_forgets_the_start():
    average = Average(decay=0.9999)
    state = average.update(jnp.zeros(()), jnp.ones(()), 0)
    np.testing.assert_allclose(state, 0.9, rtol=1e-6)
    late = average.update(jnp.zeros(()), jnp.ones(()), 10**6)
    np.testing.assert_allclose(late, 1e-4, rtol=1e-2)


def test_average_is_a_float32_copy():
    params = jnp.ones((2,), jnp.bfloat16)
    state = Average().init(params)
    assert state.dtype == jnp.float32
    same = jnp.ones((2,), jnp.float32)
    # Buffers that are shared with the parameters could not be donated beside them.
    assert Average().init(same).unsafe_buffer_pointer() != same.unsafe_buffer_pointer()


@pytest.mark.parametrize("decay", [1.0, -0.5])
def test_problems(decay):
    assert "decay" in Average(decay=decay).problems()[0]
    assert Average().problems() == []
