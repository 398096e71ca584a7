"""Freed memory is kept: the second large block costs no page faults."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, numpy as np, lm.parallel.host as host
kept = host.keep_freed_memory()
def take():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.full(2**26, 1, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first, second = take(), take()
print(int(kept), first, second)
"""


def test_a_block_is_mapped_once():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    kept, first, second = map(int, done.stdout.split())
    if not kept:
        pytest.skip("this C library has no mallopt")
    assert second < first / 4
