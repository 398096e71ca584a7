"""Which architecture trains under which objective: every cell, tiny, and the table of docs/cells.md.

Owns the list of cells; what is asked of attention is `lm.evaluation.attention_cells`. Whether one is valid, and why
not, is asked of `Experiment.problems()` alone. Law: the committed table equals what `write_table` returns, and a test
trains every cell that it calls valid.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias

from lm import objectives
from lm.data import Bytes, DataConfig
from lm.document import Objective, Traits
from lm.evaluation import attention_cells
from lm.experiment import Experiment
from lm.models import (
    Alibi,
    Bucketed,
    Capacity,
    Chunked,
    Decoder,
    Dropless,
    Electra,
    Encoder,
    EncoderDecoder,
    Latent,
    Learned,
    MixtureOfExperts,
    NoPositions,
    Plain,
    Relative,
    Rotary,
    Sinusoidal,
)
from lm.objectives import Component, SuffixBlank, TextToText
from lm.optim import Constant, OptimizerConfig

Model: TypeAlias = Decoder | Encoder | EncoderDecoder | Electra

OBJECTIVES: Mapping[str, Objective] = {
    "Causal": objectives.Causal(),
    "FillInTheMiddle": objectives.FillInTheMiddle(),
    "PrefixLM": objectives.PrefixLM(),
    "PrefixLM, causal prefix": objectives.PrefixLM(format=TextToText(prefix="causal")),
    "SpanCorruption": objectives.SpanCorruption(),
    "UL2": objectives.UL2(),
    "UL2 (UL2R)": objectives.UL2(denoisers=objectives.UL2R_DENOISERS),
    "BART": objectives.BART(),
    "MASS": objectives.MASS(),
    "MaskedToText": objectives.MaskedToText(),
    "DropTokens": objectives.DropTokens(),
    "Deshuffle": objectives.Deshuffle(),
    "GLM": objectives.GLM(),
    "GLM, suffix": objectives.GLM(blanks=SuffixBlank()),
    "MaskedLM (ROBERTA)": objectives.ROBERTA,
    "MaskedLM, whole words": objectives.MaskedLM(unit=objectives.NGrams()),
    "MaskedLM (BERT)": objectives.BERT,
    "MaskedLM (ALBERT)": objectives.ALBERT,
    "ReplacedTokenDetection": objectives.ReplacedTokenDetection(),
    "Mixture of Causal and SpanCorruption": objectives.Mixture(
        components=(
            Component(name="causal", objective=objectives.Causal()),
            Component(name="spans", objective=objectives.SpanCorruption()),
        )
    ),
    "Mixture of SpanCorruption and BART": objectives.Mixture(
        components=(
            Component(name="spans", objective=objectives.SpanCorruption()),
            Component(name="bart", objective=objectives.BART()),
        )
    ),
    "Mixture of Causal, GLM and MaskedLM": objectives.Mixture(
        components=(
            Component(name="causal", objective=objectives.Causal()),
            Component(name="glm", objective=objectives.GLM()),
            Component(name="masked", objective=objectives.MaskedLM()),
        )
    ),
    "Mixture of Causal and ReplacedTokenDetection": objectives.Mixture(
        components=(
            Component(name="causal", objective=objectives.Causal()),
            Component(name="replaced", objective=objectives.ReplacedTokenDetection()),
        )
    ),
}

LENGTH = 64
TOKENIZER = Bytes(num_sentinels=40)
_SIZES: dict[str, Any] = {
    "num_layers": 1,
    "model_dim": 16,
    "num_heads": 2,
    "mlp_dim": 32,
    "max_length": LENGTH,
    "vocab_size": 311,
}
ARCHITECTURES: Mapping[str, Model] = {
    "Decoder": Decoder(**_SIZES),
    "Encoder": Encoder(**_SIZES),
    "EncoderDecoder": EncoderDecoder(**_SIZES),
    "Electra": Electra(**_SIZES, generator_dim=8, generator_heads=2, generator_mlp_dim=16, generator_layers=1),
}
# The cells in which every other choice is tried: one for each way of seeing.
SIGHTS = (
    ("Causal", "Decoder"),
    ("PrefixLM", "Decoder"),
    ("MaskedLM (ROBERTA)", "Encoder"),
    ("SpanCorruption", "EncoderDecoder"),
)


def fit(model: Model, traits: Traits) -> Model:
    """Returns the model with the tables and heads that the examples call for, as far as its kind has them."""
    changes: dict[str, object] = {
        "num_classes": traits.num_labels,
        "num_token_types": 2 if "token_types" in traits.fields else 0,
        "num_block_positions": LENGTH if "block_positions" in traits.fields else 0,
    }
    return dataclasses.replace(model, **changes)


def make_cell(objective: str, architecture: str) -> Experiment:
    """Returns the tiny run of an objective on an architecture, valid or not."""
    chosen, model = OBJECTIVES[objective], ARCHITECTURES[architecture]
    two_stacks = model.layout == "encoder_decoder"
    return Experiment(
        model=fit(model, chosen.traits),
        objective=chosen,  # pyright: ignore[reportArgumentType] one of the union's classes
        data=DataConfig(tokenizer=TOKENIZER, sequence_length=LENGTH, encoder_length=LENGTH if two_stacks else None),
        optimizer=OptimizerConfig(schedule=Constant(), learning_rate=1e-2, weight_decay=0.0),
        batch_size=4,
        num_steps=2,
    )


def _with_attention(run: Experiment, **changes: object) -> Experiment:
    attention = dataclasses.replace(run.model.attention, **changes)
    return _with_model(run, attention=attention)


def _with_model(run: Experiment, **changes: object) -> Experiment:
    return dataclasses.replace(run, model=dataclasses.replace(run.model, **changes))


def vary(run: Experiment) -> dict[str, Experiment]:
    """Returns the run under every position scheme, kernel and way of packing, by the name of the choice."""
    schemes = (NoPositions(), Learned(), Sinusoidal(), Rotary(), Relative(), Bucketed(), Alibi())
    runs = {f"positions {type(scheme).__name__}": _with_model(run, positions=scheme) for scheme in schemes}
    runs |= {f"kernel {type(kernel).__name__}": _with_attention(run, kernel=kernel) for kernel in (Plain(), Chunked())}
    experts = MixtureOfExperts(num_experts=2, num_selected=1)
    dispatches = (Capacity(), Dropless())
    runs |= {
        f"experts, {type(dispatch).__name__}": _with_model(run, mlp=dataclasses.replace(experts, dispatch=dispatch))
        for dispatch in dispatches
    }
    latent = Latent(query_rank=None, kv_rank=8, nope_dim=4, rotary_dim=4, value_dim=8)
    runs["latent attention"] = _with_model(run, attention=latent)
    for packing in (True, False):
        data = dataclasses.replace(run.data, packing=packing)
        runs["packed" if packing else "one example a row"] = dataclasses.replace(run, data=data)
    return runs


def cells() -> dict[tuple[str, str], Experiment]:
    """Returns every objective on every architecture."""
    return {(name, kind): make_cell(name, kind) for name in OBJECTIVES for kind in ARCHITECTURES}


def choices() -> dict[tuple[str, str, str], Experiment]:
    """Returns every other choice in each of `SIGHTS`, by (choice, objective, architecture)."""
    return {(choice, *sight): run for sight in SIGHTS for choice, run in vary(make_cell(*sight)).items()}


def attention_sights() -> Mapping[str, Experiment]:
    """Returns the runs in which attention is asked for everything, by what positions see."""
    return {name: make_cell(*cell) for name, cell in attention_cells.SIGHTS.items()}


class _Table:
    """Rows of cells, and the numbered reasons of those that are not valid."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.reasons: dict[str, int] = {}

    def show(self, problems: list[str]) -> str:
        """Returns "yes", or the numbers of the reasons."""
        return " ".join(f"[{self.reasons.setdefault(r, len(self.reasons) + 1)}]" for r in problems) or "yes"

    def show_run(self, run: Experiment) -> str:
        """Returns what a run says of itself; its reasons are numbered without the names of objective and model."""
        found = [problem.removeprefix("config.") for problem in run.problems()]
        for section in ("objective", "model"):
            name = type(getattr(run, section)).__name__
            found = [problem.replace(f"{section} {name} ", f"the {section} ") for problem in found]
        return self.show(found)

    def add(self, heading: str, columns: list[str], rows: Mapping[str, list[str]]) -> None:
        """Writes a table of shown cells."""
        self.lines += ["", f"| {heading} | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
        self.lines += [f"| {name} | {' | '.join(row)} |" for name, row in rows.items()]

    def end(self) -> None:
        """Writes the reasons, and begins to number anew."""
        self.lines += ["", "Why not:", "", *(f"{number}. {reason}" for reason, number in self.reasons.items())]
        self.reasons = {}


def _write_attention(table: _Table) -> None:
    """Writes what the kernels compute, and what the ways of dividing a sequence take."""
    sights = attention_sights()

    def rows(answers: Mapping[str, Mapping[str, list[str]]]) -> dict[str, list[str]]:
        return {
            name: [table.show([line.removeprefix("config.") for line in lines]) for lines in answer.values()]
            for name, answer in answers.items()
        }

    asked = {name: attention_cells.by_kernel(run) for name, run in attention_cells.ask(sights).items()}
    asked |= {f"on {name}": attention_cells.on_platform(kind) for name, kind in attention_cells.PLATFORMS.items()}
    divided = {name: attention_cells.by_way(run) for name, run in attention_cells.ask_divided(sights).items()}
    table.lines += [
        "",
        "## Attention",
        "",
        "What each kernel computes (`config.model.attention.kernel`), asked of packed rows in bfloat16 unless the row",
        "says otherwise. `tests/models/test_attention.py` and `tests/models/test_kernels.py` hold them to Plain; what",
        "ran on which devices is in [attention.md](attention.md).",
    ]
    table.add("asked", list(attention_cells.KERNELS), rows(asked))
    table.lines += [
        "",
        f"What each way of dividing a sequence between {attention_cells.NUM_SHARDS} devices takes",
        "(`config.model.attention.context_parallel`), with the kernel Plain unless the row says otherwise.",
        "`tests/models/test_context_parallel.py` and `tests/training/test_context_mesh.py` hold them to one device.",
    ]
    table.add("asked", list(attention_cells.WAYS), rows(divided))
    table.end()


def write_table() -> str:
    """Returns docs/cells.md: for each cell that it is valid, or the number of the reason why it is not."""
    table = _Table()
    table.lines += [
        "# Every objective on every architecture",
        "",
        "Generated by `python -m lm.evaluation.cells > docs/cells.md` from what `Experiment.problems()` says of tiny",
        "runs; `tests/test_cells.py` holds this file equal to it, trains two steps of every cell that says yes, and",
        "demands a refusal of every other. Token types, pooled heads and blank positions are set as the objective",
        "asks for them. What attention computes is asked further down, without training.",
    ]
    cells = {name: [table.show_run(make_cell(name, kind)) for kind in ARCHITECTURES] for name in OBJECTIVES}
    table.add("objective", list(ARCHITECTURES), cells)
    table.lines += ["", "The other choices, in one cell for each way of seeing:"]
    columns = [vary(make_cell(*sight)) for sight in SIGHTS]
    others = {choice: [table.show_run(column[choice]) for column in columns] for choice in columns[0]}
    table.add("choice", [f"{name} on {kind}" for name, kind in SIGHTS], others)
    table.end()
    _write_attention(table)
    return "\n".join(table.lines) + "\n"


if __name__ == "__main__":
    print(write_table(), end="")
