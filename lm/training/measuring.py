"""When a run's parameters are measured on held-out data, and the figures by which its checkpoints are compared.

Knows no data and writes nothing down. Law: the checkpoint of a step at which an evaluation was due comes to the figures
of that step, the same as in a run that was never stopped, whenever and however this one was.
"""

import pathlib
from collections.abc import Callable
from typing import Protocol

from lm.experiment import Experiment
from lm.parallel import processes
from lm.training.logging import read_metrics
from lm.training.manifests import lacks_metrics
from lm.training.state import TrainState, Tree


class Evaluate(Protocol):
    """Measures parameters on held-out data."""

    def __call__(self, params: Tree, whole: bool, check: Callable[[], None] = ..., /) -> dict[str, float]:
        """Returns held-out figures, "nll" among them, of some batches or the whole split; empty if there is no split.

        `check` is called before each batch and may raise, which ends it.
        """
        ...


class Measuring:
    """The evaluations of one start of a run.

    Args:
      config: of the run.
      workdir: its folder.
      evaluate: measures parameters.
    """

    def __init__(self, config: Experiment, workdir: pathlib.Path, evaluate: Evaluate) -> None:
        self._config, self._workdir, self._evaluate = config, workdir, evaluate
        self._held_out: tuple[int, dict[str, float]] = (-1, {})

    def is_due(self, step: int) -> bool:
        """Returns whether the run evaluates after a step; that after the last one is another matter."""
        every = self._config.evaluation.every
        return every is not None and step % every == 0 and 0 < step < self._config.num_steps

    def is_owed(self, step: int) -> bool:
        """Returns whether an earlier start ended at this step before its figures were down in both places.

        These are metrics.jsonl and the manifest of the checkpoint; a kill can come between the two.
        """
        if not self.is_due(step):
            return False
        lines = read_metrics(self._workdir / "metrics.jsonl")
        done = any((line["split"], line["step"]) == ("validation", step) for line in lines)
        owed = not done or lacks_metrics(self._workdir / "checkpoints" / str(step))
        return processes.gather("owed" if owed else "")[0] == "owed"

    def measure(self, step: int, state: TrainState, check: Callable[[], None], *, whole: bool) -> dict[str, float]:
        """Returns the held-out figures, and keeps those by which checkpoints are compared.

        Args:
          step: number of updates done.
          state: after them.
          check: as for `Evaluate`; what it raises is raised here, and no figures are kept.
          whole: scores the whole split.
        """
        params = state.params if state.average is None else state.average
        figures = self._evaluate(params, whole, check)
        compared = figures
        if whole and self._config.checkpoint.keep_best and self._config.evaluation.num_batches is not None:
            # Checkpoints are compared by the figures of the same batches.
            compared = self._evaluate(params, False, check)
        # Only now: asked to stop between the two, the checkpoint has no figures until the next start measures both.
        self._held_out = (step, compared)
        return figures

    def figures(self, step: int) -> dict[str, float] | None:
        """Returns the figures by which the checkpoint of a step is compared; None if it was not measured."""
        return (self._held_out[1] or None) if self._held_out[0] == step else None

    def forget(self) -> None:
        """Forgets the figures: the run went back."""
        self._held_out = (-1, {})
