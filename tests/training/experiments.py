"""Tiny experiments and batches for the tests of the train room."""

import dataclasses
import functools

import jax
import numpy as np

from configs import llama3
from lm import parallel
from lm.batch import Batch
from lm.data import Bytes, DataConfig
from lm.data.tokenizers import ByteTokenizer
from lm.experiment import CheckpointConfig, EvaluationConfig, Experiment, LoggingConfig
from lm.optim import Constant, OptimizerConfig
from lm.training.assembly import Assembly, assemble
from lm.training.state import TrainState

TOKENIZER = ByteTokenizer(num_sentinels=10)


def tiny(source: str = "", **changes: object) -> Experiment:
    """A run of two layers on the bytes of `source`."""
    experiment = Experiment(
        model=llama3.get_model("tiny"),
        data=DataConfig(source=source, tokenizer=Bytes(num_sentinels=10), sequence_length=16, validation_fraction=0.3),
        optimizer=OptimizerConfig(schedule=Constant(), learning_rate=1e-2),
        batch_size=8,
        num_steps=6,
        evaluation=EvaluationConfig(num_batches=1),
        checkpoint=CheckpointConfig(every=2),
        logging=LoggingConfig(every=1, tensorboard=False, progress="none"),
        compilation_cache=None,
    )
    return dataclasses.replace(experiment, **changes)


def random_batch(rows: int = 4, length: int = 16, seed: int = 0) -> Batch:
    """A packed batch: two segments a row, padding at the end, uneven weights."""
    rng = np.random.default_rng(seed)
    text = np.flatnonzero(TOKENIZER.token_bytes)
    tokens = rng.choice(text, (rows, length + 1)).astype(np.int32)
    segments = np.ones((rows, length), np.int32)
    segments[:, length // 2 :] = 2
    segments[:, -2:] = 0
    positions = np.concatenate([np.arange(length // 2), np.arange(length - length // 2)])
    weights = (segments > 0) * rng.integers(0, 2, segments.shape)
    return Batch(
        inputs=tokens[:, :-1],
        targets=tokens[:, 1:],
        weights=weights.astype(np.float32),
        segment_ids=segments,
        positions=np.broadcast_to(positions.astype(np.int32), segments.shape),
        bidirectional=np.zeros(segments.shape, np.bool_),
    )


def one_device() -> parallel.Rules:
    """Context: one device and the default table."""
    mesh = parallel.build_mesh(parallel.MeshConfig(data=1), jax.devices()[:1])
    return parallel.use(mesh, parallel.DEFAULT_RULES)


@functools.cache
def _drawn(model: object, optimizer: OptimizerConfig, seed: int) -> object:
    init = assemble(tiny(model=model, optimizer=optimizer, seed=seed, mesh=parallel.MeshConfig()), TOKENIZER)
    return jax.device_get(init.init())


def first_state(assembly: Assembly) -> TrainState:
    """The first state of a run on its mesh, drawn on one once: that the draw is the same has a test of its own."""
    experiment = assembly.experiment
    drawn = _drawn(experiment.model, experiment.optimizer, experiment.seed)
    return jax.tree.map(lambda x, wanted: jax.device_put(x, wanted.sharding), drawn, assembly.state)
