"""The picture of one or several runs: loss in bits per byte against steps.

Reads only metrics.jsonl and run.json, never a checkpoint, and needs no device.
"""

import dataclasses
import pathlib
from typing import Any

from lm.config import UserError
from lm.training.logging import read_metrics


@dataclasses.dataclass(frozen=True)
class History:
    """What a run wrote down.

    Attributes:
      name: how the run is called in a picture.
      train: lines of the train split, in order.
      validation: lines of the held-out split, in order.
    """

    name: str
    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]


def load_history(workdir: pathlib.Path, name: str | None = None) -> History:
    """Loads the history of a run.

    Raises:
      UserError: the folder holds no metrics.
    """
    lines = list(read_metrics(workdir / "metrics.jsonl"))
    if not lines:
        raise UserError(f"{workdir} holds no metrics.jsonl with a line in it; train there first")
    train = [line for line in lines if line["split"] == "train"]
    validation = [line for line in lines if line["split"] == "validation"]
    return History(name or workdir.name, train, validation)


def _points(lines: list[dict[str, Any]], value: str) -> tuple[list[int], list[float]]:
    """Steps and figures of the lines that have it: speeds are not in the first, nor most figures in held-out lines."""
    found = [(line["step"], float(line[value])) for line in lines if value in line]
    return [step for step, _ in found], [figure for _, figure in found]


def draw_curves(histories: list[History], file: pathlib.Path, value: str = "bits_per_byte") -> None:
    """Draws training (thin) and held-out (dots) curves of all runs into one PNG.

    Args:
      histories: one or more runs.
      file: the PNG to write.
      value: which figure to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for number, history in enumerate(histories):
        colour = f"C{number % 10}"
        label = f"{history.name}, training" if len(histories) == 1 else history.name
        axis.plot(*_points(history.train, value), color=colour, linewidth=1, alpha=0.8, label=label)
        steps, held_out = _points(history.validation, value)
        if held_out:
            axis.plot(
                steps,
                held_out,
                "o-",
                color=colour if len(histories) > 1 else "C1",
                label=None if len(histories) > 1 else f"held-out (last {held_out[-1]:.3f})",
            )
        last = history.validation[-1] if history.validation else {}
        if len(histories) == 1 and value == "bits_per_byte" and "unigram_bits_per_byte" in last:
            unigram = float(last["unigram_bits_per_byte"])
            axis.axhline(unigram, color="grey", linestyle="--", linewidth=1, label=f"unigram entropy ({unigram:.3f})")
    axis.set_xlabel("step")
    axis.set_ylabel(value.replace("_", " "))
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
