"""Evaluates a trained run on held-out text: python -m lm.evaluate --workdir=runs/quickstart

Prints loss and perplexity of the run's own objective, and bits per byte by the yardstick that all runs share
(lm/evaluation/yardstick.py), every token exactly once, beside the unigram entropy. --data scores other files.
"""

import dataclasses
import json
import pathlib

from absl import flags

from lm import flags as program
from lm.config import ConfigError

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
_STEP = flags.DEFINE_integer("step", None, "Which checkpoint (default: the newest).")
_DATA = flags.DEFINE_string("data", None, "Score these files, all of them, instead of the run's held-out split.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Rows per batch; does not change the answer.", lower_bound=1)
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object and nothing else.")
program.define_start()


def main(_: list[str]) -> int:
    """Evaluates the run that the flags name."""
    workdir = program.folder(_WORKDIR.value, "--workdir", " of a trained run")
    from lm.evaluation.heldout import make_evaluate
    from lm.evaluation.yardstick import choose_yardstick
    from lm.parallel import processes
    from lm.training.assembly import load_run

    start = processes.Start(**program.start())
    with processes.joined(start, pathlib.Path(workdir) / "processes" / "evaluate"):
        run = load_run(workdir, _STEP.value)
        data = None
        if _DATA.value is not None:
            data = dataclasses.replace(run.experiment.data, source=_DATA.value, validation_fraction=1.0)
        figures = make_evaluate(run.assembly, data, _BATCH_SIZE.value)(run.params, True)
    if not figures:
        raise ConfigError(f"{workdir} held nothing out (data.validation_fraction is 0); name text with --data=FILES")
    if not processes.is_first():
        return 0
    if _JSON.value:
        print(json.dumps({"step": run.step, **figures}))
        return 0
    print(f"{workdir}, step {run.step}: {figures['tokens']:,.0f} held-out tokens, {figures['bytes']:,.0f} bytes")
    print(f"  loss             {figures['nll']:.4f} nats/token")
    print(f"  perplexity       {figures['perplexity']:.2f}")
    print(f"  accuracy         {figures['accuracy']:.2%}")
    scored = choose_yardstick(run.experiment.objective, run.experiment.model.layout).words
    print(f"  bits per byte    {figures['bits_per_byte']:.4f} ({scored})")
    print(f"  unigram entropy  {figures['unigram_bits_per_byte']:.4f} bits per byte of the same tokens")
    return 0


if __name__ == "__main__":
    program.run(main)
