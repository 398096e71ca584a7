"""Our side of the comparisons: the train step, decoding and matrix products of `lm`, as a user's run has them.

Knows no peer. Law: the step is the one of `lm.training.step`, jitted with the state donated as the
train loop does; nothing is set here that a config cannot set.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.device import copy, matmul, memory
from benchmarks.measuring import COPY, Work
from benchmarks.rows import Rows
from lm import interop, parallel
from lm.batch import Batch
from lm.data import DataConfig
from lm.decoding import Decoder, Sampling, arrange, pad_prompts
from lm.experiment import Experiment, LossConfig
from lm.models.transformer import Transformer
from lm.optim import AdamW, Constant, OptimizerConfig, build_optimizer
from lm.training.state import TrainState, init_state
from lm.training.step import make_train_step


def make_batch(rows: Rows, *, bidirectional: bool) -> Batch:
    """Makes a batch of unpadded rows, each one segment."""

    def places(length: int) -> np.ndarray:
        return np.broadcast_to(np.arange(length, dtype=np.int32), (rows.batch, length))

    ones = np.ones((rows.batch, rows.length), np.int32)
    batch = Batch(
        inputs=rows.tokens("inputs"),
        targets=rows.tokens("targets"),
        weights=ones.astype(np.float32),
        segment_ids=ones,
        positions=places(rows.length),
        bidirectional=np.full(ones.shape, bidirectional),
    )
    if rows.encoder_length is None:
        return batch
    return batch._replace(
        encoder_inputs=rows.tokens("encoder_inputs"),
        encoder_segment_ids=np.ones((rows.batch, rows.encoder_length), np.int32),
        encoder_positions=places(rows.encoder_length),
    )


@dataclasses.dataclass
class Step:
    """A train step that is ready to run.

    Attributes:
      compiled: the program.
      state: the newest train state.
      batch: what it reads.
    """

    compiled: Any
    state: TrainState
    batch: Batch

    def __call__(self) -> float:
        """Runs one step; returns the loss before it."""
        self.state, metrics = self.compiled(self.state, self.batch)
        jax.block_until_ready(self.state)
        return float(metrics["loss"])


def make_step(model: Transformer, rows: Rows, chunk: int | None = None, rule: Any = None) -> Step:
    """Builds the train step of a model on one device, and its first state."""
    config = Experiment(
        model=model,
        data=DataConfig(sequence_length=rows.length, encoder_length=rows.encoder_length),
        optimizer=OptimizerConfig(rule=rule or AdamW(b2=0.95), schedule=Constant(), learning_rate=3e-4),
        loss=LossConfig(chunk=chunk),
    )
    built = model.build()
    mesh = parallel.build_mesh(config.mesh, jax.devices()[:1])
    shapes = jax.eval_shape(built.init, jax.random.key(0))
    optimizer = build_optimizer(config.optimizer, config.num_steps, shapes, built.axes())
    step = make_train_step(config, built, optimizer, np.ones(model.vocab_size, np.int32))
    with parallel.use(mesh, parallel.DEFAULT_RULES):
        state = jax.jit(lambda: init_state(built, optimizer, jnp.asarray(0), None))()
        batch = jax.device_put(make_batch(rows, bidirectional=model.decoder_depth == 0))
        compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    return Step(compiled, state, batch)


def train_work(model: Transformer, rows: Rows, folder: str | None) -> Work:
    """Makes the train step; writes the first weights to `folder` for the peers that start from them."""
    parallel.keep_freed_memory()  # as the train loop does
    box: list[Step] = []

    def step() -> float:
        if not box:
            box.append(make_step(model, rows))
        return box[0]()

    if folder is not None:
        save_first_weights(model, folder)
    # Whether XLA was given cuDNN's kernel, which the kernel Auto takes on GPUs where it can.
    facts = {**memory(), "cudnn_attention": lambda: "fmha" in box[0].compiled.as_text()}
    return Work({"step": step}, matmul(model.dtype), facts)


def save_first_weights(model: Transformer, folder: str | None) -> Any:
    """Returns the weights that a run of seed 0 starts with; writes them to `folder`, if any, for `transformers`."""
    built = model.build()
    key = jax.random.fold_in(jax.random.key(jnp.asarray(0)), 0)
    with parallel.use(parallel.build_mesh(parallel.MeshConfig(), jax.devices()[:1]), parallel.DEFAULT_RULES):
        params = jax.jit(built.init)(key)
    if folder is not None:
        interop.save(folder, model, params)
    return params


def generate_work(model: Transformer, rows: Rows, new_tokens: int, folder: str | None) -> Work:
    """Makes greedy generation: the prompt with its first token; and with `new_tokens` more after it."""
    parallel.keep_freed_memory()
    built, params = arrange(model.build(), save_first_weights(model, folder))
    prompts = pad_prompts(list(rows.tokens("inputs")), smallest=rows.length)
    mesh = parallel.build_mesh(parallel.MeshConfig(), jax.devices()[:1])
    decoder = Decoder(model=built, max_tokens=new_tokens + 1, sampling=Sampling(temperature=0.0))
    made: dict[str, Any] = {}

    def read() -> None:
        with parallel.use(mesh, parallel.DEFAULT_RULES):
            jax.block_until_ready(decoder.start(params, prompts, jax.random.key(0)))

    def whole() -> None:
        with parallel.use(mesh, parallel.DEFAULT_RULES):
            made["tokens"] = decoder.generate(params, prompts).tokens

    facts = {**memory(), "tokens": lambda: made["tokens"].tolist()}
    return Work({"prompt": read, "whole": whole, COPY: copy}, matmul(model.dtype), facts)
