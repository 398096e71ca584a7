"""Tiny runs for the tests that start processes: a decoder, an encoder-decoder with UL2, a mixture of experts.

Each reads a mixture of three sources, packed. Saved as the JSON that `--config` reads.
"""

import dataclasses
import json
import pathlib
import pydoc_data.topics

from configs import llama3, ul2
from lm import config as configs
from lm.data import Bytes, DataConfig, Files
from lm.experiment import CheckpointConfig, EvaluationConfig, Experiment, LoggingConfig
from lm.models import MixtureOfExperts
from lm.optim import SGD, Constant, OptimizerConfig

ROOT = pathlib.Path(__file__).parent.parent.parent


def write_sources(folder: pathlib.Path) -> tuple[Files, ...]:
    """Three sources of unequal weight and length of text."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = list(pydoc_data.topics.topics.values())
    sources = []
    for number, (name, length, weight) in enumerate([("long", 1500, 3.0), ("short", 300, 2.0), ("mixed", 700, 1.0)]):
        lines = [json.dumps({"text": text[: length - 7 * i]}) for i, text in enumerate(texts[number::3][:20])]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        sources.append(Files(paths=(str(folder / f"{name}.jsonl"),), weight=weight))
    return tuple(sources)


def decoder(folder: pathlib.Path, **changes: object) -> Experiment:
    """Causal modelling with dropout and microbatches."""
    experiment = Experiment(
        model=dataclasses.replace(llama3.get_model("tiny"), num_layers=1, dropout_rate=0.1),
        data=DataConfig(
            source="",
            sources=write_sources(folder),
            tokenizer=Bytes(),
            sequence_length=32,
            validation_fraction=0.2,
            window=8,
        ),
        # Plain descent: Adam would blow rounding of near-zero gradients up to whole steps.
        optimizer=OptimizerConfig(rule=SGD(), schedule=Constant(), learning_rate=0.1),
        batch_size=8,
        num_steps=60,
        evaluation=EvaluationConfig(every=20, num_batches=2),
        checkpoint=CheckpointConfig(every=20, keep_last=2),
        logging=LoggingConfig(every=1, tensorboard=False, progress="lines"),
        compilation_cache=str(ROOT / ".jax_cache" / "programs"),
    )
    return dataclasses.replace(experiment, **changes)


def encoder_decoder(folder: pathlib.Path, **changes: object) -> Experiment:
    """UL2's denoisers, packed."""
    usual, base = ul2.get_config("tiny"), decoder(folder)
    data = dataclasses.replace(base.data, tokenizer=usual.data.tokenizer, sequence_length=32, encoder_length=32)
    model = dataclasses.replace(usual.model, num_layers=1, dropout_rate=0.1)
    return dataclasses.replace(
        base, model=model, objective=usual.objective, optimizer=usual.optimizer, data=data, **changes
    )


def experts(folder: pathlib.Path, **changes: object) -> Experiment:
    """A mixture of experts in the decoder, two of four for each token."""
    base = decoder(folder)
    model = dataclasses.replace(base.model, mlp=MixtureOfExperts(num_experts=4, num_selected=2))
    return dataclasses.replace(base, model=model, **changes)


def save(experiment: Experiment, file: pathlib.Path) -> str:
    """Writes the config where `--config=FILE` reads it; returns that flag."""
    experiment.validate()
    file.write_text(json.dumps(configs.to_json(experiment)), encoding="utf-8")
    return f"--config={file}"
