"""The same steps where the mesh divides the sequence, for every architecture: ring and exchange equal one device."""

import dataclasses

import jax
import numpy as np
import pytest

from lm.batch import Batch
from lm.config import ConfigError
from lm.experiment import LossConfig
from lm.models import Bucketed, Decoder, Encoder, EncoderDecoder, Gather, MultiHead, Ring, Ulysses
from lm.optim import SGD, Constant, OptimizerConfig
from lm.parallel import MESH_AXES, MeshConfig
from lm.training.assembly import assemble
from lm.training.step import make_evaluation_step, make_train_step
from tests.training.experiments import TOKENIZER, first_state, one_device, random_batch, tiny

SIZES = {"vocab_size": 288, "num_layers": 2, "model_dim": 16, "num_heads": 4, "mlp_dim": 24, "max_length": 32}
MODELS = {
    "decoder": Decoder(**SIZES, num_kv_heads=2, dropout_rate=0.1),
    "encoder": Encoder(**SIZES, dropout_rate=0.1),
    "encoder-decoder": EncoderDecoder(**SIZES, dropout_rate=0.1, positions=Bucketed()),
}
CONTEXT_BY_TENSOR = MeshConfig(data=1, tensor=2, context=4)
CONTEXT_BY_DATA = MeshConfig(data=2, context=4)
THREE = MeshConfig(data=1, fsdp=2, tensor=2, context=2)
WITH_STAGES = MeshConfig(data=1, tensor=2, context=2, stage=2)
CASES = [
    ("decoder", Ring(), CONTEXT_BY_TENSOR),
    ("decoder", Ring(), THREE),
    ("decoder", Ulysses(), THREE),
    ("decoder", Ulysses(), CONTEXT_BY_DATA),
    ("decoder", Gather(), CONTEXT_BY_DATA),
    ("decoder", Ring(), WITH_STAGES),
    ("decoder", Ulysses(), WITH_STAGES),
    ("encoder", Ring(), CONTEXT_BY_DATA),
    ("encoder", Ulysses(), THREE),
    ("encoder-decoder", Ring(zigzag=False), THREE),
    ("encoder-decoder", Ulysses(), CONTEXT_BY_DATA),
]


def make_config(name, way, mesh):
    # Plain descent: Adam would blow rounding of near-zero gradients up to whole steps.
    descent = OptimizerConfig(rule=SGD(), schedule=Constant(), learning_rate=0.5)
    model = dataclasses.replace(MODELS[name], attention=MultiHead(context_parallel=way))
    encoder_length = 32 if name == "encoder-decoder" else None
    data = dataclasses.replace(tiny().data, encoder_length=encoder_length)
    return tiny(mesh=mesh, model=model, data=data, optimizer=descent, loss=LossConfig(chunk=8))


def make_batch(name, seed) -> Batch:
    batch = random_batch(rows=8, seed=seed)
    if name == "encoder":
        return batch._replace(bidirectional=np.ones_like(batch.bidirectional))
    if name == "encoder-decoder":
        source = random_batch(rows=8, length=32, seed=seed + 100)
        return batch._replace(
            encoder_inputs=source.inputs,
            encoder_segment_ids=source.segment_ids,
            encoder_positions=source.positions,
        )
    return batch


def run(assembly, name, state, place, evaluated=True):
    """Three steps and an evaluation (none where not wanted): history, evaluation, parameters."""
    config = assembly.experiment
    step = jax.jit(make_train_step(config, assembly.model, assembly.optimizer, TOKENIZER.token_bytes))
    history = []
    for number in range(3):
        state, metrics = step(state, place(make_batch(name, number)))
        history.append([float(metrics[key]) for key in ("loss", "gradient_norm", "parameter_norm")])
    evaluation = None
    if evaluated:
        evaluate = jax.jit(make_evaluation_step(config.loss, assembly.model, TOKENIZER.token_bytes))
        (tokens, _, _), _ = evaluate(state.params, place(make_batch(name, 9)))
        evaluation = np.array([float(tokens.nll), float(tokens.weight)])
    return np.array(history), evaluation, jax.device_get(state.params)


@pytest.fixture(scope="module")
def expected():
    """For each architecture what one device computes."""
    found = {}

    def compute(name):
        if name not in found:
            assembly = assemble(make_config(name, Ring(), MeshConfig(data=8)), TOKENIZER)
            with one_device():
                found[name] = run(assembly, name, jax.device_get(first_state(assembly)), lambda batch: batch)
        return found[name]

    return compute


def _id(part):
    if isinstance(part, MeshConfig):
        return " x ".join(axis for axis in MESH_AXES if getattr(part, axis) > 1)
    return part if isinstance(part, str) else type(part).__name__


@pytest.mark.parametrize(("name", "way", "mesh"), CASES, ids=_id)
def test_a_divided_sequence_does_not_change_the_run(name, way, mesh, expected):
    assembly = assemble(make_config(name, way, mesh), TOKENIZER)

    with assembly.placed():
        history, evaluation, params = run(assembly, name, first_state(assembly), assembly.place, mesh == THREE)
    np.testing.assert_allclose(history, expected(name)[0], rtol=2e-5)
    if evaluation is not None:
        np.testing.assert_allclose(evaluation, expected(name)[1], rtol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), params, expected(name)[2])


def test_lengths_and_heads_that_do_not_divide_are_named():
    short = make_config("decoder", Ring(), MeshConfig(data=1, context=8))
    short = dataclasses.replace(short, data=dataclasses.replace(short.data, sequence_length=24))
    with pytest.raises(ConfigError, match=r"config\.data\.sequence_length 24 does not divide into 16 pieces"):
        assemble(short, TOKENIZER)
    with pytest.raises(ConfigError, match=r"config\.mesh\.context 8 does not divide the 4 query heads"):
        assemble(make_config("decoder", Ulysses(), MeshConfig(data=1, context=8)), TOKENIZER)
