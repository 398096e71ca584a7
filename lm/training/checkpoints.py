"""Checkpoints of a run: saved asynchronously by Orbax, proven by a manifest, restored from the newest sound one.

Owns the folder `checkpoints/` of a workdir and what each step in it holds: parameters, their average,
the rest of the train state, and the data iterator's state. Laws: restore(save(x)) == x, bit for bit; no sound
checkpoint is deleted before a later one stands, read back and complete; steps are ordered by their number.
"""

import contextlib
import dataclasses
import json
import pathlib
import shutil
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint import options as orbax_options
from orbax.checkpoint.checkpoint_managers import preservation_policy

from lm.config import ConfigError, UserError, say_first
from lm.experiment import CheckpointConfig
from lm.parallel import processes
from lm.training.manifests import add_metrics, find_damage, free_name, probe, read_manifest, write_manifest
from lm.training.misfits import find_change, find_misfits
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


def _split(state: TrainState) -> tuple[Tree, Tree, dict[str, Any]]:
    """The three items of a train state: parameters, their average, and the rest."""
    rest = {"step": state.step, "opt_state": state.opt_state, "key": state.key}
    if state.spikes is not None:
        rest["spikes"] = state.spikes
    return state.params, state.average, rest


@dataclasses.dataclass
class _Save:
    """A save under way: the step, its held-out figures, and what went wrong."""

    step: int
    metrics: dict[str, float] | None
    trouble: str = ""


def saved_steps(directory: pathlib.Path) -> list[int]:
    """Returns the steps that were saved to the end, oldest first, by their numbers and never by a clock."""
    return sorted(int(path.name) for path in directory.glob("*") if path.name.isdecimal() and path.is_dir())


def steps_to_keep(directory: pathlib.Path, config: CheckpointConfig) -> set[int]:
    """Returns which saved steps the config wants: the last, the best, and those at a distance."""
    steps = saved_steps(directory)
    losses = {}
    for step in steps if config.keep_best else ():
        with contextlib.suppress(OSError, ValueError, RecursionError):
            metrics = (read_manifest(directory / str(step)) or {}).get("metrics")
            if metrics:
                losses[step] = metrics["nll"]
    best = sorted(losses, key=lambda step: (losses[step], -step))[: config.keep_best]
    apart = [step for step in steps if config.keep_every and step % config.keep_every == 0]
    return {*steps[-config.keep_last :], *best, *apart}


class Checkpoints:
    """The checkpoints of one workdir; every process of a run calls every method, at the same step."""

    def __init__(self, workdir: pathlib.Path, config: CheckpointConfig) -> None:
        """Opens `workdir/checkpoints`, clearing away what an interrupted save or deletion left behind."""
        self.directory = (workdir / "checkpoints").absolute()
        self._config = config
        self._save: _Save | None = None
        self._failed: _Save | None = None
        self._manager: ocp.CheckpointManager | None = None
        processes.first(self._clear_deleted)
        self._steps = self._agree_on_steps()

    @property
    def _orbax(self) -> ocp.CheckpointManager:
        if self._manager is None:
            self._manager = ocp.CheckpointManager(
                self.directory,
                item_names=ITEMS,
                options=ocp.CheckpointManagerOptions(
                    # Orbax would delete old ones before the new one is proven.
                    preservation_policy=preservation_policy.PreserveAll(),
                    enable_async_checkpointing=True,
                    cleanup_tmp_directories=True,
                    async_options=orbax_options.AsyncOptions(post_finalization_callback=self._prove),
                ),
            )
        return self._manager

    def _prove(self) -> None:
        """Writes the manifest into a checkpoint that is complete but for its name; Orbax's thread, first process."""
        assert self._save is not None
        (folder,) = self.directory.glob(f"{self._save.step}.orbax-checkpoint-tmp*")
        write_manifest(folder, {"step": self._save.step, "metrics": self._save.metrics})

    def _clear_deleted(self) -> None:
        for folder in self.directory.glob("*.deleted"):
            shutil.rmtree(folder, ignore_errors=True)

    def _agree_on_steps(self) -> list[int]:
        """Returns the steps that the first process sees: file systems may show the same folder at different times."""
        return json.loads(processes.gather(json.dumps(saved_steps(self.directory)))[0])

    def save(self, state: TrainState, data: dict[str, Any], metrics: dict[str, float] | None = None) -> None:
        """Starts saving and returns once the arrays are copied off the devices.

        Where the disk does not allow it, says so and returns: the next save is the next try, and `wait` raises. A step
        that is saved already, by a start that was stopped before it had evaluated, only gets its figures.

        Args:
          state: the train state; its step names the checkpoint.
          data: the data iterator's state, plain data.
          metrics: held-out figures by which the best checkpoints are kept; needs "nll".
        """
        self._settle()
        step = int(state.step)
        if step in self._steps:
            processes.first(lambda: self._add(step, metrics or {}))
            self._steps = self._agree_on_steps()
            return
        params, average, rest = _split(state)
        items: dict[str, Any] = {"params": ocp.args.StandardSave(params), "state": ocp.args.StandardSave(rest)}
        if average is not None:
            items["average"] = ocp.args.StandardSave(average)
        items["data"] = ocp.args.JsonSave(data)
        self._save = _Save(step, metrics)
        try:
            # Where no folder can be made Orbax would leave threads behind that wait for it for minutes.
            processes.first(lambda: probe(self.directory))
            self._orbax.save(step, args=ocp.args.Composite(**items), force=True)
        except Exception as error:  # of the disk, in many kinds; said by `_settle`
            self._save.trouble = _first_line(error)
            self._settle()

    def _add(self, step: int, metrics: dict[str, float]) -> None:
        if add_metrics(self.directory / str(step), metrics):
            self._delete_old()

    def _settle(self) -> None:
        """Waits for the save under way; deletes what is not to be kept once the new one stands."""
        save = self._save
        if save is None:
            return
        try:
            self._orbax.wait_until_finished()
            if processes.is_first() and not save.trouble:
                folder = self.directory / str(save.step)
                save.trouble = (find_damage(folder, sizes_only=True) or "") if folder.is_dir() else "it is gone"
        except Exception as error:  # as above
            save.trouble = save.trouble or _first_line(error)
        self._save = None
        save.trouble = next(filter(None, processes.gather(save.trouble)), "")
        self._failed = save if save.trouble else None
        if save.trouble:
            logging.error(
                "checkpoint %d could not be saved: %s. Training goes on; the next save tries again.",
                save.step,
                save.trouble,
            )
            self._let_go()
        elif processes.is_first():
            self._delete_old()
        self._steps = self._agree_on_steps()

    def _delete_old(self) -> None:
        wanted = steps_to_keep(self.directory, self._config)
        self._delete([step for step in saved_steps(self.directory) if step not in wanted])

    def _delete(self, steps: list[int]) -> None:
        for step in steps:
            folder = self.directory / str(step)
            try:
                # Renamed first: a deletion that is cut short never looks like a checkpoint.
                shutil.rmtree(folder.rename(folder.with_name(f"{step}.deleted")))
            except OSError as error:
                logging.warning("checkpoint %d could not be deleted: %s", step, error.strerror)

    def restore(self, like: TrainState) -> Restored | None:
        """Restores the newest checkpoint that is sound; None if there is none at all.

        A newer one that is damaged is renamed to `STEP.damaged`, never deleted.

        Args:
          like: a state of ShapeDtypeStructs with the shardings to restore to, of any number of processes.

        Raises:
          CheckpointError: there are checkpoints, but none can be read. ConfigError: the newest sound one is of another
            config; nothing is renamed.
        """
        damaged: list[int] = []
        reasons: list[str] = []
        for step in reversed(self._steps):
            found, reason = self._try(step, like)
            if reason:
                logging.warning("checkpoint %d is damaged (%s); trying the one before it", step, reason)
                damaged.append(step)
                reasons.append(f"{step}: {reason}")
                continue
            assert found is not None
            self._set_aside(damaged)
            return found._replace(damaged=damaged)
        if reasons:
            raise CheckpointError(f"no checkpoint in {self.directory} can be read; " + "; ".join(reasons))
        return None

    def restore_before(self, like: TrainState, before: int) -> Restored | None:
        """Restores the newest sound checkpoint before a step; None if there is none, which is the start of the run.

        It is a regular one, or the start before the first of these, so that it does not depend on when a run was
        stopped; unless no regular one was kept.

        Args:
          like: as in `restore`.
          before: the step.

        Raises:
          ConfigError: it is of another config.
        """
        self._settle()
        if before <= self._config.every:
            return None
        older = [step for step in self._steps if step < before]
        regular = [step for step in older if step % self._config.every == 0]
        for step in reversed(regular or older):
            found, reason = self._try(step, like)
            if not reason:
                return found
            logging.warning("checkpoint %d is damaged (%s); trying the one before it", step, reason)
        return None

    def forget_after(self, step: int) -> None:
        """Deletes the checkpoints after a step that the run went back to: they are of no run any more."""
        self._settle()
        # Orbax keeps a list of its own of what there is.
        self._let_go()
        if processes.is_first():
            self._delete([later for later in saved_steps(self.directory) if later > step])
        self._steps = self._agree_on_steps()

    def _try(self, step: int, like: TrainState) -> tuple[Restored | None, str]:
        """Reads a checkpoint; returns why not if any process cannot, and raises if it is sound but does not fit."""
        folder = self.directory / str(step)
        found, reason, change = None, shared_damage(folder), ""
        if not reason:
            with contextlib.suppress(Exception):  # metadata that cannot be read: the reading says so
                change = find_change(folder, like)
            if change := next(filter(None, processes.gather(change)), ""):
                raise ConfigError(change)
            try:
                found = Restored(step, *self._read(step, like), [])
            except Exception as error:  # Orbax and TensorStore raise many kinds; each is reported
                reason = _first_line(error)
        return found, next(filter(None, processes.gather(reason)), "")

    def _read(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        params, average, rest = _split(like)
        items: dict[str, Any] = {"params": ocp.args.StandardRestore(params), "state": ocp.args.StandardRestore(rest)}
        if average is not None:
            items["average"] = ocp.args.StandardRestore(average)
        items["data"] = ocp.args.JsonRestore()
        read = self._orbax.restore(step, args=ocp.args.Composite(**items))
        state = TrainState(params=read["params"], average=read.get("average"), **read["state"])
        if int(state.step) != step:
            raise CheckpointError(f"holds step {int(state.step)}")
        return state, read["data"]

    def _set_aside(self, steps: list[int]) -> None:
        if not steps:
            return
        self._let_go()
        for step in steps:
            source = self.directory / str(step)
            processes.first(lambda source=source: source.rename(free_name(source.with_name(f"{source.name}.damaged"))))
        self._steps = self._agree_on_steps()

    def steps(self) -> list[int]:
        """Returns the steps that are saved, oldest first."""
        return saved_steps(self.directory)

    def wait(self) -> None:
        """Waits until what was last given to `save` is on disk and complete.

        Raises:
          CheckpointError: it could not be saved.
        """
        self._settle()
        if self._failed is not None:
            step, before = self._failed.step, self._steps[-1:]
            there = f"the newest checkpoint is of step {before[0]}" if before else "there is no checkpoint"
            raise CheckpointError(
                f"step {step} could not be saved in {self.directory}: {self._failed.trouble}; {there}. Once the disk "
                "is mended, the same command goes on from there"
            )

    def _let_go(self) -> None:
        manager, self._manager = self._manager, None
        if manager is not None:
            # What failed was said, and may fail again on closing.
            with contextlib.suppress(Exception):
                manager.close()

    def close(self) -> None:
        """Waits for saves under way and lets go of the folder."""
        self._settle()
        self._let_go()


def shared_damage(folder: pathlib.Path) -> str:
    """Returns which file of a checkpoint is damaged, in words; each process looks at its share of the files."""
    share = (jax.process_index(), jax.process_count())
    return next(filter(None, processes.gather(find_damage(folder, share) or "")), "")


def _first_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


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
        steps = saved_steps(directory)
        if not steps or (step is not None and step not in steps):
            there = f"there are {steps}" if steps else "there is none"
            raise CheckpointError(f"{workdir} has no checkpoint{'' if step is None else f' of step {step}'}; {there}")
        reasons = []
        for candidate in [step] if step is not None else reversed(steps):
            item = "average" if (directory / str(candidate) / "average").exists() else "params"
            try:
                if damage := shared_damage(directory / str(candidate)):
                    raise CheckpointError(damage)
                if misfits := find_misfits(m.directory / str(candidate) / item, like):
                    reasons.append(f"that of step {candidate} {say_first(misfits)}")
                    continue
                read = m.restore(candidate, args=ocp.args.Composite(**{item: ocp.args.StandardRestore(like)}))
            except Exception as error:  # as above: reported, then the one before it is tried
                reasons.append(f"that of step {candidate} cannot be read ({_first_line(error)})")
                logging.warning("%s", reasons[-1])
                continue
            return candidate, read[item]
    raise CheckpointError(f"no checkpoint in {directory} fits this model: {'; '.join(reasons)}")


def save_params(workdir: pathlib.Path, params: Tree) -> None:
    """Saves parameters alone as step 0, for `restore_params`: to be used or started from, not gone on with."""
    directory = (workdir / "checkpoints").absolute()
    with ocp.CheckpointManager(directory, item_names=ITEMS) as manager:
        manager.save(0, args=ocp.args.Composite(params=ocp.args.StandardSave(params)))
