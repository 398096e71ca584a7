"""Many processes: they join one jax runtime, and pass each other a few words.

Owns the start by `jax.distributed`, with a time limit that names who is missing, and what only one process
does for all. Knows no run. Law: with one process nothing here communicates, and every function returns what
it would for many.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import pathlib
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from lm.config import ConfigError, UserError
from lm.parallel.axes import Rules, spec
from lm.parallel.service import check_service, client_of_service, coordinator, place_in_run

# Seconds between two signs of life of a process that waits for the others.
_SIGN = 0.2
# Seconds that the first process lets the others speak when all end with an error.
_LAST_WORDS = 2.0
# Seconds that the others wait for what the first process does for all.
_MOST_PATIENCE = 3600
# Counts what it does so, the same in all processes.
_FIRSTS = itertools.count()
# sysexits.h EX_UNAVAILABLE: nothing is known to be wrong with the input; starting all of them again may help.
EXIT_NOT_JOINED = 69
# What jax says where it finds neither a TPU pod, nor Slurm, nor Open MPI, nor Kubernetes.
_NO_CLUSTER = "coordinator_address should be defined"
# What jax says where devices are in use already, as in a notebook.
_TOO_LATE = "must be called before any JAX calls"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """How the processes of a run find each other; nothing given leaves it to jax (TPU pods, Slurm, Open MPI).

    Attributes:
      coordinator: HOST:PORT at which process 0 can be reached by all.
      num_processes: of the run; 1 stays alone even where jax finds a cluster.
      process_id: this process's number, from 0.
      join_timeout: seconds to wait for all processes.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    join_timeout: int = 300

    def problems(self) -> list[str]:
        """Returns one sentence for each setting that cannot work."""
        given = (self.coordinator, self.num_processes, self.process_id)
        if given == (None, 1, None):
            return []
        found = []
        if None in given and any(value is not None for value in given):
            found.append(
                "give --coordinator=HOST:PORT, --num_processes and --process_id together, or none of them where jax "
                "finds the processes itself (TPU pods, Slurm, Open MPI)"
            )
        if self.coordinator is not None and not re.fullmatch(r"\S+:\d{1,5}", self.coordinator):
            found.append(f"--coordinator is HOST:PORT of process 0, got {self.coordinator}")
        if self.num_processes is not None and self.num_processes < 1:
            found.append(f"--num_processes is a number from 1 up, got {self.num_processes}")
        elif None not in given and not 0 <= (self.process_id or 0) < (self.num_processes or 0):
            found.append(f"--process_id is 0 to {(self.num_processes or 0) - 1}, got {self.process_id}")
        if self.join_timeout < 1:
            found.append(f"--join_timeout is a number of seconds from 1 up, got {self.join_timeout}")
        return found


class RollCall:
    """Signs of life of the processes that wait for each other: one file a process, in a folder all can reach.

    A file tells of a living process only if it changes: no clock is compared, and a file of an earlier start is
    only a name. Where the folder cannot be written, nobody is known.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        """Notes what earlier starts left in the folder."""
        self._folder = folder
        self._number = 0
        self._before = self._read()
        self._seen: set[int] = set()

    def _read(self) -> dict[int, str]:
        found = {}
        for path in self._folder.glob("*"):
            with contextlib.suppress(OSError, ValueError):
                found[int(path.name)] = path.read_text(encoding="utf-8")
        return found

    def sign(self, process_id: int) -> None:
        """Gives this process's sign of life."""
        self._number += 1
        with contextlib.suppress(OSError):
            self._folder.parent.mkdir(exist_ok=True)
            self._folder.mkdir(exist_ok=True)
            (self._folder / str(process_id)).write_text(f"{os.getpid()} waits, {self._number}", encoding="utf-8")

    def look(self) -> set[int]:
        """Returns the processes that have given a sign since the first look."""
        self._seen |= {number for number, text in self._read().items() if self._before.get(number) != text}
        return self._seen

    def leave(self, process_id: int) -> None:
        """Takes this process's file away."""
        with contextlib.suppress(OSError):
            (self._folder / str(process_id)).unlink(missing_ok=True)
            self._folder.rmdir()
            self._folder.parent.rmdir()


def missing_sentence(start: Start, process_id: int, num_processes: int, there: set[int]) -> str:
    """Returns what to tell a user whose processes did not all join in time."""
    missing = sorted(set(range(num_processes)) - there - {process_id})
    if not missing or not there:
        return (
            f"process {process_id} of {num_processes} waited {start.join_timeout} s for the others at "
            f"{coordinator()}: check that all were started, with one address that each "
            "of them can reach, or raise --join_timeout"
        )
    names = ", ".join(map(str, missing))
    return (
        f"process{'es' if len(missing) > 1 else ''} {names} of {num_processes} did not join within "
        f"{start.join_timeout} s: look at what they say, then start all {num_processes} again"
    )


def _watch(start: Start, folder: pathlib.Path, joined: threading.Event) -> None:
    """Gives signs of life until all have joined; past the limit names the missing and ends this process.

    jax itself would abort with a stack trace and no names, in C++, where no exception can be caught.
    """
    roll = RollCall(folder)
    waited = 0.0
    while not joined.wait(_SIGN):
        waited += _SIGN
        process_id, num_processes = place_in_run()
        if client_of_service() is not None:  # jax knows by now which process this is
            roll.sign(process_id)
        roll.look()
        if waited >= start.join_timeout:
            sentence = missing_sentence(start, process_id, num_processes, roll.look())
            print(f"{pathlib.Path(sys.argv[0]).stem}: {sentence}", file=sys.stderr, flush=True)
            os._exit(EXIT_NOT_JOINED)
    if client_of_service() is not None:
        roll.leave(place_in_run()[0])


def join(start: Start, folder: pathlib.Path) -> None:
    """Joins the processes of a run into one jax runtime; does nothing where there is one process.

    To be called before any device is used.

    Args:
      start: how they find each other.
      folder: one that all processes can write to, for signs of life while they wait.

    Raises:
      ConfigError: the settings cannot work. UserError: the address cannot be used. Where a process never joins,
        the program ends here with status 69 and a sentence that names it.
    """
    found = start.problems()
    if found:
        raise ConfigError("\n".join(found))
    if start.num_processes == 1:
        return
    check_service()
    # jax's own handler would swallow SIGTERM; the loop agrees on a step to stop at by itself.
    jax.config.update("jax_enable_preemption_service", False)
    joined = threading.Event()
    watcher = threading.Thread(target=_watch, args=(start, folder, joined), daemon=True)
    watcher.start()
    try:
        jax.distributed.initialize(
            start.coordinator,
            start.num_processes,
            start.process_id,
            cluster_detection_method=None if start.coordinator is None else "deactivate",
            initialization_timeout=start.join_timeout + 3600,  # ours comes first
            shutdown_timeout_seconds=60,
        )
    except ValueError as error:
        if _NO_CLUSTER not in str(error):
            raise UserError(f"jax could not find the processes of this run: {error}") from error
    except RuntimeError as error:
        if start.coordinator is None and _TOO_LATE in str(error):
            return  # whoever started jax has decided which processes there are
        raise UserError(f"cannot start at {coordinator()}: {str(error).splitlines()[0]}") from error
    finally:
        joined.set()
        watcher.join()


@contextlib.contextmanager
def joined(start: Start, folder: pathlib.Path) -> Iterator[None]:
    """Joins the processes, and on an error ends this one at once: the others would wait for it in vain, or it for them.

    Arguments and errors as for `join`.
    """
    join(start, folder)
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1:
            raise
        if isinstance(error, UserError):
            print(f"{pathlib.Path(sys.argv[0]).stem}: {error}", file=sys.stderr, flush=True)
        else:
            traceback.print_exc()
        if is_first():
            # With this process the runtime ends for all; the others should say first what they have to say.
            time.sleep(_LAST_WORDS)
        sys.stderr.flush()
        os._exit(2 if isinstance(error, UserError) else 1)


def is_first() -> bool:
    """Returns whether this is process 0, which alone writes what all share."""
    return jax.process_index() == 0


def gather(text: str) -> list[str]:
    """Returns every process's text, in the order of the processes; all must call it together."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.asarray([data.size], np.int32))).ravel()
    # Few different sizes, because each is a program that is compiled.
    padded = np.zeros(1 << max(8, int(sizes.max()).bit_length()), np.uint8)
    padded[: data.size] = data
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [rows[number, :size].tobytes().decode() for number, size in enumerate(sizes)]


def first(action: Callable[[], object]) -> None:
    """Lets process 0 act while the others wait, for minutes if it must; what stops it stops all, in the same words.

    Raises:
      UserError: `action` raised it, in process 0.
    """
    error: Exception | None = None
    if is_first():
        try:
            action()
        except Exception as caught:  # raised again below, once the others know
            error = caught
    if jax.process_count() > 1:
        # Words go by a program of the devices, whose own patience may be half a minute.
        client = client_of_service()
        assert client is not None  # there is one wherever there are many processes
        client.wait_at_barrier(f"lm/first/{next(_FIRSTS)}", _MOST_PATIENCE * 1000)
        message = gather("" if error is None else f"!{error}")[0]
        if message and error is None:
            error = UserError(message[1:])
    if error is not None:
        raise error


@contextlib.contextmanager
def first_holds(lock: contextlib.AbstractContextManager[object]) -> Iterator[None]:
    """Holds something in process 0 for all, such as a lock.

    Raises:
      UserError: process 0 cannot have it.
    """
    with contextlib.ExitStack() as stack:
        first(lambda: stack.enter_context(lock))
        yield


@functools.lru_cache(maxsize=8)
def _blocks(sharding: NamedSharding, shards: int) -> Mapping[int, tuple[int, ...]]:
    held: dict[int, set[int]] = {}
    for device, (rows,) in sharding.devices_indices_map((shards,)).items():
        held.setdefault(device.process_index, set()).add(rows.start or 0)
    return {process: tuple(sorted(parts)) for process, parts in held.items()}


def row_block(mesh: Mesh, rules: Rules) -> tuple[int, int]:
    """Returns which block of a batch's rows this process's devices hold, and of how many equal blocks.

    Processes whose devices hold the same rows, as under tensor parallelism across them, have the same block.

    Raises:
      ConfigError: processes share some rows but not all.
    """
    carriers = rules.activations["batch"]
    sharding = NamedSharding(mesh, spec(("batch",), rules.activations))
    blocks = _blocks(sharding, math.prod(mesh.shape[axis] for axis in carriers))
    distinct = sorted(set(blocks.values()))
    parts = [part for block in distinct for part in block]
    if len(parts) != len(set(parts)) or len({len(block) for block in distinct}) > 1:
        raise ConfigError(
            "config.mesh: some processes would share a part of their rows; make data x fsdp x expert a multiple or a "
            "divisor of the number of processes"
        )
    return distinct.index(blocks[jax.process_index()]), len(distinct)
