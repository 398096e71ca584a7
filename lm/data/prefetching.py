"""Batches made ahead of time by Grain, in a thread or in another process.

Owns the two Grain classes around a reader. The only module of the room that names Grain's iterators; it is
imported when the first batch is asked for, because Grain imports jax. Law: what comes out is what the
reader gives, in order.
"""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grain
from absl import flags

from lm.data.lanes import Lanes, Plan, SinglePass, State
from lm.data.pipeline import Item, make_item

Reader = Lanes | SinglePass


class ItemIterator(grain.DatasetIterator[Item]):
    """Grain's view of a reader."""

    def __init__(self, plan: Plan, reader: Reader) -> None:
        super().__init__()
        self._plan, self._reader = plan, reader

    def __next__(self) -> Item:
        return make_item(self._plan, self._reader)

    def get_state(self) -> dict[str, Any]:
        """Returns the reader's state."""
        return self._reader.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Sets the reader's state."""
        self._reader.set_state(state)


class Items(grain.IterDataset[Item]):
    """Grain's view of a plan; `open_reader` is called in the process that iterates."""

    def __init__(self, plan: Plan, open_reader: Callable[[], Reader]) -> None:
        super().__init__()
        self._plan, self._open_reader = plan, open_reader

    def __iter__(self) -> ItemIterator:
        return ItemIterator(self._plan, self._open_reader())


class _OpenAt:
    """Opens a reader of some rows at a state."""

    def __init__(self, plan: Plan, first: int, stop: int, state: State) -> None:
        self._plan, self._first, self._stop, self._state = plan, first, stop, state

    def __call__(self) -> Reader:
        _end_with_parent()
        reader = self._plan.open(self._first, self._stop)
        reader.set_state(self._state)
        return reader


def _end_with_parent() -> None:
    """Ends this worker when the program is gone: killed, it cannot end its workers, and Grain's wait forever."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        assert parent is not None
        parent.join()
        os._exit(1)

    if parent is not None:
        threading.Thread(target=wait, daemon=True).start()


def in_thread(plan: Plan, reader: Reader) -> Iterator[Item]:
    """Returns the reader's batches, `prefetch` of them made ahead by a thread."""
    items = Items(plan, lambda: reader)
    return iter(grain.experimental.ThreadPrefetchIterDataset(items, prefetch_buffer_size=plan.config.prefetch))


def in_process(plan: Plan, first: int, stop: int, state: State) -> Iterator[Item]:
    """Returns the batches of rows `first` to `stop` after `state`, `prefetch` of them made ahead by a process."""
    if not flags.FLAGS.is_parsed():
        # Grain asks absl for its own flags; a notebook or a test parses none, and gets their defaults.
        flags.FLAGS.mark_as_parsed()
    items = Items(plan, _OpenAt(plan, first, stop, state))
    options = grain.MultiprocessingOptions(num_workers=1, per_worker_buffer_size=plan.config.prefetch)
    return iter(items.mp_prefetch(options))
