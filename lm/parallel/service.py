"""The one door to what jax keeps to itself of its processes: the service that they share, and who is who.

`jax.distributed` (of jax 0.10 and 0.11) starts it and ends it and shows nothing else; Orbax takes the same door. Knows
no run. Law: where a version of jax has another door, many processes are refused in a sentence before they start, and
one alone goes on as if there were none.
"""

from typing import Any

import jax

from lm.config import UserError

try:
    from jax._src import distributed
except ImportError:  # said by `check_service`
    distributed = None

# What is used of jax's state, and of the client to its service.
_NEEDED = ("client", "process_id", "num_processes", "coordinator_address")


def check_service() -> None:
    """Checks that jax has the door of which this file knows.

    Raises:
      UserError: it has another one.
    """
    state = getattr(distributed, "global_state", None)
    missing = [name for name in _NEEDED if not hasattr(state, name)]
    if missing:
        raise UserError(
            f"jax {jax.__version__} does not tell the {missing[0]} of many processes where other versions do, and they "
            "could not speak to each other: install a version that this project is tested with, or run one process "
            "alone (--num_processes=1)"
        )


def _state(name: str, default: Any) -> Any:
    return getattr(getattr(distributed, "global_state", None), name, default)


def client_of_service() -> Any:
    """Returns the client by which this process reaches the service; None for one alone, or before it is started.

    Of it are used `key_value_set`, `key_value_dir_get` and `wait_at_barrier`.
    """
    return _state("client", None)


def place_in_run() -> tuple[int, int]:
    """Returns this process's number and that of all, also before all have joined, when jax says so nowhere else."""
    return _state("process_id", 0), _state("num_processes", 1) or 1


def coordinator() -> str:
    """Returns the address at which the processes meet."""
    return str(_state("coordinator_address", None))
