"""Which batch each step of a run read: the hash chain over them, and the batches that were passed over.

Without a roll back step k reads batch k. A roll back goes back to an earlier step and on with the next batch, so that
what lay between is read by no step of the run. Law: (config, passed over, step) name a batch.
"""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

from lm.config import UserError
from lm.training.logging import write_atomically

_BEYOND_STEPS = 1 << 40


def chain(before: str, digest: str) -> str:
    """Returns the hash of everything read so far, in order: equal hashes mean equal tokens in equal order."""
    return hashlib.blake2b(f"{before}{digest}".encode(), digest_size=8).hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class PassedOver:
    """Batches that a roll back left out.

    Attributes:
      after: the step that the run went back to.
      batches: how many batches were left out before the next step.
      spike: the step whose loss or gradient was out of bounds.
    """

    after: int
    batches: int
    spike: int


def _passed_over(one: Any) -> PassedOver:
    found = PassedOver(**one)
    if any(type(value) is not int or not 0 <= value < _BEYOND_STEPS for value in dataclasses.astuple(found)):
        raise ValueError(f"{found} is no roll back")
    return found


class Detours:
    """The roll backs of a run, kept in its folder, so that a killed run and a replay repeat them."""

    def __init__(self, workdir: pathlib.Path) -> None:
        """Reads those that the folder records."""
        self._path = workdir / "rollbacks.json"
        self.found: list[PassedOver] = []
        if self._path.exists():
            try:
                self.found = [_passed_over(one) for one in json.loads(self._path.read_text(encoding="utf-8"))]
            except (OSError, ValueError, TypeError, RecursionError) as error:
                raise UserError(f"{self._path} is damaged ({error}): the batches of the run are not known") from error

    def batch_number(self, step: int) -> int:
        """Returns which batch, from 1, the step reads."""
        return step + sum(one.batches for one in self.found if one.after < step)

    def forget_after(self, step: int) -> None:
        """Drops those that led back to a later step: a run that goes on from here decides them again."""
        self.found = [one for one in self.found if one.after <= step]

    def add(self, one: PassedOver, *, write: bool) -> None:
        """Adds a roll back; with `write` to the folder too, before anything else is done about it.

        Raises:
          UserError: the folder cannot be written to.
        """
        self.found.append(one)
        if write:
            try:
                write_atomically(self._path, json.dumps([dataclasses.asdict(each) for each in self.found]) + "\n")
            except OSError as error:
                raise UserError(f"{self._path} cannot be written ({error.strerror}): a roll back must be") from error
