"""The memory of the process on the host, as the C library hands it out.

Knows no array and no mesh. Law: changes how fast memory is had, never what is in it.
"""

import ctypes

import jax

# Names of <malloc.h>: how much may lie free at the heap's end, and how many blocks may be mapped on their own.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Has the C library keep the memory that it is given back, where jax computes on CPUs; returns whether it will.

    To be called before jax's devices are used; later, in a notebook say, nothing breaks, and steps may stay slow. A
    program on a CPU takes its temporaries when it starts and gives them back when it ends. The C library returns such
    large blocks to the system, which hands out zeroed pages again for the next step, one fault each: a fifth of a
    step's time. Kept memory stays with the process until it ends.

    Only the heap of the main thread can be told, so programs are to start there and not in a thread of jax's.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    tell = getattr(ctypes.CDLL(None), "mallopt", None)
    if jax.default_backend() != "cpu" or tell is None:
        return False
    return all([tell(_M_MMAP_MAX, 0), tell(_M_TRIM_THRESHOLD, -1)])
