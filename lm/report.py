"""Draws one run's curve, or several runs together: python -m lm.report --output=curve.png RUN [RUN ...]

Several runs are drawn by their held-out figure against operations, tokens and time, with a table, printed
and written beside the picture as Markdown. To compare the families of configs/compare.py:

  for v in causal prefix mlm span ul2 moe; do
    python -m lm.train --config=configs/compare.py:$v --workdir=runs/compare/$v
  done
  python -m lm.report --output=runs/compare/curves.png runs/compare/*/
"""

import pathlib

from absl import flags

from lm import flags as program
from lm.config import ConfigError

_OUTPUT = flags.DEFINE_string("output", "curve.png", "The PNG to write; the table of several runs ends in .md.")
_VALUE = flags.DEFINE_string("value", "bits_per_byte", "Which figure of metrics.jsonl to draw.")


def main(workdirs: list[str]) -> int:
    """Draws the runs that the arguments name."""
    if not workdirs:
        raise ConfigError("name the folder of at least one run")
    from lm.evaluation.comparison import draw_comparison, load_facts, write_table
    from lm.evaluation.curves import draw_curves, load_history
    from lm.training.logging import WORDS

    folders = [pathlib.Path(program.folder(workdir, "RUN", " of a run")) for workdir in workdirs]
    histories, value = [load_history(folder) for folder in folders], _VALUE.value
    for folder, history in zip(folders, histories, strict=True):
        last = {name: None for lines in (history.train, history.validation) for name in (lines[-1] if lines else {})}
        known = [name for name in last if name not in WORDS]
        if value not in known:
            raise ConfigError(f"--value={value} is not in {folder}/metrics.jsonl; there are {', '.join(known)}")
    output = pathlib.Path(program.folder(_OUTPUT.value, "--output"))
    # Runs are laid side by side by what was held out; what only training lines have is drawn against steps.
    compared = len(folders) > 1 and all(any(value in line for line in history.validation) for history in histories)
    try:
        if compared:
            table = write_table(histories, [load_facts(folder) for folder in folders], value)
            draw_comparison(histories, output, value)
            output.with_suffix(".md").write_text(table, encoding="utf-8")
            print(table)
        else:
            draw_curves(histories, output, value)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--output={output} cannot be written: {error}") from error
    print(f"wrote {output}" + (f" and {output.with_suffix('.md')}" if compared else ""))
    return 0


if __name__ == "__main__":
    program.run(main, takes_arguments=True)
