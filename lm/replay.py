"""Shows what a step of a run read: python -m lm.replay --workdir=runs/quickstart --step=37

Rebuilds the global batch of that step bit for bit, checks its hash against what the run logged, and prints each
example decoded: document, inputs, and what was to be predicted. Works while the run goes on, and for steps to come.
"""

import json

from absl import flags

from lm import flags as program
from lm.config import ConfigError

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
_STEP = flags.DEFINE_integer("step", None, "Which step's batch, from 1.")
_ROWS = flags.DEFINE_integer("rows", None, "Show only the first so many rows.", lower_bound=1)
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object with every value and nothing else.")


def main(_: list[str]) -> int:
    """Shows the batch that the flags name."""
    workdir = program.folder(_WORKDIR.value, "--workdir", " of a run and --step=NUMBER")
    if _STEP.value is None:
        raise ConfigError("give --step=NUMBER: which step's batch, from 1")
    from lm.training.replay import first_rows, replay, show, to_json

    replayed, vocabulary, experiment = replay(workdir, _STEP.value)
    if _ROWS.value is not None:
        replayed = first_rows(replayed, _ROWS.value)
    if _JSON.value:
        print(json.dumps(to_json(replayed)))
        return 0
    for line in show(replayed, vocabulary, experiment.objective.traits.component_names):
        print(line)
    return 0


if __name__ == "__main__":
    program.run(main)
