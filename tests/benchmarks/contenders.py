"""Contenders that do nothing, fail, or find no memory. Imports no framework, so that their processes start at once."""

import os
import threading
import time

from benchmarks.measuring import COPY, Work

PRODUCT = (lambda: None, 1e6)


def counts(total):
    asked = []
    parts = {"step": lambda: float(total), COPY: lambda: asked.append(1) or 1e9}
    facts = {"total": total, "copies": lambda: len(asked), "python": os.environ.get("WHO")}
    return Work(parts, PRODUCT, facts)


def fails():
    raise ValueError("no such kernel")


def fills_up(folder):
    """Finds memory only the second time: as on a GPU that all share."""
    with (folder / "tries").open("a") as tries:
        tries.write("x")
    if (folder / "tries").read_text() == "x":
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nwhile trying to allocate 9 bytes")
    return counts(3)


def fails_later():
    """Does its first two calls, and no round."""
    calls = []

    def step():
        calls.append(1)
        if len(calls) > 2:
            raise ValueError("went wrong")

    return Work({"step": step}, PRODUCT)


def leaves():
    """Answers its first calls, and is gone when it is asked again."""
    calls = []

    def step():
        calls.append(1)
        if len(calls) == 2:
            threading.Timer(0.02, os._exit, (3,)).start()

    return Work({"step": step}, PRODUCT)


def sleeps(seconds):
    return Work({"step": lambda: time.sleep(seconds)}, PRODUCT)
