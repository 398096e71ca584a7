"""The memory of the process on the host, as the C library hands it out.

Knows no array and no mesh. Law: changes how fast memory is had, never what is in it.
"""

import ctypes

# Names of <malloc.h>: how much may lie free at the heap's end, and how many blocks may be mapped on their own.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Tells the C library to keep the memory that it is given back; returns whether there is one that can be told.

    A program on a CPU takes its temporaries when it starts and gives them back when it ends. The C library returns
    such large blocks to the system, which hands out zeroed pages again for the next step, one fault each: a fifth of a
    small step's time. Kept memory stays with the process until it ends.
    """
    tell = getattr(ctypes.CDLL(None), "mallopt", None)
    return tell is not None and all([tell(_M_MMAP_MAX, 0), tell(_M_TRIM_THRESHOLD, 2**31 - 1)])
