"""What jax's contenders measure on their device beside their own work. Imports nothing of `lm`."""

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.measuring import best_speed


def matmul(dtype: str) -> tuple[Any, float]:
    """Returns a function that multiplies two square matrices, summing in float32, and its operations."""
    size = 1024 if jax.default_backend() == "cpu" else 8192
    # Not ones: a GPU multiplies what never changes at a higher clock.
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    return lambda: product(a, a).block_until_ready(), 2.0 * size**3


def copy() -> float:
    """Returns bytes/s of reading and writing an array that is larger than any cache."""
    x, add = jnp.zeros(2**26, jnp.float32), jax.jit(lambda x: x + 1, donate_argnums=0)

    def pass_over() -> None:
        nonlocal x
        for _ in range(4):  # so that a GPU is waited for once
            x = add(x)
        x.block_until_ready()

    return best_speed(pass_over, 4 * 2 * x.nbytes)


def memory() -> dict[str, Any]:
    """Returns the most bytes the device has had, where the backend counts them."""
    return {"device_bytes": lambda: (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")}
