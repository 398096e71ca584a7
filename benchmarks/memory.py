"""What rematerialisation and a chunked loss save in memory, and cost in time.

Bytes are those of the compiled train step as XLA plans them: arguments (the state, whose buffers the
result takes over) and temporaries. Knows no peer.
"""

import dataclasses
import statistics
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import device, ours, subjects
from benchmarks.measuring import Comparison, Contender, Work
from benchmarks.results import MEBIBYTE

SETTINGS: tuple[tuple[str, int | None], ...] = (
    ("none", None),
    ("none", 64),
    ("dots", None),
    ("dots_no_batch", None),
    ("full", None),
    ("full", 64),
)


def planned_bytes(compiled: Any) -> dict[str, int]:
    """Returns the bytes of a compiled program: arguments (what it hands on included) and temporaries."""
    plan = compiled.memory_analysis()
    return {"argument_bytes": plan.argument_size_in_bytes, "temporary_bytes": plan.temp_size_in_bytes}


def work(model: Any, rows: Any, chunk: int | None) -> Work:
    """Makes the train step with a chunk of the loss."""
    step = ours.make_step(model, rows, chunk)
    return Work({"step": step}, device.matmul(model.dtype), {**device.memory(), **planned_bytes(step.compiled)})


def contenders(subject: subjects.TrainStep) -> Iterator[Contender]:
    """Yields each setting as a contender."""
    for remat, chunk in SETTINGS:
        model = dataclasses.replace(subject.model, remat=remat)
        yield Contender(f"{remat}/{chunk or 'whole'}", work, (model, subject.rows, chunk))


def measure(suite: str, rounds: int, say: Callable[[str], None], until: float) -> dict[str, Any]:
    """Measures the settings side by side, `until` as for `Comparison.measure`, and prints a line for each."""
    subject: Any = subjects.CPU["train-tiny"] if suite == "cpu" else subjects.GPU["train-gpt2"]
    comparison = Comparison(
        "memory", subject.model.dtype, tuple(contenders(subject)), {"step": (subject.rows.size, None)}
    )
    found = {}
    say(f"{'remat/loss chunk':20} {'state':>8} {'temporary':>10} {'tokens/s':>9} {'cpu s':>7}")
    for row in comparison.measure(rounds, say, until=until):
        if not row.facts:
            continue  # it did not answer in time
        processor = statistics.median(s.processor for s in row.samples)
        state, temporary = row.facts["argument_bytes"], row.facts["temporary_bytes"]
        say(
            f"{row.who:20} {state / MEBIBYTE:7,.0f}M {temporary / MEBIBYTE:9,.0f}M {row.tokens / row.seconds:9,.0f} "
            f"{processor:7.3f}"
        )
        figures = {"tokens_per_second": row.tokens / row.seconds, "processor_seconds": processor}
        found[row.who] = {**row.facts, **figures}
    return found
