"""Batches for a run: opened, made ahead of time, counted, and continued from a state.

Owns the public way into the data: `train_batches` and `validation_batches`. Knows no device and no model;
the objective is an argument. Laws: the batches are the same for any number of processes, workers and
batches made ahead; a state is that of the batches returned, never of those made ahead.
"""

import hashlib
import time
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np

from lm.batch import Batch
from lm.data import packing
from lm.data.config import DataConfig
from lm.data.lanes import Lanes, Plan, SinglePass, State, merge_states
from lm.data.tokenizers import Tokenizer
from lm.document import Objective

Item = dict[str, Any]


def make_item(plan: Plan, reader: Lanes | SinglePass) -> Item:
    """Makes the next batch, with the ids of its documents, the state after it and its figures.

    Raises:
      StopIteration: at the end of a pass.
    """
    start = time.perf_counter()
    rows, like = reader.next_rows()
    filled = [row for row in rows if row is not None]
    batch = packing.assemble(rows, plan.config.lengths, plan.tokenizer.specials.pad, like.examples[0])
    figures = {
        "tokens": int(np.count_nonzero(batch.segment_ids)),
        "positions": batch.segment_ids.size,
        "examples": sum(len(row.examples) for row in filled),
        "seconds": time.perf_counter() - start,
    }
    ids = [[] if row is None else row.ids for row in rows]
    return {"batch": batch, "ids": ids, "state": reader.get_state(), "figures": figures, "epochs": reader.epochs()}


class Batches(Iterator[Batch]):
    """An iterator of this process's rows of each global batch.

    A worker process is to its process what a process is to the run: it owns some of the rows. Each batch
    brings the state after it from wherever it was made, so Grain's own states are not needed.

    Args:
      plan: of the run.
      first: first row of the global batch that is this process's.
      stop: the row after its last.
    """

    def __init__(self, plan: Plan, first: int, stop: int) -> None:
        self._plan, self._first, self._stop = plan, first, stop
        # Opened here, so that what is wrong with the data is said before anything else is done.
        self._reader = plan.open(first, stop)
        self._state = self._reader.get_state()
        self._epochs = self._reader.epochs()
        self._iterators: list[Iterator[Item]] = []
        # Threads and processes end with this object, and before the interpreter does.
        self._finalizer = weakref.finalize(self, _close_all, self._iterators)
        self._ids: list[list[str]] = []
        self._batch: Batch | None = None
        self._totals = {"tokens": 0, "positions": 0, "examples": 0, "seconds": 0.0}
        self._closed = False

    def _start(self) -> None:
        from lm.data import prefetching

        workers = 0 if self._plan.validation else self._plan.config.num_workers
        if not workers:
            self._iterators.append(prefetching.in_thread(self._plan, self._reader))
            return
        num_blocks = min(workers, self._stop - self._first) if isinstance(self._reader, Lanes) else 1
        bounds = np.linspace(self._first, self._stop, num_blocks + 1).astype(int).tolist()
        for number in range(num_blocks):
            iterator = prefetching.in_process(self._plan, bounds[number], bounds[number + 1], self._state)
            self._iterators.append(iterator)

    def __next__(self) -> Batch:
        if self._closed:
            raise ValueError("these batches were closed")
        if not self._iterators:
            self._start()
        try:
            items = [next(iterator) for iterator in self._iterators]
        except StopIteration:
            raise
        except BaseException:
            # Going on after an error would pass over the rest of a window without a word.
            self.close()
            raise
        self._state = items[0]["state"] if len(items) == 1 else _join([item["state"] for item in items])
        self._ids = [names for item in items for names in item["ids"]]
        self._epochs = np.mean([item["epochs"] for item in items], axis=0).tolist()
        for name in self._totals:
            self._totals[name] += sum(item["figures"][name] for item in items)
        batch = items[0]["batch"] if len(items) == 1 else _stack([item["batch"] for item in items])
        self._batch = batch
        return batch

    def get_state(self) -> State:
        """Returns the state after the batch last returned: plain values that JSON keeps."""
        return self._state

    def set_state(self, state: State) -> None:
        """Continues after the batch at which a state was taken, here or by any process of the run.

        Args:
          state: of this process, or `merge_states` of all processes: that one fits any number of processes.

        Raises:
          ValueError: the state is of other settings or other data, or lacks rows of this process.
        """
        _close_all(self._iterators)
        self._reader.set_state(state)
        self._state, self._epochs = self._reader.get_state(), self._reader.epochs()

    def document_ids(self) -> list[str]:
        """Returns the ids of the documents in the batch last returned, row by row, one for each example."""
        return [name for names in self._ids for name in names]

    @property
    def first_row(self) -> int:
        """The number of this process's first row in the global batch."""
        return self._first

    def digests(self) -> np.ndarray:
        """Returns u8[rows, 8], a hash of each row of the batch last returned and of its documents' ids.

        Those of all processes, in the order of the rows, are the same for any number of processes.
        """
        found = []
        for number, names in enumerate(self._ids):
            digest = hashlib.blake2b("\0".join(names).encode(), digest_size=8)
            for array in self._batch or ():
                if array is not None:
                    digest.update(np.ascontiguousarray(array[number]).data)
            found.append(digest.digest())
        return np.frombuffer(b"".join(found), np.uint8).reshape(len(found), 8)

    def digest(self) -> str:
        """Returns the hash of this process's rows; where it has all of them, that of the global batch."""
        return join_digests(self.digests())

    def statistics(self) -> dict[str, float]:
        """Returns figures over the batches returned since this object was made, of this process's rows.

        `tokens`: positions that belong to an example. `padding_fraction`: share of those that do not.
        `tokens_per_second`: how fast batches can be made, waiting not counted. `epochs`: passes over the
        first source; `epochs/1` and so on over the others.
        """
        totals, blocks = self._totals, max(1, len(self._iterators))
        found = {f"epochs/{number}" if number else "epochs": value for number, value in enumerate(self._epochs)}
        return found | {
            "batches": self._state["batches"],
            "examples": totals["examples"],
            "tokens": totals["tokens"],
            "padding_fraction": 1 - totals["tokens"] / totals["positions"] if totals["positions"] else 0.0,
            "tokens_per_second": totals["tokens"] * blocks / totals["seconds"] if totals["seconds"] else 0.0,
        }

    def close(self) -> None:
        """Ends threads and worker processes."""
        _close_all(self._iterators)
        self._closed = True


def join_digests(digests: np.ndarray) -> str:
    """Returns the hash of a batch, or of some of its rows.

    Args:
      digests: u8[rows, 8], of `Batches.digests`, in the order of the rows.
    """
    return hashlib.blake2b(digests.tobytes(), digest_size=8).hexdigest()


def _close_all(iterators: list[Iterator[Item]]) -> None:
    while iterators:
        iterators.pop().close()  # pyright: ignore[reportAttributeAccessIssue] Grain's iterators have it


def _join(states: list[State]) -> State:
    """Joins the states of neighbouring rows."""
    return states[0] | {"cursors": [cursors for state in states for cursors in state["cursors"]]}


def _stack(batches: list[Batch]) -> Batch:
    columns = zip(*batches, strict=True)
    return Batch(*(None if parts[0] is None else np.concatenate(parts) for parts in columns))


def _rows(batch_size: int, process_index: int, process_count: int) -> tuple[int, int]:
    """Returns the rows of a process: contiguous blocks, as a mesh places them."""
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(f"batch_size {batch_size} is not a positive multiple of the {process_count} processes")
    share = batch_size // process_count
    return process_index * share, (process_index + 1) * share


def train_batches(
    config: DataConfig,
    objective: Objective,
    tokenizer: Tokenizer,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Opens the training data.

    It never ends unless `config.num_epochs` is set; a corpus smaller than a batch is repeated: then a batch
    holds several passes. An epoch has every document once; lanes that got shorter documents are ahead of
    others by some windows.

    Args:
      config: the settings, without problems.
      objective: turns documents into examples.
      tokenizer: see `load_tokenizer`.
      batch_size: rows of the global batch.
      process_index: of this process.
      process_count: of the run; the process gets the rows from batch_size / process_count * process_index.

    Raises:
      DataError: the data cannot be read or hold no training document.
      ValueError: the batch cannot be divided among the processes.
    """
    plan = Plan(config, objective, tokenizer, batch_size, validation=False)
    return Batches(plan, *_rows(batch_size, process_index, process_count))


def validation_batches(
    config: DataConfig,
    objective: Objective,
    tokenizer: Tokenizer,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Opens the held-out data: one pass in corpus order over all sources, their weights not counted.

    Every target comes exactly once for any batch size and number of processes, all processes get the same
    number of batches, and the last batch is filled with rows of padding. Arguments and errors as in
    `train_batches`.
    """
    plan = Plan(config, objective, tokenizer, batch_size, validation=True)
    return Batches(plan, *_rows(batch_size, process_index, process_count))


__all__ = ["Batches", "join_digests", "merge_states", "train_batches", "validation_batches"]
