"""The folder of a run: its config, its lock, its record. One run at a time, one config a folder.

Law: a folder that holds another config is never written to without being told to; the record says
enough to repeat the run (config, versions, commit, mesh, data).
"""

import contextlib
import fcntl
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import jax
from jax.sharding import Mesh

from lm import config as configs
from lm import flags as program
from lm.config import ConfigError, UserError
from lm.experiment import Experiment
from lm.training.lease import Lease
from lm.training.logging import write_atomically

PACKAGES = ("lm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "sentencepiece", "numpy")


class WorkdirError(UserError):
    """The folder of a run cannot be used."""


def open_workdir(path: str) -> pathlib.Path:
    """Creates or reopens the folder of a run.

    Raises:
      WorkdirError: it cannot be written to, or not by a run. ConfigError: it is no folder but an address.
    """
    workdir = pathlib.Path(os.path.expanduser(program.folder(path, "--workdir"))).absolute()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise WorkdirError(f"--workdir: cannot write to {workdir}: {error.strerror or error}") from error
    checkpoints = workdir / "checkpoints"
    if os.path.lexists(checkpoints) and not checkpoints.is_dir():
        # Found out only at the first save otherwise, when steps have been made in vain.
        raise WorkdirError(f"{checkpoints} is no folder, so no checkpoint could be saved; move it away")
    return workdir


def check_config(workdir: pathlib.Path, experiment: Experiment, *, force_config: bool) -> None:
    """Checks the resolved config against that of a folder that is `locked`; of many processes only the first may.

    A start that never came to a checkpoint (wrong data, a vocabulary too large) left nothing to protect: its config
    and its tokenizer make way at once. Beside checkpoints nothing is written: `save_config` does, once they are read.

    Args:
      workdir: the folder.
      experiment: the resolved config.
      force_config: go on although the folder holds another config.

    Raises:
      ConfigError: it holds checkpoints of another config; the message shows the differences. Or the tokenizer is
        to be another one, forced or not.
    """
    old, changes = _compare(workdir, experiment)
    if not _has_checkpoints(workdir):
        if changes:
            shutil.rmtree(workdir / "tokenizer", ignore_errors=True)
        save_config(workdir, experiment)
    elif changes and not force_config:
        listed = "\n  ".join(changes)
        raise ConfigError(
            f"{workdir} holds a run with another config:\n  {listed}\n"
            "Use another --workdir, or --force_config to go on in this one with the new config."
        )
    elif changes and old.get("data", {}).get("tokenizer") != configs.to_json(experiment)["data"]["tokenizer"]:
        raise ConfigError(
            f"{workdir} holds weights trained with its own tokenizer, which cannot be exchanged; "
            "leave config.data.tokenizer as it was, or use another --workdir"
        )


def save_config(workdir: pathlib.Path, experiment: Experiment) -> None:
    """Saves the resolved config; another one, with which the folder's checkpoints were made, becomes config.json.N."""
    file = workdir / "config.json"
    if _compare(workdir, experiment)[1] and _has_checkpoints(workdir):
        number = 1
        while (workdir / f"config.json.{number}").exists():
            number += 1
        file.rename(workdir / f"config.json.{number}")
    write_atomically(file, json.dumps(configs.to_json(experiment), indent=2) + "\n")


def _has_checkpoints(workdir: pathlib.Path) -> bool:
    return any((workdir / "checkpoints").glob("*"))


def _compare(workdir: pathlib.Path, experiment: Experiment) -> tuple[Any, list[str]]:
    """Returns the config that a folder holds, and in what this one differs; nothing where it holds none."""
    file = workdir / "config.json"
    if not file.exists():
        return {}, []
    try:
        old = _with_new_fields(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not a saved config ({error}); move it away to start anew") from error
    return old, configs.differences(old, configs.to_json(experiment))


def _with_new_fields(saved: Any) -> Any:
    """Returns a saved config with the defaults of fields that came after it: an older version's run is no other run."""
    try:
        return configs.to_json(configs.from_json(Experiment, saved))
    except ConfigError:
        # It has what there is no more; the differences will name it.
        return saved


def read_config(workdir: pathlib.Path) -> Experiment:
    """Returns the config saved in a run's folder.

    Raises:
      ConfigError: there is none, or it cannot be read.
    """
    file = workdir / "config.json"
    if not file.exists():
        raise ConfigError(f"{workdir} is not the folder of a run: it has no config.json")
    return configs.from_json(Experiment, configs.load(str(file)))


@contextlib.contextmanager
def locked(workdir: pathlib.Path, *, take_over: bool = False) -> Iterator[None]:
    """Holds the folder for this process, the first of its run: by a lock against others of this machine, which goes
    with the process, however it ends, and by a lease against other machines.

    Args:
      workdir: the folder.
      take_over: takes the lease of another machine without waiting for its death.

    Raises:
      WorkdirError: another live process of this machine is training in this folder. LeaseError: another machine is.
    """
    with (workdir / "lock.0").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read().strip()
            raise WorkdirError(
                f"{workdir} is in use by process {holder}; wait for it or choose another --workdir"
            ) from error
        file.truncate(0)
        file.write(f"{os.getpid()} on {platform.node()}")
        file.flush()
        with Lease(workdir).held(take_over=take_over, say=lambda text: print(text, file=sys.stderr, flush=True)):
            yield


def _git_commit() -> str | None:
    root = pathlib.Path(__file__).parent.parent.parent
    try:
        run = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
        return subprocess.run(run, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def read_starts(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the starts that run.json records, oldest first; none before the first.

    Raises:
      WorkdirError: the file is damaged.
    """
    file = workdir / "run.json"
    if not file.exists():
        return []
    try:
        starts = json.loads(file.read_text(encoding="utf-8"))["starts"]
        if any(not isinstance(start["data_fingerprint"], str) for start in starts):
            raise ValueError("a start has no fingerprint of its data")
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise WorkdirError(f"{file} is damaged ({error}); move it away to go on without it") from error
    return list(starts)


def check_data(workdir: pathlib.Path, fingerprint: str, *, force_config: bool) -> None:
    """Checks that a run which goes on reads the data that it read before.

    Raises:
      WorkdirError: the files changed since the last start.
    """
    starts = read_starts(workdir)
    if starts and starts[-1]["data_fingerprint"] != fingerprint and not force_config:
        raise WorkdirError(
            f"{workdir}: the text changed since this run was last started; bring it back, start a new run with "
            "--config.init_from, or use --force_config to go on with the new text"
        )


def write_record(workdir: pathlib.Path, experiment: Experiment, mesh: Mesh, facts: dict[str, Any]) -> None:
    """Adds this start to run.json: resolved config, versions, commit, mesh, devices, data, start step.

    Of many processes only the first may.

    Args:
      workdir: of the run.
      experiment: the resolved config.
      mesh: in use.
      facts: what only the loop knows (data fingerprint, number of parameters, step resumed from).
    """
    starts = read_starts(workdir)
    devices = list(mesh.devices.flat)
    starts.append(
        {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "argv": sys.argv,
            "python": platform.python_version(),
            "packages": {name: _version(name) for name in PACKAGES},
            "git_commit": _git_commit(),
            "host": platform.node(),
            "platform": platform.platform(),
            "devices": {"kind": devices[0].device_kind, "number": len(devices), "processes": jax.process_count()},
            "mesh": {name: int(size) for name, size in mesh.shape.items()},
            "xla_flags": os.environ.get("XLA_FLAGS", ""),
            **facts,
        }
    )
    record = {"config": configs.to_json(experiment), "starts": starts}
    write_atomically(workdir / "run.json", json.dumps(record, indent=2) + "\n")
