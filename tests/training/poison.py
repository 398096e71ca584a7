"""Training on batches of which some are made bad, or end the process, by their number."""

import dataclasses

import numpy as np

from lm.data import Batches, train_batches
from lm.training import loop


class Killed(BaseException):
    """Ends a run as SIGKILL would: nothing is saved on the way out."""


@dataclasses.dataclass
class Poison:
    """What happens at which batches, numbered from 1."""

    not_finite: tuple[int, ...] = ()
    spikes: tuple[int, ...] = ()
    kill: int | None = None

    def apply(self, monkeypatch):
        poison = self

        class Poisoned(Batches):
            def __next__(self):
                batch = super().__next__()
                number = self.get_state()["batches"]
                if number == poison.kill:
                    raise Killed
                if number in poison.not_finite:
                    return batch._replace(weights=np.full_like(batch.weights, np.nan))
                if number in poison.spikes:
                    # Divided by nearly nothing: a large loss with a large gradient.
                    signs = np.where(np.arange(batch.weights.shape[1]) % 2, -0.99, 1.0).astype(np.float32)
                    return batch._replace(weights=batch.weights * signs)
                return batch

        def opened(*arguments):
            batches = train_batches(*arguments)
            batches.__class__ = Poisoned
            return batches

        monkeypatch.setattr(loop, "train_batches", opened)
