"""Trains a model: python -m lm.train --config=configs/quickstart.py --workdir=runs/quickstart

Stopped at any moment (also by kill -9), the same command goes on from the newest checkpoint with the
same losses, bit for bit. Any field of the config is overridden by --config.PATH=VALUE; add --help to
see them all. Several processes are one run: the same command in each, with --coordinator, --num_processes and
--process_id where jax cannot find them itself.
Exit status: 0 finished, 75 asked to stop and saved, 2 something to mend, 70 stopped by itself with a report on bad
numbers or wrong hardware (do not start it again as it is), 69 a process did not join in time (start all again).
"""

import sys

from absl import flags

from lm import flags as program

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: config, checkpoints, metrics, tokenizer.")
_FORCE = flags.DEFINE_bool("force_config", False, "Go on in a folder that holds another config.")
_TAKE_OVER = flags.DEFINE_bool("take_over", False, "Go on in a folder that a run of another machine holds; ends that.")
program.define_start()


def _schema() -> type:
    from lm.experiment import Experiment

    return Experiment


def main(_: list[str]) -> int:
    """Trains the run that the flags name."""
    workdir = program.folder(_WORKDIR.value, "--workdir", ", where the run is kept")
    experiment = program.config(_schema())
    experiment.validate()
    # Only now the parts that start the devices.
    from lm.evaluation.heldout import make_evaluate
    from lm.interop import import_params
    from lm.parallel import processes
    from lm.training.health import EXIT_SICK, SickRunError
    from lm.training.loop import train
    from lm.training.stopping import EXIT_PREEMPTED
    from lm.training.workdir import open_workdir

    start, folder = processes.Start(**program.start()), open_workdir(workdir)
    force = {"force_config": _FORCE.value, "take_over": _TAKE_OVER.value}
    with processes.joined(start, folder / "processes" / "train"):
        try:
            finished = train(experiment, str(folder), make_evaluate, **force, import_params=import_params)
        except SickRunError as error:
            # All processes come to it at the same step.
            print(f"train: {error}", file=sys.stderr)
            return EXIT_SICK
    return 0 if finished else EXIT_PREEMPTED


if __name__ == "__main__":
    program.run(main, _schema)
