"""The batch of any step of a run, rebuilt from its config and its data, and checked against what the run logged.

Knows no model and no device. Law: what it returns is bit for bit what the step read, or it says that it is not.
"""

import dataclasses
import itertools
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from lm.batch import Batch
from lm.config import ConfigError
from lm.data import Batches, fingerprint, load_tokenizer, train_batches
from lm.document import Vocabulary
from lm.experiment import Experiment
from lm.training.health import read_saved
from lm.training.logging import read_metrics
from lm.training.order import Detours, chain
from lm.training.workdir import WorkdirError, read_config, read_starts


@dataclasses.dataclass(frozen=True)
class Replayed:
    """The global batch of a step.

    Attributes:
      step: which step read it.
      number: its place among the run's batches, from 1; not the step's own after a roll back.
      batch: [B, T] arrays on the host.
      document_ids: of each example, row by row.
      digest: hash of the batch and of the ids.
      checked: the logged step at which the hash chain was found equal; None if no step from this one on is logged.
      from_step: where the replay began: at the start, or at a checkpoint.
    """

    step: int
    number: int
    batch: Batch
    document_ids: list[str]
    digest: str
    checked: int | None
    from_step: int


def _open(workdir: pathlib.Path, experiment: Experiment, tokenizer: Any) -> Batches:
    """Opens the whole run's data; nothing is made ahead, since most of it is not wanted."""
    starts = read_starts(workdir)
    if starts and starts[-1]["data_fingerprint"] != fingerprint(experiment.data):
        raise WorkdirError(
            f"{workdir}: the text changed since this run was last started, its batches cannot be rebuilt"
        )
    data = dataclasses.replace(experiment.data, num_workers=0, prefetch=0)
    return train_batches(data, experiment.objective, tokenizer, experiment.batch_size)


def _begin(workdir: pathlib.Path, batches: Batches, step: int) -> tuple[int, str]:
    """Goes to the newest checkpoint before the step; returns its step and its hash chain, (0, "") if there is none."""
    folders = [path for path in (workdir / "checkpoints").glob("*") if path.name.isdigit() and int(path.name) < step]
    for folder in sorted(folders, key=lambda path: -int(path.name)):
        file = folder / "data" / "metadata"
        if file.is_file():
            try:
                state, counters = read_saved(json.loads(file.read_text(encoding="utf-8")))
            except (OSError, ValueError, RecursionError) as error:
                raise WorkdirError(f"{file} is damaged ({error})") from error
            batches.set_state(state)
            return int(folder.name), counters.data_order
    return 0, ""


def _logged(workdir: pathlib.Path) -> dict[int, str]:
    lines = read_metrics(workdir / "metrics.jsonl")
    return {line["step"]: line["data_order"] for line in lines if "data_order" in line}


def replay(workdir: str, step: int) -> tuple[Replayed, Vocabulary, Experiment]:
    """Rebuilds the batch that a step read, or will read; with the tokenizer that decodes it and the run's config.

    Reads the batches from the newest checkpoint before it on, and as far behind it as the next step that was logged.

    Args:
      workdir: of the run.
      step: from 1; one that the run has not come to yet will do.

    Raises:
      ConfigError: no such run or no such step. WorkdirError: the text changed, or the run logged other data.
    """
    path = pathlib.Path(os.path.expanduser(workdir))
    experiment = read_config(path)
    if not 1 <= step <= experiment.num_steps:
        raise ConfigError(f"--step={step}: the steps of {workdir} are 1 to {experiment.num_steps}")
    tokenizer = load_tokenizer(experiment.data.tokenizer, None, path / "tokenizer")
    batches = _open(path, experiment, tokenizer)
    try:
        return _read(path, batches, step), tokenizer, experiment
    finally:
        batches.close()


def _read(workdir: pathlib.Path, batches: Batches, step: int) -> Replayed:
    detours, logged = Detours(workdir), _logged(workdir)
    first, order = _begin(workdir, batches, step)
    last = min((at for at in logged if at >= step), default=step)
    found: Replayed | None = None
    for at in range(first + 1, last + 1):
        number = detours.batch_number(at)
        while True:
            batch = next(batches, None)
            if batch is None:
                raise ConfigError(f"--step={step}: the data end after {at - 1} steps (data.num_epochs)")
            if batches.get_state()["batches"] >= number:
                break
        digest = batches.digest()
        order = chain(order, digest)
        if at == step:
            found = Replayed(step, number, batch, batches.document_ids(), digest, None, first)
        if logged.get(at, order) != order:
            raise WorkdirError(
                f"{workdir}: rebuilt from step {first} on, the data up to step {at} have the hash {order}, and the run "
                f"logged {logged[at]}: its config, code or text was another one then"
            )
    assert found is not None, "the step is among those read"
    return dataclasses.replace(found, checked=last if last in logged else None)


# Fields of the batch that say something about each position of an example, beside its tokens.
_EXTRA = ("bidirectional", "token_types", "label_targets", "label_weights", "block_positions")


def segments(replayed: Replayed) -> Iterator[dict[str, Any]]:
    """Yields each example of the batch as plain data: row, segment, document id, and every field's values there."""
    batch, ids = replayed.batch, iter(replayed.document_ids)
    for row in range(len(batch.inputs)):
        for segment in range(1, int(batch.segment_ids[row].max()) + 1):
            here = batch.segment_ids[row] == segment
            found: dict[str, Any] = {"row": row, "segment": segment, "document": next(ids)}
            for name in ("inputs", "targets", "weights", "positions", *_EXTRA, "components"):
                array = getattr(batch, name)
                if array is not None:
                    found[name] = array[row][here].tolist()
            if batch.encoder_inputs is not None and batch.encoder_segment_ids is not None:
                found["encoder_inputs"] = batch.encoder_inputs[row][batch.encoder_segment_ids[row] == segment].tolist()
            yield found


def first_rows(replayed: Replayed, rows: int) -> Replayed:
    """Returns only the first rows of the batch, with its digest as a whole."""
    batch = Batch(*(None if array is None else array[:rows] for array in replayed.batch))
    examples = int(batch.segment_ids.max(axis=1).sum())
    return dataclasses.replace(replayed, batch=batch, document_ids=replayed.document_ids[:examples])


def to_json(replayed: Replayed) -> dict[str, Any]:
    """Returns the batch as plain data, the examples as of `segments`."""
    names = ("step", "number", "digest", "checked", "from_step")
    return {name: getattr(replayed, name) for name in names} | {"examples": list(segments(replayed))}


def _runs(values: list[Any]) -> Iterator[tuple[Any, slice]]:
    """Yields each stretch of equal values."""
    bounds = [0, *(np.flatnonzero(np.diff(np.asarray(values))) + 1).tolist(), len(values)]
    for start, stop in itertools.pairwise(bounds):
        yield values[start], slice(start, stop)


def _weighted(tokens: list[int], weights: list[float], vocabulary: Vocabulary) -> str:
    """Decodes what is predicted; stretches without loss weight are shown by their length."""
    shown = []
    for weight, part in _runs(weights):
        text = repr(vocabulary.decode(tokens[part]))[1:-1]
        if not weight:
            shown.append(f"<{part.stop - part.start} without loss>")
        else:
            shown.append(text if weight == 1 else f"<weight {weight:g}: {text}>")
    return " ".join(shown)


def show(replayed: Replayed, vocabulary: Vocabulary, components: tuple[str, ...]) -> Iterator[str]:
    """Yields the lines that show a batch: each example's document, inputs and what is to be predicted.

    Args:
      replayed: the batch.
      vocabulary: the run's tokenizer.
      components: names of those of its mixture of objectives; empty for another objective.
    """
    rows, length = replayed.batch.inputs.shape
    filled = np.count_nonzero(replayed.batch.segment_ids) / replayed.batch.segment_ids.size
    yield (
        f"step {replayed.step} reads batch {replayed.number}: {rows} rows of {length}, {filled:.1%} filled, "
        f"hash {replayed.digest}"
    )
    verdict = f"equal to what the run logged at step {replayed.checked}"
    if replayed.checked is None:
        verdict = f"not checked, as the run has logged no step from {replayed.step} on"
    yield f"rebuilt from step {replayed.from_step} on; {verdict}"
    for example in segments(replayed):
        made_by = f", by {components[example['components'][0]]}" if components else ""
        yield f"row {example['row']}, segment {example['segment']}: {example['document']}{made_by}"
        if "encoder_inputs" in example:
            yield f"  encoder  {vocabulary.decode(example['encoder_inputs'])!r}"
        yield f"  inputs   {vocabulary.decode(example['inputs'])!r}"
        yield f"  targets  {_weighted(example['targets'], example['weights'], vocabulary)}"
        yield from _extra_lines(example)


def _extra_lines(example: dict[str, Any]) -> Iterator[str]:
    """Yields what else an example says, where it says anything: stretches of values that are not 0."""
    for name in _EXTRA:
        parts = [f"{int(value)} at {p.start}-{p.stop - 1}" for value, p in _runs(example.get(name) or [0]) if value]
        if parts:
            yield f"  {name}: {', '.join(parts)}"
