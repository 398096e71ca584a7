"""The typed whole of a run: what is trained, on what, how, where, and how often it is saved.

Composes the configs of the rooms below; holds those of the train loop itself. Law: `validate` finds
every clash of a config at once, in plain words, before any device is touched.
"""

import dataclasses
import os
from typing import Literal

from lm.config import ConfigError
from lm.data import DataConfig
from lm.models import Decoder
from lm.objectives import Causal
from lm.optim import OptimizerConfig
from lm.parallel import MeshConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What is minimised.

    Attributes:
      z_loss: coefficient of logZ^2, which keeps the logits' normaliser near 1 (PaLM, section 5: 1e-4).
      label_smoothing: probability mass spread over the tokens that are not the target.
      chunk: positions per chunk whose logits exist at one time; none computes all logits at once.
    """

    z_loss: float = 0.0
    label_smoothing: float = 0.0
    chunk: int | None = None

    def problems(self) -> list[str]:
        """Returns one sentence for each setting that cannot work."""
        found = []
        if not 0 <= self.label_smoothing < 1:
            found.append(f"loss.label_smoothing is a probability below 1, got {self.label_smoothing}")
        if self.z_loss < 0:
            found.append(f"loss.z_loss is 0 or more, got {self.z_loss}")
        if self.chunk is not None and self.chunk < 1:
            found.append(f"loss.chunk is a number of positions or none, got {self.chunk}")
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Held-out evaluation inside the train loop.

    Attributes:
      every: steps between evaluations; none evaluates only at the end.
      num_batches: batches per evaluation inside the loop; none is the whole split.
      batch_size: rows per batch; none is the training batch size.
    """

    every: int | None = None
    num_batches: int | None = None
    batch_size: int | None = None

    def problems(self) -> list[str]:
        """Returns one sentence for each setting that cannot work."""
        return _below_one("evaluation.", self, ("every", "num_batches", "batch_size"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When a run is saved and what is kept.

    Attributes:
      every: steps between checkpoints; the last step and a preemption are always saved.
      keep_last: newest checkpoints kept.
      keep_best: checkpoints with the lowest held-out loss kept besides.
      keep_every: keeps each checkpoint whose step is a multiple of this; none keeps no such.
    """

    every: int = 1000
    keep_last: int = 2
    keep_best: int = 0
    keep_every: int | None = None

    def problems(self) -> list[str]:
        """Returns one sentence for each setting that cannot work."""
        found = _below_one("checkpoint.", self, ("every", "keep_last", "keep_every"))
        if self.keep_best < 0:
            found.append(f"checkpoint.keep_best is 0 or more, got {self.keep_best}")
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What a run writes down.

    Attributes:
      every: steps between lines of metrics.jsonl and of the event file.
      tensorboard: also writes TensorBoard event files.
      progress: how the terminal is kept up to date; auto is a bar on a terminal and lines elsewhere.
    """

    every: int = 10
    tensorboard: bool = True
    progress: Literal["auto", "bar", "lines", "none"] = "auto"

    def problems(self) -> list[str]:
        """Returns one sentence for each setting that cannot work."""
        return _below_one("logging.", self, ("every",))


def _below_one(section: str, config: object, names: tuple[str, ...]) -> list[str]:
    values = {name: getattr(config, name) for name in names}
    return [
        f"{section}{n} is a number from 1 up or none, got {v}" for n, v in values.items() if v is not None and v < 1
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """One run. `python -m lm.train --config=FILE --config.FIELD=VALUE` overrides any leaf.

    Attributes:
      model: architecture and its sizes.
      objective: how documents become training examples.
      data: corpus, tokenizer, lengths and packing.
      optimizer: optimizer, schedule, clipping, weight decay, parameter average.
      loss: what is minimised.
      mesh: how many devices each mesh axis has.
      num_steps: optimizer updates of the whole run.
      batch_size: rows per update, over all devices and microbatches.
      num_microbatches: pieces a batch is cut into to save memory; the result is that of one batch.
      seed: seeds initialisation and dropout (the data has its own seed).
      init_from: workdir of another run, or Hugging Face checkpoint folder, whose parameters to start from; weights
        only.
      evaluation: held-out evaluation inside the loop.
      checkpoint: when to save and what to keep.
      logging: what to write down.
      compilation_cache: directory of jax's persistent compilation cache; none turns it off.
    """

    model: Decoder
    objective: Causal = Causal()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LossConfig = LossConfig()
    mesh: MeshConfig = MeshConfig()
    num_steps: int = 1000
    batch_size: int = 32
    num_microbatches: int = 1
    seed: int = 0
    init_from: str | None = None
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    compilation_cache: str | None = "~/.cache/lm"

    def problems(self) -> list[str]:
        """Returns every reason, one sentence each, why this run cannot work; empty if it can."""
        found = _below_one("", self, ("num_steps", "batch_size", "num_microbatches"))
        for section in (self.model, self.data, self.loss, self.evaluation, self.checkpoint, self.logging):
            found += section.problems()
        found += self.optimizer.problems(self.num_steps)
        if self.num_microbatches > 0 and self.batch_size % self.num_microbatches:
            found.append(f"num_microbatches {self.num_microbatches} does not divide batch_size {self.batch_size}")
        if self.model.max_length is not None and self.data.sequence_length > self.model.max_length:
            found.append(
                f"data.sequence_length {self.data.sequence_length} is longer than "
                f"model.max_length {self.model.max_length}"
            )
        if self.init_from is not None and not os.path.isdir(self.init_from):
            found.append(f"init_from: no directory {self.init_from}")
        return [line if line.startswith("config") else f"config.{line}" for line in found]

    def validate(self) -> None:
        """Checks the whole config.

        Raises:
          ConfigError: with one line for each problem.
        """
        found = self.problems()
        if found:
            raise ConfigError("\n".join(found))
