"""Runs laid side by side: held-out figures against operations, tokens and time, and a table.

Reads only what runs wrote down: metrics.jsonl, run.json and config.json. Needs no device. Law: a run that lacks a
figure is shown without it, never with another one in its place.
"""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from lm.config import UserError
from lm.evaluation.curves import History

# Figure of the train lines, or "minutes", and how the axis is called.
AXES = {"total_flops": "floating point operations", "total_tokens": "tokens read", "minutes": "minutes of training"}


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a run is, for the table.

    Attributes:
      model: class of its architecture.
      objective: class of its objective.
      parameters: number of them, or None if the run did not say.
    """

    model: str
    objective: str
    parameters: int | None


def load_facts(workdir: pathlib.Path) -> Facts:
    """Reads what a run is from its folder; a question mark stands for what is not there.

    Raises:
      UserError: a file is there and is damaged.
    """

    def read(name: str) -> dict[str, Any]:
        file = workdir / name
        if not file.exists():
            return {}
        try:
            return _as_object(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{file} is damaged ({error}); move it away to draw the run without it") from error

    config, starts = read("config.json"), read("run.json").get("starts")
    names = [_as_object(config.get(section)).get("type") for section in ("model", "objective")]
    parameters = _as_object(starts[-1]).get("parameters") if isinstance(starts, list) and starts else None
    return Facts(
        *(name if isinstance(name, str) and name.isidentifier() else "?" for name in names),
        parameters=parameters if isinstance(parameters, int) else None,
    )


def _as_object(found: Any) -> dict[str, Any]:
    return found if isinstance(found, dict) else {}


def progress(history: History, axis: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns steps and where the run was on the axis of `AXES` at each of them, both f64[lines + 1], from 0 on."""
    lines = [line for line in history.train if axis == "minutes" or axis in line]
    steps = np.array([0.0, *(line["step"] for line in lines)])
    if axis != "minutes":
        return steps, np.array([0.0, *(float(line[axis]) for line in lines)])
    # The first line of a process compiles and has no speed; it counts as the next one's.
    seconds = np.array([line.get("seconds_per_step", np.nan) for line in lines], np.float64)
    known = seconds[np.isfinite(seconds)]
    seconds = np.where(np.isfinite(seconds), seconds, known[0] if len(known) else 0.0)
    return steps, np.concatenate([[0.0], np.cumsum(np.diff(steps) * seconds)]) / 60


def held_out(history: History, value: str, axis: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns places on the axis and the held-out figure there, both f64[evaluations]."""
    lines = [line for line in history.validation if value in line]
    steps, places = progress(history, axis)
    return np.interp([line["step"] for line in lines], steps, places), np.array([float(line[value]) for line in lines])


def draw_comparison(histories: list[History], file: pathlib.Path, value: str = "bits_per_byte") -> None:
    """Draws the held-out figure of all runs against operations, tokens and time into one PNG.

    Args:
      histories: the runs.
      file: the PNG to write.
      value: which held-out figure.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(AXES), figsize=(5 * len(AXES), 4), sharey=True, layout="constrained")
    for panel, (axis, label) in zip(axes, AXES.items(), strict=True):
        for number, history in enumerate(histories):
            places, figures = held_out(history, value, axis)
            panel.plot(places, figures, "o-", color=f"C{number % 10}", markersize=3, label=history.name)
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
    axes[0].set_ylabel(f"held-out {value.replace('_', ' ')}")
    axes[0].legend()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def write_table(histories: list[History], facts: list[Facts], value: str = "bits_per_byte") -> str:
    """Returns a Markdown table with one line for each run, in the order of their last held-out figure."""
    rows = []
    for history, fact in zip(histories, facts, strict=True):
        last = history.validation[-1] if history.validation else {}
        step = history.train[-1]["step"] if history.train else 0
        ends = {axis: progress(history, axis)[1][-1] for axis in AXES}
        cells = [
            history.name,
            fact.model,
            fact.objective,
            _show(fact.parameters, ",d"),
            f"{step:,}",
            _show(ends["total_flops"], ".2e"),
            _show(ends["total_tokens"], ",.0f"),
            _show(ends["minutes"], ".1f"),
            _show(last.get("nll"), ".4f"),
            _show(last.get(value), ".4f"),
        ]
        rows.append((float(last.get(value, "inf")), "| " + " | ".join(cells) + " |"))
    titles = ["run", "model", "objective", "parameters", "steps", "operations", "tokens", "minutes"]
    titles += ["held-out loss (its own objective)", f"held-out {value.replace('_', ' ')}"]
    header = ["| " + " | ".join(titles) + " |", "|" + "---|" * 3 + "---:|" * (len(titles) - 3)]
    return "\n".join([*header, *(row for _, row in sorted(rows, key=lambda item: item[0]))]) + "\n"


def _show(value: Any, form: str) -> str:
    return "" if value is None else format(float(value) if form[-1] != "d" else int(value), form)
