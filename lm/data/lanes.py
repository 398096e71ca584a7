"""Rows in the run's global order, and the small state from which reading goes on.

Owns which window belongs to which row of the batch. The windows of a source are dealt to B lanes, one for
each row of the global batch: window g belongs to lane g mod B. A lane lays its windows into rows one after
another, and batch n is the n-th row of every lane. So a process reads the documents of its own rows only,
and yet the global batch is the same for any number of processes. A single pass (evaluation, `num_epochs`)
is one lane whose rows are dealt to the batch in turn: there the rows must not depend on the batch's size,
and all processes must end together, so each walks the whole pass and keeps its share.
Law: rows are a function of (settings, row number); restoring a state continues them exactly.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lm.batch import Document, Example
from lm.data import packing
from lm.data.config import DataConfig
from lm.data.documents import Documents, open_documents
from lm.data.formats import DataError
from lm.data.mixtures import Interleave
from lm.data.order import Windows
from lm.data.packing import Row
from lm.data.tokenizers import Tokenizer
from lm.document import Context, Objective

State = dict[str, Any]
# Keeps the draws of the order of rows apart from all others.
_ROW_ORDER = 0x524F57
# Of windows, rows and documents; what a state may say.
_BEYOND_PLACES = 1 << 40


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that decides the batches of a run; worker processes get a copy.

    Attributes:
      config: the settings.
      objective: turns documents into examples.
      tokenizer: turns text into ids.
      batch_size: rows of the global batch.
      validation: one pass over the held-out documents in corpus order, instead of training.
    """

    config: DataConfig
    objective: Objective
    tokenizer: Tokenizer
    batch_size: int
    validation: bool

    @property
    def num_epochs(self) -> int | None:
        """Passes until the end, None without an end."""
        return 1 if self.validation else self.config.num_epochs

    def open(self, first: int, stop: int) -> "Lanes | SinglePass":
        """Opens the corpora and returns the reader of rows `first` to `stop` of every batch."""
        opened = open_documents(self.config, self.tokenizer, self.tokenizer.fingerprint, self.validation)
        if self.num_epochs is not None:
            return SinglePass(self, opened, first, stop)
        return Lanes(self, opened, first, stop)


class Joined:
    """Documents of several sources, one after another."""

    def __init__(self, parts: Sequence[Documents]) -> None:
        self._parts = [part for part in parts if len(part)]
        self._ends = list(itertools.accumulate(map(len, self._parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Document:
        number = next(number for number, end in enumerate(self._ends) if index < end)
        return self._parts[number][index - (self._ends[number - 1] if number else 0)]

    def sample(self, rng: Any) -> Document:
        """Draws a document."""
        return self[int(rng.integers(len(self)))]


class WindowRows:
    """Makes the rows of any window of a source.

    Args:
      plan: of the run.
      documents: of the source.
      windows: their order.
      offset: number of documents in the sources before: (epoch, index) names a document of the whole run.
    """

    def __init__(self, plan: Plan, documents: Documents | Joined, windows: Windows, offset: int) -> None:
        self.windows = windows
        self._plan, self._documents, self._offset = plan, documents, offset
        self._checked = False

    def __call__(self, window: int, cursor: list[int]) -> Iterator[Row]:
        """Yields the rows of a window; keeps the number of documents read so far as `cursor[2]`."""
        pack = packing.first_fit if self._plan.config.packing else packing.one_a_row
        rows = pack(self._examples(window, cursor), self._plan.config.lengths)
        if not self.windows.shuffle:
            return rows
        key = np.random.SeedSequence([*self.windows.seed, window, _ROW_ORDER])
        return packing.shuffle(rows, self._plan.config.shuffle_rows, np.random.Generator(np.random.Philox(key)))

    def _examples(self, window: int, cursor: list[int]) -> Iterator[tuple[str, Example]]:
        epoch, places = self.windows.places(window)
        for number, place in enumerate(places, start=1):
            cursor[2] = number
            document = self._documents[self.windows.document(epoch, place)]
            for example in self._plan.objective.examples(document, self._context(epoch, place)):
                yield document.id, example

    def _context(self, epoch: int, place: int) -> Context:
        return Context(
            vocabulary=self._plan.tokenizer,
            lengths=self._plan.config.lengths,
            seed=self._plan.config.seed,
            epoch=epoch,
            index=self._offset + place,
            sample_document=self._documents.sample,
        )

    def check_not_barren(self) -> None:
        """Raises `DataError` if no document of a whole epoch gives an example."""
        if not self._checked and not any(
            True for window in range(self.windows.per_epoch) for _ in self(window, [0] * 3)
        ):
            raise DataError(
                f"no training example results from {len(self._documents)} document(s): they are empty, or too short "
                "or too long for the objective"
            )
        self._checked = True


class Lane:
    """The rows of every `stride`-th window, for each source of its own.

    Args:
      sources: one a source.
      first: its first window.
      stride: distance of its windows.
      num_windows: of the source, None without an end.
    """

    def __init__(self, sources: Sequence[WindowRows], first: int, stride: int, num_windows: int | None) -> None:
        self._sources, self._first, self._stride, self._num_windows = sources, first, stride, num_windows
        # For each source: how many of the lane's windows are done; rows given and documents read of the open one.
        self.cursors = [[0, 0, 0] for _ in sources]
        self._open: list[Iterator[Row] | None] = [None for _ in sources]

    def set_cursors(self, cursors: list[list[int]]) -> None:
        """Goes to a place; the open windows are laid again when they are next read."""
        self.cursors = [list(cursor) for cursor in cursors]
        self._open = [None for _ in self._sources]

    def window(self, source: int) -> int:
        """Returns the number of the window that is open or next."""
        return self._first + self._stride * self.cursors[source][0]

    def epochs(self, source: int) -> float:
        """Returns how often the lane's part of the source was passed."""
        windows, (done, _, read) = self._sources[source].windows, self.cursors[source]
        _, places = windows.places(self.window(source))
        return (done + read / len(places)) * self._stride / windows.per_epoch

    def next_row(self, source: int) -> Row | None:
        """Returns the next row of a source, None at the end; raises `DataError` if there never is one."""
        cursor, without = self.cursors[source], 0
        while self._num_windows is None or self.window(source) < self._num_windows:
            rows = self._open[source]
            if rows is None:
                rows = itertools.islice(self._sources[source](self.window(source), cursor), cursor[1], None)
                self._open[source] = rows
            row = next(rows, None)
            if row is not None:
                cursor[1] += 1
                return row
            without = 0 if cursor[1] else without + 1
            if without > self._sources[source].windows.per_epoch:
                self._sources[source].check_not_barren()
            cursor[:] = [cursor[0] + 1, 0, 0]
            self._open[source] = None
        return None


class Lanes:
    """Reads rows `first` to `stop` of every batch of endless training: one lane a row."""

    def __init__(self, plan: Plan, documents: Sequence[Documents], first: int, stop: int) -> None:
        self._interleave = Interleave(tuple(source.weight for source in plan.config.chosen_sources))
        self._size, self._first, self._batches = plan.batch_size, first, 0
        sources, offset = [], 0
        for number, one in enumerate(documents):
            # Every lane should have a window in each epoch, down to windows of one document.
            size = min(plan.config.window, max(1, len(one) // plan.batch_size))
            windows = Windows(len(one), size, (plan.config.seed, number), shuffle=True)
            sources.append(WindowRows(plan, one, windows, offset))
            offset += len(one)
        self._identity = {
            "layout": "lanes",
            "batch_size": plan.batch_size,
            "documents": [len(one) for one in documents],
            "windows": [source.windows.size for source in sources],
        }
        self._lanes = [Lane(sources, number, plan.batch_size, None) for number in range(first, stop)]

    def next_rows(self) -> tuple[list[Row], Row]:
        """Returns the rows of the next batch, and one of them."""
        start = self._batches * self._size + self._first
        found = [lane.next_row(self._interleave.source(start + number)) for number, lane in enumerate(self._lanes)]
        # Lanes without an end always have a next row.
        rows = [row for row in found if row is not None]
        self._batches += 1
        return rows, rows[0]

    def epochs(self) -> list[float]:
        """Returns for each source how often it was passed, on the average of these lanes."""
        sources = range(len(self._identity["documents"]))
        return [sum(lane.epochs(source) for lane in self._lanes) / len(self._lanes) for source in sources]

    def get_state(self) -> State:
        """Returns where reading stands, as plain values."""
        cursors = [[list(cursor) for cursor in lane.cursors] for lane in self._lanes]
        return self._identity | {"batches": self._batches, "first": self._first, "cursors": cursors}

    def set_state(self, state: State) -> None:
        """Goes to a state of these rows or of more; raises `ValueError` if it is of another run or lacks rows."""
        _check_identity(self._identity, state)
        _check_place(state, self._lanes[0].cursors)
        start = self._first - state["first"]
        if start < 0 or start + len(self._lanes) > len(state["cursors"]):
            last = state["first"] + len(state["cursors"])
            raise DataError(
                f"the data state holds rows {state['first']} to {last} of each batch, rows {self._first} to "
                f"{self._first + len(self._lanes)} are needed: merge the states of all processes first"
            )
        self._batches = state["batches"]
        for lane, cursors in zip(self._lanes, state["cursors"][start:], strict=False):
            lane.set_cursors(cursors)


class SinglePass:
    """Reads rows `first` to `stop` of every batch of one or several passes that end."""

    def __init__(self, plan: Plan, documents: Sequence[Documents], first: int, stop: int) -> None:
        joined = Joined(documents)
        windows = Windows(len(joined), plan.config.window, (plan.config.seed, 0), shuffle=not plan.validation)
        self._source = WindowRows(plan, joined, windows, 0)
        self._size, self._first, self._stop, self._batches = plan.batch_size, first, stop, 0
        self._lane = Lane([self._source], 0, 1, windows.per_epoch * (plan.num_epochs or 1))
        self._identity = {
            "layout": "pass",
            "batch_size": plan.batch_size,
            "documents": [len(one) for one in documents],
            "windows": [windows.size],
        }

    def next_rows(self) -> tuple[list[Row | None], Row]:
        """Returns the rows of the next batch, None for those after the end, and one that is not None.

        That one is needed where this process's share of the last batch is all padding: it shows which
        fields there are. Raises `StopIteration` after the last batch.
        """
        rows = [self._lane.next_row(0) for _ in range(self._size)]
        if rows[0] is None:
            if not self._batches:
                self._source.check_not_barren()
            raise StopIteration
        self._batches += 1
        return rows[self._first : self._stop], rows[0]

    def epochs(self) -> list[float]:
        """Returns how often the documents were passed."""
        return [self._lane.epochs(0)]

    def get_state(self) -> State:
        """Returns where reading stands, as plain values; the same in every process."""
        return self._identity | {"batches": self._batches, "first": 0, "cursors": [list(self._lane.cursors[0])]}

    def set_state(self, state: State) -> None:
        """Goes to a state; raises `ValueError` if it is of another run."""
        _check_identity(self._identity, state)
        _check_place(state | {"cursors": [state.get("cursors")]}, self._lane.cursors)
        self._batches = state["batches"]
        self._lane.set_cursors(state["cursors"])


def _check_identity(expected: State, state: State) -> None:
    for name, value in expected.items():
        if state.get(name) != value:
            raise DataError(
                f"the data state was saved with {name} {state.get(name)}, now it is {value}: the same batches cannot "
                "follow; start a new run from the weights with --config.init_from"
            )


def _is_number(value: Any) -> bool:
    return type(value) is int and 0 <= value < _BEYOND_PLACES


def _check_place(state: State, like: list[list[int]]) -> None:
    """Raises `DataError` unless a state has numbers where it should, with as many for each lane as `like`."""
    sound = all(_is_number(state.get(name)) for name in ("batches", "first")) and isinstance(state.get("cursors"), list)
    for cursors in state["cursors"] if sound else ():
        sound &= isinstance(cursors, list) and len(cursors) == len(like)
        sound = sound and all(
            isinstance(cursor, list) and len(cursor) == len(like[0]) and all(map(_is_number, cursor))
            for cursor in cursors
        )
    if not sound:
        raise DataError("the data state is damaged: its batches, rows and cursors are no places in the data")


def merge_states(states: Sequence[State]) -> State:
    """Joins the states of all processes of a run into one that any number of processes can restore.

    Raises:
      ValueError: they are not of one moment of one run, or a process's is missing.
    """
    ordered = sorted(states, key=lambda state: state["first"])
    whole = dict(ordered[0])
    if whole["layout"] == "pass":
        if any(state != whole for state in ordered):
            raise ValueError("the data states of the processes differ: they were not saved at one step")
        return whole
    for state in ordered[1:]:
        if state["batches"] != whole["batches"]:
            raise ValueError("the data states of the processes differ: they were not saved at one step")
        _check_identity({name: whole[name] for name in ("layout", "batch_size", "documents", "windows")}, state)
        if state["first"] != whole["first"] + len(whole["cursors"]):
            raise ValueError(f"the data state of a process is missing: no rows before {state['first']}")
        whole["cursors"] = whole["cursors"] + state["cursors"]
    if whole["first"] or len(whole["cursors"]) != whole["batch_size"]:
        raise ValueError(f"the data states hold {len(whole['cursors'])} of {whole['batch_size']} rows of each batch")
    return whole
