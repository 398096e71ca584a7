"""How fast a run goes: tokens/s, model FLOP/s, utilisation, and the share of time spent waiting for data.

Knows no model beyond its FLOPs per token. Law: the first step of a process, which compiles, is not counted.
"""

import math
import time

from lm.experiment import Experiment
from lm.parallel.hardware import peak_flops
from lm.training.assembly import Assembly


def step_flops(config: Experiment) -> float:
    """Returns the model's floating point operations of one step, padding included, the same for every step of a run."""
    lengths = config.data.lengths
    per_token = config.model.flops_per_token(lengths.tokens, lengths.encoder)
    return per_token * config.batch_size * lengths.tokens


class Meter:
    """Speed since the last line: tokens/s, model FLOP/s, and the share of time spent waiting for data."""

    def __init__(self, config: Experiment, assembly: Assembly) -> None:
        """Starts measuring a run on the devices of its mesh."""
        self.step_flops = step_flops(config)
        devices = assembly.mesh.devices
        assert devices is not None  # only what is planned has an abstract mesh
        device = devices.flat[0]
        peak = peak_flops(device)
        self._peak = None if peak is None else peak * assembly.mesh.size
        self._skip_first = True
        self._all_tokens, self._all_seconds = 0.0, 0.0
        self.tokens_per_second = math.nan
        self.restart()

    def restart(self, at: float | None = None) -> None:
        """Forgets what was measured, after an evaluation or a save; `at`: `time.perf_counter()`, now if None."""
        self._start = self._last = time.perf_counter() if at is None else at
        self._steps, self._tokens, self._waiting = 0, 0.0, 0.0

    def waited(self, seconds: float) -> None:
        """Adds time spent waiting for a batch."""
        self._waiting += seconds

    def stepped(self, tokens: float, ended: float) -> None:
        """Adds one finished step; the first one of a process is compilation and not counted.

        Args:
          tokens: that it saw.
          ended: `time.perf_counter()` when it was done, which may be a step before it is told here.
        """
        if self._skip_first:
            self._skip_first = False
            self.restart(ended)
            return
        self._all_tokens += tokens
        self._all_seconds += ended - self._last
        self._last = ended
        self._steps += 1
        self._tokens += tokens
        self.tokens_per_second = self._tokens / max(ended - self._start, 1e-9)

    @property
    def overall(self) -> float:
        """Tokens/s over every step but the first, evaluations and saves left out; not a number before the second."""
        return self._all_tokens / self._all_seconds if self._all_seconds else math.nan

    def read(self) -> dict[str, float]:
        """Returns the figures since the last reading and starts anew; empty before the second step."""
        if not self._steps:
            return {}
        seconds = max(self._last - self._start, 1e-9)
        flops = self.step_flops * self._steps / seconds
        figures = {
            "tokens_per_second": self._tokens / seconds,
            "seconds_per_step": seconds / self._steps,
            "data_wait_fraction": min(self._waiting / seconds, 1.0),
            "model_flops_per_second": flops,
        }
        if self._peak is not None:
            figures["model_flops_utilization"] = flops / self._peak
        self.restart(self._last)
        return figures
