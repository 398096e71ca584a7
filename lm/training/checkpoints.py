"""Checkpoints of a run: saved asynchronously by Orbax, restored from the newest one that is sound.

Owns the folder `checkpoints/` of a workdir and what each step in it holds: parameters, their average,
the rest of the train state, and the data iterator's state. Law: restore(save(x)) == x, bit for bit.
"""

import pathlib
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint.checkpoint_managers import preservation_policy

from lm.config import UserError
from lm.experiment import CheckpointConfig
from lm.training.state import TrainState, Tree

ITEMS = ("params", "average", "state", "data")


class CheckpointError(UserError):
    """No checkpoint can be read."""


class Restored(NamedTuple):
    """What a checkpoint held.

    Attributes:
      step: number of updates done.
      state: the train state on its devices.
      data: the data iterator's state.
      damaged: steps of newer checkpoints that could not be read.
    """

    step: int
    state: TrainState
    data: dict[str, Any]
    damaged: list[int]


def _policy(config: CheckpointConfig) -> preservation_policy.PreservationPolicy:
    keep: list[preservation_policy.PreservationPolicy] = [preservation_policy.LatestN(config.keep_last)]
    if config.keep_best:
        keep.append(
            preservation_policy.BestN(
                get_metric_fn=lambda metrics: metrics["nll"],
                reverse=True,
                n=config.keep_best,
                keep_checkpoints_without_metrics=False,
            )
        )
    if config.keep_every:
        keep.append(preservation_policy.EveryNSteps(config.keep_every))
    return preservation_policy.AnyPreservationPolicy(keep)


def _split(state: TrainState) -> tuple[Tree, Tree, dict[str, Any]]:
    """The three items of a train state: parameters, their average, and the rest."""
    rest = {"step": state.step, "opt_state": state.opt_state, "key": state.key}
    if state.spikes is not None:
        rest["spikes"] = state.spikes
    return state.params, state.average, rest


class Checkpoints:
    """The checkpoints of one workdir."""

    def __init__(self, workdir: pathlib.Path, config: CheckpointConfig) -> None:
        """Opens `workdir/checkpoints`, clearing away what an interrupted save left behind."""
        self.directory = (workdir / "checkpoints").absolute()
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=_policy(config), enable_async_checkpointing=True, cleanup_tmp_directories=True
        )
        self._every = config.every
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(self.directory, options=self._options, item_names=ITEMS)

    def save(self, state: TrainState, data: dict[str, Any], metrics: dict[str, float] | None = None) -> None:
        """Starts saving and returns once the arrays are copied off the devices.

        Args:
          state: the train state; its step names the checkpoint.
          data: the data iterator's state, plain data.
          metrics: held-out figures by which the best checkpoints are kept; needs "nll".
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        params, average, rest = _split(state)
        items: dict[str, Any] = {"params": ocp.args.StandardSave(params), "state": ocp.args.StandardSave(rest)}
        if average is not None:
            items["average"] = ocp.args.StandardSave(average)
        items["data"] = ocp.args.JsonSave(data)
        self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics, force=True)

    def restore(self, like: TrainState) -> Restored | None:
        """Restores the newest checkpoint that can be read; None if there is none at all.

        A newer one that cannot be read is renamed to `STEP.damaged`, never deleted.

        Args:
          like: a state of ShapeDtypeStructs with the shardings to restore to.

        Raises:
          CheckpointError: there are checkpoints, but none can be read.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        damaged: list[int] = []
        reasons: list[str] = []
        for step in steps:
            try:
                state, data = self._read(step, like)
            except Exception as error:  # Orbax and TensorStore raise many kinds; each is reported below
                reason = _first_line(error)
                logging.warning("checkpoint %d cannot be read (%s); trying the one before it", step, reason)
                damaged.append(step)
                reasons.append(f"{step}: {reason}")
                continue
            self._set_aside(damaged)
            return Restored(step, state, data, damaged)
        if steps:
            raise CheckpointError(f"no checkpoint in {self.directory} can be read; " + "; ".join(reasons))
        return None

    def restore_before(self, like: TrainState, before: int) -> Restored | None:
        """Restores the newest sound checkpoint before a step; None if there is none, which is the start of the run.

        It is a regular one, or the start before the first of these, so that it does not depend on when a run was
        stopped; unless no regular one was kept.

        Args:
          like: as in `restore`.
          before: the step.
        """
        self.wait()
        if before <= self._every:
            return None
        older = [step for step in self.steps() if step < before]
        regular = [step for step in older if step % self._every == 0]
        for step in reversed(regular or older):
            try:
                return Restored(step, *self._read(step, like), [])
            except Exception as error:  # as in `restore`
                logging.warning("checkpoint %d cannot be read (%s); trying the one before it", step, _first_line(error))
        return None

    def forget_after(self, step: int) -> None:
        """Deletes the checkpoints after a step that the run went back to: they are of no run any more."""
        for later in self.steps():
            if later > step:
                self._manager.delete(later)

    def _read(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        params, average, rest = _split(like)
        items: dict[str, Any] = {"params": ocp.args.StandardRestore(params), "state": ocp.args.StandardRestore(rest)}
        if average is not None:
            items["average"] = ocp.args.StandardRestore(average)
        items["data"] = ocp.args.JsonRestore()
        read = self._manager.restore(step, args=ocp.args.Composite(**items))
        state = TrainState(params=read["params"], average=read.get("average"), **read["state"])
        if int(state.step) != step:
            raise CheckpointError(f"holds step {int(state.step)}")
        return state, read["data"]

    def _set_aside(self, steps: list[int]) -> None:
        if not steps:
            return
        self._manager.close()
        for step in steps:
            source = self.directory / str(step)
            if jax.process_index() == 0 and source.exists():
                source.rename(_free_name(source.with_name(f"{step}.damaged")))
        self._manager = self._open()

    def steps(self) -> list[int]:
        """Returns the steps that are saved, oldest first."""
        return sorted(self._manager.all_steps())

    def wait(self) -> None:
        """Waits until every save that was started is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for saves under way and lets go of the folder."""
        self._manager.close()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _free_name(path: pathlib.Path) -> pathlib.Path:
    number = 0
    while path.exists():
        number += 1
        path = path.with_name(f"{path.name}.{number}")
    return path


def restore_params(workdir: pathlib.Path, like: Tree, step: int | None = None) -> tuple[int, Tree]:
    """Restores parameters only, the averaged ones if the run keeps an average.

    Args:
      workdir: of the run.
      like: tree of ShapeDtypeStructs with shardings.
      step: which checkpoint; None is the newest.

    Raises:
      CheckpointError: no such checkpoint, or its parameters are not of the model's shapes.
    """
    directory = (workdir / "checkpoints").absolute()
    if not directory.is_dir():
        raise CheckpointError(f"{workdir} has no checkpoints")
    with ocp.CheckpointManager(directory, item_names=ITEMS, options=ocp.CheckpointManagerOptions(create=False)) as m:
        steps = sorted(m.all_steps())
        if not steps or (step is not None and step not in steps):
            there = f"there are {steps}" if steps else "there is none"
            raise CheckpointError(f"{workdir} has no checkpoint{'' if step is None else f' of step {step}'}; {there}")
        reasons = []
        for candidate in [step] if step is not None else reversed(steps):
            item = "average" if (directory / str(candidate) / "average").exists() else "params"
            try:
                read = m.restore(candidate, args=ocp.args.Composite(**{item: ocp.args.StandardRestore(like)}))
            except Exception as error:  # as above: reported, then the one before it is tried
                reasons.append(f"{candidate}: {_first_line(error)}")
                logging.warning("checkpoint %s cannot be read", reasons[-1])
                continue
            return candidate, read[item]
    raise CheckpointError(f"no checkpoint in {directory} fits this model; " + "; ".join(reasons))


def save_params(workdir: pathlib.Path, params: Tree) -> None:
    """Saves parameters alone as step 0, for `restore_params`: to be used or started from, not gone on with."""
    directory = (workdir / "checkpoints").absolute()
    with ocp.CheckpointManager(directory, item_names=ITEMS) as manager:
        manager.save(0, args=ocp.args.Composite(params=ocp.args.StandardSave(params)))
