"""Draws the loss curves of one or several runs: python -m lm.report --output=curve.png RUN [RUN ...]"""

import pathlib

from absl import flags

from lm import flags as program
from lm.config import ConfigError

_OUTPUT = flags.DEFINE_string("output", "curve.png", "The PNG to write.")
_VALUE = flags.DEFINE_string("value", "bits_per_byte", "Which figure of metrics.jsonl to draw.")


def main(workdirs: list[str]) -> int:
    """Draws the runs that the arguments name."""
    if not workdirs:
        raise ConfigError("name the folder of at least one run")
    from lm.evaluation.curves import draw_curves, load_history

    histories = [load_history(pathlib.Path(workdir)) for workdir in workdirs]
    known = histories[0].train[-1] if histories[0].train else {}
    if _VALUE.value not in known:
        raise ConfigError(f"--value={_VALUE.value} is not in metrics.jsonl; there are {', '.join(known)}")
    try:
        draw_curves(histories, pathlib.Path(_OUTPUT.value), _VALUE.value)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--output={_OUTPUT.value} cannot be written: {error}") from error
    print(f"wrote {_OUTPUT.value}")
    return 0


if __name__ == "__main__":
    program.run(main, takes_arguments=True)
