"""The typed whole of a run: what is trained, on what, how, where, and how often it is saved.

Composes the configs of the rooms below; holds those of the train loop itself. Law: `validate` finds
every clash of a config at once, in plain words, before any device is touched.
"""

import dataclasses
from typing import Any, Literal

from lm.batch import SpecialTokens
from lm.config import ConfigError
from lm.data import DataConfig
from lm.document import Layout
from lm.models import Decoder, Electra, Encoder, EncoderDecoder
from lm.objectives import ALBERT, BART, BERT, AnyObjective, Causal, MaskedLM, SpanCorruption
from lm.optim import OptimizerConfig, RollBack, Skip
from lm.parallel import MeshConfig, Sharding


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

    def steps_worth(self, batch_size: int) -> float | None:
        """Returns how many train steps of `batch_size` rows take at least as long as an evaluation inside the loop.

        It scores once by the run's objective and once by the yardstick; None for the whole split, of unknown size.
        """
        if self.num_batches is None:
            return None
        return 2 * self.num_batches * (self.batch_size or batch_size) / batch_size

    def phase(self, *, whole: bool) -> str:
        """Returns how a run's timeline calls an evaluation: one of the whole split is compared with such only."""
        return "evaluate_whole" if whole and self.num_batches is not None else "evaluate"


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """What is done about bad numbers, slow steps and wrong hardware.

    A step whose loss or gradient is not finite never changes the parameters, whatever is set here.

    Attributes:
      spikes: what to do about a loss or gradient that is finite and far out of bounds; none does nothing.
      max_skipped_in_a_row: updates left out one after another before the run stops with a report; none never stops.
      recompute_every: computes every such step twice and stops if the results differ in one bit; none never does. Takes
        memory for two more train states.
      slow_factor: a step that takes so many times the median is reported with where the program stands.
      first_patience: seconds after which a phase of which no usual time is known yet (a first compilation, evaluation
        or save) is reported so, too; a first evaluation sooner where its batches tell.
    """

    spikes: Skip | RollBack | None = None
    max_skipped_in_a_row: int | None = 100
    recompute_every: int | None = None
    slow_factor: float = 10.0
    first_patience: float = 120.0

    def problems(self) -> list[str]:
        """Returns one sentence for each setting that cannot work."""
        found = _below_one("health.", self, ("max_skipped_in_a_row", "recompute_every"))
        if self.slow_factor <= 1:
            found.append(f"health.slow_factor is above 1, got {self.slow_factor}")
        if self.first_patience <= 0:
            found.append(f"health.first_patience is a number of seconds above 0, got {self.first_patience}")
        return found + ([] if self.spikes is None else self.spikes.problems())


def _below_one(section: str, config: object, names: tuple[str, ...]) -> list[str]:
    values = {name: getattr(config, name) for name in names}
    return [
        f"{section}{n} is a number from 1 up or none, got {v}" for n, v in values.items() if v is not None and v < 1
    ]


def too_few_ids(vocab_size: int, needed: int) -> str:
    """Returns the sentence that the model has fewer token ids than the tokenizer."""
    return (
        f"model.vocab_size {vocab_size} is smaller than the tokenizer's {needed} ids; "
        f"use --config.model.vocab_size={needed} or more"
    )


# The class of model that reads examples of each layout, for sentences that name a remedy.
MODELS: dict[Layout, str] = {"decoder": "Decoder", "encoder": "Encoder", "encoder_decoder": "EncoderDecoder"}


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
      sharding: how the axes of the mesh are used.
      num_steps: optimizer updates of the whole run.
      batch_size: rows per update, over all devices and microbatches.
      num_microbatches: pieces a batch is cut into to save memory; the result is that of one batch.
      seed: seeds initialisation and dropout (the data has its own seed).
      init_from: workdir of another run, or Hugging Face checkpoint folder, whose parameters to start from; weights
        only.
      evaluation: held-out evaluation inside the loop.
      checkpoint: when to save and what to keep.
      logging: what to write down.
      health: what to do about bad numbers, slow steps and wrong hardware.
      compilation_cache: directory of jax's persistent compilation cache; none turns it off.
    """

    model: Decoder | Encoder | EncoderDecoder | Electra
    objective: AnyObjective = Causal()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LossConfig = LossConfig()
    mesh: MeshConfig = MeshConfig()
    sharding: Sharding = Sharding()
    num_steps: int = 1000
    batch_size: int = 32
    num_microbatches: int = 1
    seed: int = 0
    init_from: str | None = None
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    health: HealthConfig = HealthConfig()
    compilation_cache: str | None = "~/.cache/lm"

    def problems(self) -> list[str]:
        """Returns every reason, one sentence each, why this run cannot work; empty if it can."""
        found = _below_one("", self, ("num_steps", "batch_size", "num_microbatches"))
        sections = (self.model, self.data, self.loss, self.evaluation, self.checkpoint, self.logging, self.health)
        for section in sections:
            found += section.problems()
        found += self.optimizer.problems(self.num_steps)
        for name in ("seed", "num_steps", "batch_size"):
            if not -(2**31) <= getattr(self, name) < 2**31:
                found.append(f"{name} {str(getattr(self, name))[:20]}... is counted in 32 bits: at most {2**31 - 1}")
        if self.num_microbatches > 0 and self.batch_size % self.num_microbatches:
            found.append(f"num_microbatches {self.num_microbatches} does not divide batch_size {self.batch_size}")
        found += self.clashes() + self._keeping_clashes()
        return [line if line.startswith("config") else f"config.{line}" for line in found]

    def _keeping_clashes(self) -> list[str]:
        """What would leave checkpoint.keep_best nothing to choose by."""
        every, best = self.evaluation.every, self.checkpoint.keep_best
        if best < 1:
            return []
        if not self.data.validation_fraction:
            return [f"checkpoint.keep_best {best} chooses by held-out loss, and data.validation_fraction is 0"]
        if every is None or (every > 0 and self.checkpoint.every % every):
            return [
                f"checkpoint.keep_best {best} chooses among checkpoints with a held-out loss: make checkpoint.every "
                f"{self.checkpoint.every} a multiple of evaluation.every, which is {'none' if every is None else every}"
            ]
        return []

    def clashes(self) -> list[str]:
        """Returns one sentence for each pair of settings, of the model, the objective or the data, that do not fit.

        Asks what examples hold (`lm.document.Traits`) and what the model reads, never which of them it is.
        """
        found = self._layout_clashes() + self._length_clashes() + self._order_clashes() + self._field_clashes()
        if self.data.tokenizer.known is not None:
            size, specials = self.data.tokenizer.known
            found += self.objective_problems(specials)
            if size > self.model.vocab_size:
                found.append(too_few_ids(self.model.vocab_size, size))
        return list(dict.fromkeys(found))

    def objective_problems(self, specials: SpecialTokens) -> list[str]:
        """Returns one sentence for each reason why the objective cannot work with this tokenizer and these lengths."""
        return [f"objective: {problem}" for problem in self.objective.problems(specials, self.data.lengths)]

    @property
    def _names(self) -> tuple[str, str]:
        """How sentences call the objective and the model."""
        return f"objective {type(self.objective).__name__}", f"model {type(self.model).__name__}"

    def _layout_clashes(self) -> list[str]:
        objective, model = self._names
        layouts, found = self.objective.traits.layouts, []
        if self.model.layout not in layouts and layouts:
            able = ["Electra"] if self.objective.traits.needs_generator else [MODELS[layout] for layout in layouts]
            able = " or ".join(sorted(able))
            found.append(f"{objective} makes examples that {model} cannot read: use --config.model={able}")
        two_stacks = self.model.layout == "encoder_decoder"
        if two_stacks and self.data.encoder_length is None:
            found.append(f"{model} reads encoder rows, and data.encoder_length is none: set it to their length")
        if not two_stacks and self.data.encoder_length is not None:
            found.append(
                f"{model} has no second stack to read rows of data.encoder_length {self.data.encoder_length}: "
                "set it to none, or use --config.model=EncoderDecoder"
            )
        return found

    def _length_clashes(self) -> list[str]:
        longest = self.model.max_length
        lengths = {"sequence_length": self.data.sequence_length, "encoder_length": self.data.encoder_length}
        return [
            f"data.{name} {length} is longer than model.max_length {longest}: make one fit the other"
            for name, length in lengths.items()
            if length is not None and length > longest
        ]

    def _order_clashes(self) -> list[str]:
        """What cannot work where positions see ahead."""
        objective, model = self._names
        if self.model.layout == "decoder" and not self.objective.traits.bidirectional:
            return []
        ahead = f"{objective} lets positions see ahead" if self.model.layout == "decoder" else f"{model} sees both ways"
        found = []
        kernel = self.model.attention.kernel
        if kernel.causal_only or (self.model.layout == "decoder" and not kernel.reads_flags):
            name = type(kernel).__name__
            found.append(f"{ahead}, which model.attention.kernel {name} cannot: use the kernel Chunked or Plain")
        if not self.model.tells_order:
            found.append(
                f"{ahead}, and model.positions {type(self.model.positions).__name__} tells no order but by a causal "
                "mask: use another scheme, such as Rotary"
            )
        return found

    def _field_clashes(self) -> list[str]:
        """What examples hold and the model does not read, or the other way round."""
        (objective, model), traits, found = self._names, self.objective.traits, []
        if traits.num_labels > self.model.num_classes:
            found.append(
                f"{objective} labels examples with {traits.num_labels} classes, model.num_classes is "
                f"{self.model.num_classes}: set it to {traits.num_labels}"
            )
        if self.model.num_classes and not traits.num_labels:
            found.append(f"{objective} sets no label, and nothing would train model.num_classes: set it to 0")
        if "token_types" in traits.fields and self.model.num_token_types < 2:
            found.append(
                f"{objective} marks the two texts of a pair, model.num_token_types is {self.model.num_token_types}: "
                "set it to 2"
            )
        if "block_positions" in traits.fields and self.model.num_block_positions < self.data.sequence_length:
            found.append(
                f"{objective} counts positions in blanks up to data.sequence_length {self.data.sequence_length}, "
                f"model.num_block_positions is {self.model.num_block_positions}: set it to that length"
            )
        if self.model.num_block_positions and "block_positions" not in traits.fields:
            found.append(f"{objective} has no blanks for model.num_block_positions to count in: set it to 0")
        if self.model.layout not in traits.layouts:
            return found
        if traits.needs_generator and not self.model.judges_replacements:
            found.append(f"{objective} needs a generator, {model} has none: use --config.model=Electra")
        if self.model.judges_replacements and not traits.originals:
            found.append(
                f"{model} judges every position, and {objective} tells the original tokens at some only: use "
                "--config.objective=ReplacedTokenDetection"
            )
        if self.model.judges_replacements and traits.num_labels:
            found.append(f"{objective} labels examples, and {model} has no pooled head: use --config.model=Encoder")
        return found

    def validate(self) -> None:
        """Checks the whole config.

        Raises:
          ConfigError: with one line for each problem.
        """
        found = self.problems()
        if found:
            raise ConfigError("\n".join(found))


def suit(model: Any, data: DataConfig, specials: SpecialTokens) -> Experiment:
    """Returns a run with the usual objective that suits model and tokenizer best, so that a ported one trains on."""
    pairs = (ALBERT, BERT) if model.share_layers else (BERT, ALBERT)
    usual = (Causal(), SpanCorruption(), BART(), MaskedLM(), *pairs)
    runs = [Experiment(model=model, objective=objective, data=data) for objective in usual]
    return min(runs, key=lambda run: (len(run.clashes()), len(run.objective_problems(specials))))
