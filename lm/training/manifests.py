"""Manifests: what each file of a checkpoint must hold, so that damage is found before it is trained on.

Owns `manifest.json` in the folder of a checkpoint: size and hash of every file, read back from the disk. Knows
no arrays. Law: one changed, missing or shortened file is found and named.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Sequence
from concurrent import futures
from typing import Any

from absl import logging

MANIFEST = "manifest.json"
# Orbax completes these at the top of a checkpoint after the last moment at which a manifest can be written.
_COMPLETED_LATER = ("_CHECKPOINT_METADATA", "commit_success.txt", MANIFEST)
# Files hashed at one time: hashing and reading leave Python's lock.
_READERS = 8


def _files(folder: pathlib.Path) -> list[str]:
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name not in _COMPLETED_LATER)


def _describe(path: pathlib.Path) -> list[Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
    return [path.stat().st_size, digest.hexdigest()]


def write_manifest(folder: pathlib.Path, facts: dict[str, Any]) -> None:
    """Reads every file of a checkpoint back and writes down what it holds.

    Args:
      folder: of the checkpoint, complete.
      facts: plain values to keep with it.
    """
    names = _files(folder)
    with futures.ThreadPoolExecutor(_READERS) as pool:
        found = dict(zip(names, pool.map(lambda name: _describe(folder / name), names), strict=True))
    _write(folder / MANIFEST, {**facts, "files": found})


def _write(path: pathlib.Path, manifest: dict[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def add_metrics(folder: pathlib.Path, metrics: dict[str, float]) -> bool:
    """Writes down the held-out figures of a checkpoint that was saved without, as when a run was asked to stop.

    Where that cannot be done it says so, and the checkpoint stays as it is.

    Returns:
      Whether they were written.
    """
    new = folder / f"{MANIFEST}.new"
    try:
        manifest = read_manifest(folder)
        if manifest is None or not metrics or manifest.get("metrics"):
            return False
        _write(new, {**manifest, "metrics": metrics})
        new.replace(folder / MANIFEST)
    except (OSError, ValueError, RecursionError) as error:
        with contextlib.suppress(OSError):  # of the same disk
            new.unlink(missing_ok=True)
        why = error.strerror if isinstance(error, OSError) else error
        logging.warning("the held-out figures of %s could not be added to it (%s)", folder, why)
        return False
    return True


def read_manifest(folder: pathlib.Path) -> dict[str, Any] | None:
    """Returns a manifest; None where there is none, as in checkpoints of version 0.1.

    Raises:
      ValueError: it is damaged.
    """
    file = folder / MANIFEST
    if not file.exists():
        return None
    found = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or not isinstance(found.get("files"), dict):
        raise ValueError("no list of files")
    for name, described in found["files"].items():
        if name.startswith("/") or ".." in name.split("/") or "\0" in name:
            raise ValueError(f"{name[:80]!r} is no file of a checkpoint")
        if not isinstance(described, list) or [type(value) for value in described] != [int, str]:
            raise ValueError(f"no size and hash of {name[:80]!r}")
    metrics = found.get("metrics")
    if metrics and not (isinstance(metrics, dict) and isinstance(metrics.get("nll"), int | float)):
        raise ValueError("its held-out figures have no nll")
    return found


def lacks_metrics(folder: pathlib.Path) -> bool:
    """Returns whether held-out figures can be added to a checkpoint, which was saved without."""
    try:
        manifest = read_manifest(folder)
    except (OSError, ValueError, RecursionError):
        return False
    return manifest is not None and not manifest.get("metrics")


def find_damage(folder: pathlib.Path, share: tuple[int, int] = (0, 1), *, sizes_only: bool = False) -> str | None:
    """Returns which file of a checkpoint is not as it was written, and why; None if all are.

    Args:
      folder: of the checkpoint.
      share: (i, n) looks at every n-th file from the i-th on, so that n processes look at all.
      sizes_only: reads no file.
    """
    try:
        manifest = read_manifest(folder)
    except (OSError, ValueError, RecursionError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    if manifest is None:
        return None
    names = sorted(manifest["files"])[share[0] :: share[1]]
    with futures.ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(lambda name: _damage(folder / name, manifest["files"][name], sizes_only), names)
        return next((f"{name} {reason}" for name, reason in zip(names, found, strict=True) if reason), None)


def _damage(path: pathlib.Path, expected: Sequence[Any], sizes_only: bool) -> str | None:
    try:
        size = path.stat().st_size
        if size != expected[0]:
            return f"has {size} bytes instead of {expected[0]}"
        if not sizes_only and _describe(path)[1] != expected[1]:
            return "holds other bytes than were written"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None


def probe(folder: pathlib.Path) -> None:
    """Makes and deletes a folder and a file in a folder; raises OSError where the disk does not allow it."""
    made = folder / f"probe.{os.getpid()}.deleted"
    try:
        made.mkdir(parents=True, exist_ok=True)
        (made / "file").write_bytes(bytes(4096))
    finally:
        shutil.rmtree(made, ignore_errors=True)


def free_name(path: pathlib.Path) -> pathlib.Path:
    """Returns the path, or the first with a number behind it that does not exist."""
    number = 0
    while path.exists():
        number += 1
        path = path.with_name(f"{path.name}.{number}")
    return path
