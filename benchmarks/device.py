"""What jax's contenders measure on their device beside their own work. Imports nothing of `lm`."""

from typing import Any

import jax
import jax.numpy as jnp


def matmul(dtype: str) -> tuple[Any, float]:
    """Returns a function that multiplies two square matrices, summing in float32, and its operations."""
    size = 1024 if jax.default_backend() == "cpu" else 8192
    a = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    return lambda: product(a, a).block_until_ready(), 2.0 * size**3


def memory() -> dict[str, Any]:
    """Returns the most bytes the device has had, where the backend counts them."""
    return {"device_bytes": lambda: (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")}
