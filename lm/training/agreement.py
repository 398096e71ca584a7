"""What the processes of a run tell each other at every step: which rows they read, and whether to stop.

Knows no model. Laws: the hash of a step's rows is the same for any number of processes; all processes read
the same answer at the same step, while the next step runs, so that no device waits for it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lm import parallel
from lm.data import Batches, join_digests
from lm.training.assembly import Assembly


class Word(NamedTuple):
    """What all processes said at one step, on its way.

    Attributes:
      rows: u32[B, 3], number of each row and its hash in two halves.
      stop: whether any process was asked to stop.
    """

    rows: Any
    stop: Any


class Agreement:
    """The words of one start of a run."""

    def __init__(self, assembly: Assembly) -> None:
        """Says nothing yet."""
        self._alone = jax.process_count() == 1
        mesh = assembly.mesh
        self._num_blocks = assembly.row_block()[1]
        self._rows = NamedSharding(mesh, parallel.spec(("batch", None), assembly.rules.activations))
        self._devices = NamedSharding(mesh, PartitionSpec(parallel.MESH_AXES))
        whole = NamedSharding(mesh, PartitionSpec())
        self._share = jax.jit(lambda rows, stops: Word(rows, jnp.max(stops)), out_shardings=whole)
        self._any = jax.jit(jnp.max, out_shardings=whole)

    def say(self, batches: Batches, stop: bool) -> Word:
        """Starts telling the others of the batch last read, and whether this process was asked to stop."""
        halves = batches.digests().view(np.uint32)
        numbers = np.arange(batches.first_row, batches.first_row + len(halves), dtype=np.uint32)
        rows = np.concatenate([numbers[:, None], halves], axis=1)
        if self._alone:
            return Word(rows, stop)
        shape = (len(rows) * self._num_blocks, rows.shape[1])
        return self._share(jax.make_array_from_process_local_data(self._rows, rows, shape), self._spread(stop))

    def _spread(self, stop: bool) -> jax.Array:
        """Returns i32[devices] that holds the word of each device's process."""
        shape = (self._devices.num_devices,)
        return jax.make_array_from_callback(shape, self._devices, lambda _: np.asarray([stop], np.int32))

    def any_process(self, stop: bool) -> bool:
        """Returns whether any process says yes; all must ask together, and wait for each other."""
        return stop if self._alone else bool(jax.device_get(self._any(self._spread(stop))))

    def hear(self, word: Word) -> tuple[str, bool]:
        """Returns the hash of all rows of a step, and whether any process was asked to stop."""
        rows, stop = jax.device_get(word)
        # A mesh may hold the rows in another order than they were read in.
        ordered = rows[np.argsort(rows[:, 0], kind="stable"), 1:]
        return join_digests(ordered), bool(stop)
