"""The same steps on any mesh: each way to divide a run, and products of them, give the run of one device in float32.

Losses and norms agree to 2e-5 and parameters after the steps to 1e-4 of their size or 1e-5; dropout is on everywhere.
"""

import dataclasses

import jax
import numpy as np
import pytest

from lm import parallel
from lm.batch import Batch
from lm.config import ConfigError
from lm.models import AllToAll, Bucketed, Encoder, EncoderDecoder, Latent, Layer, MixtureOfExperts, MultiHead
from lm.optim import SGD, AdamW, Average, Constant, OptimizerConfig
from lm.parallel import MeshConfig, Pipeline, Sharding
from lm.training import assembly as assembling
from lm.training.assembly import assemble
from lm.training.division import check_batch_size
from lm.training.step import make_train_step
from tests.training.experiments import TOKENIZER, first_state, random_batch, tiny

DECODER = dataclasses.replace(tiny().model, num_layers=4, dropout_rate=0.1)
SIZES = {
    "vocab_size": DECODER.vocab_size,
    "num_layers": 4,
    "model_dim": 32,
    "num_heads": 4,
    "mlp_dim": 32,
    "dropout_rate": 0.1,
    "attention": MultiHead(dropout_rate=0.1),
}
EXPERTS = MixtureOfExperts(num_experts=4, dim=16, dropout_rate=0.1, z_loss=1e-3, load_balance=0.1)
MODELS = {
    "decoder": DECODER,
    "encoder": Encoder(**SIZES),
    "encdec": EncoderDecoder(**SIZES, positions=Bucketed()),
    "experts": dataclasses.replace(DECODER, mlp=EXPERTS),
    "sent": dataclasses.replace(DECODER, mlp=dataclasses.replace(EXPERTS, dispatch=AllToAll())),
}
ZERO_1, SEQUENCE = Sharding(divide="optimizer"), Sharding(sequence=True)
PIECES = Sharding(pipeline=Pipeline(num_microbatches=4))
ROUNDS = Sharding(pipeline=Pipeline(num_microbatches=4, repeats=2))


def _mesh(**sizes: int) -> MeshConfig:
    return MeshConfig(**{"data": 1} | sizes)


CASES = [
    ("decoder", _mesh(data=8), Sharding()),
    ("decoder", _mesh(fsdp=8), Sharding()),
    ("decoder", _mesh(data=8), ZERO_1),
    ("decoder", _mesh(data=2, fsdp=2, tensor=2), ZERO_1),
    ("decoder", _mesh(data=2, fsdp=2, tensor=2), SEQUENCE),
    ("decoder", _mesh(data=2, stage=4), PIECES),
    ("decoder", _mesh(fsdp=2, tensor=2, stage=2), ROUNDS),
    ("encoder", _mesh(data=2, tensor=2, stage=2), SEQUENCE),
    ("encdec", _mesh(data=2, fsdp=2, tensor=2), Sharding()),
    ("encdec", _mesh(fsdp=2, tensor=2, stage=2), PIECES),
    ("experts", _mesh(data=2, expert=2, tensor=2), SEQUENCE),
    ("experts", _mesh(fsdp=2, expert=2, stage=2), PIECES),
    ("sent", _mesh(fsdp=2, expert=4), Sharding()),
]


def _batch(model, seed: int) -> Batch:
    batch = random_batch(rows=16, seed=seed)
    if model.layout == "encoder":
        return batch._replace(bidirectional=np.ones(batch.inputs.shape, np.bool_))
    if model.layout == "decoder":
        return batch
    other = random_batch(rows=16, seed=seed + 50)
    return batch._replace(
        encoder_inputs=other.inputs, encoder_segment_ids=other.segment_ids, encoder_positions=other.positions
    )


def _run(name: str, mesh: MeshConfig, sharding: Sharding, steps: int = 2):
    # Plain descent: Adam would blow rounding of near-zero gradients up to whole steps.
    descent = OptimizerConfig(rule=SGD(), schedule=Constant(), learning_rate=0.5)
    config = tiny(mesh=mesh, sharding=sharding, model=MODELS[name], optimizer=descent)
    assembly = assemble(config, TOKENIZER)
    state = first_state(assembly)
    step = jax.jit(make_train_step(config, assembly.model, assembly.optimizer, TOKENIZER.token_bytes))
    history = []
    with assembly.placed():
        for number in range(steps):
            state, metrics = step(state, assembly.place(_batch(config.model, number)))
            history.append(np.concatenate([np.ravel(metrics[name]) for name in sorted(metrics)]))
    places = jax.tree.map(
        lambda array, wanted: array.sharding.is_equivalent_to(wanted.sharding, array.ndim), state, assembly.state
    )
    assert all(jax.tree.leaves(places))
    return np.array(history), jax.device_get(state.params)


_EXPECTED = {}


def _expected(name: str, monkeypatch):
    """The run on one device, once for each model; those of experts agree whatever their dispatch."""
    if name not in _EXPECTED:
        alone = parallel.build_mesh(MeshConfig(), jax.devices()[:1])
        monkeypatch.setattr(assembling.parallel, "build_mesh", lambda config: alone)
        _EXPECTED[name] = _run(name, MeshConfig(), Sharding())
        monkeypatch.undo()
    return _EXPECTED[name]


def _name(value) -> str:
    if isinstance(value, MeshConfig):
        return "x".join(f"{axis}{getattr(value, axis)}" for axis in parallel.MESH_AXES if getattr(value, axis) != 1)
    if isinstance(value, Sharding):
        return "rounds" if value.pipeline.repeats > 1 else "sequence" if value.sequence else value.divide
    return value


@pytest.mark.parametrize(("name", "mesh", "sharding"), CASES, ids=_name)
def test_the_mesh_does_not_change_the_run(name, mesh, sharding, monkeypatch):
    history, params = _expected("experts" if name == "sent" else name, monkeypatch)
    found, found_params = _run(name, mesh, sharding)
    np.testing.assert_allclose(found, history, rtol=2e-5, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found_params, params)


def test_the_mesh_does_not_change_what_is_drawn():
    descent = OptimizerConfig(rule=SGD())
    mesh = _mesh(fsdp=2, tensor=2, expert=2)
    assembly = assemble(tiny(mesh=mesh, model=MODELS["experts"], optimizer=descent), TOKENIZER)
    found, expected = (jax.device_get(state.params) for state in (assembly.init(), first_state(assembly)))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def _share(arrays) -> float:
    """Which share of the elements a device has."""
    leaves = jax.tree.leaves(arrays)
    return sum(np.prod(x.sharding.shard_shape(x.shape)) for x in leaves) / sum(x.size for x in leaves)


def _assemble(mesh: MeshConfig, sharding: Sharding = Sharding(), **changes):  # noqa: B008 - frozen
    optimizer = OptimizerConfig(rule=AdamW(), average=Average())
    return assemble(tiny(mesh=mesh, sharding=sharding, optimizer=optimizer, **changes), TOKENIZER)


def test_fsdp_divides_parameters_and_all_that_belongs_to_them():
    state = _assemble(_mesh(fsdp=8)).state
    # Norm scales stay whole; everything else is an eighth.
    assert max(_share(state.params), _share(state.opt_state), _share(state.average)) < 1.2 / 8


def test_zero_1_divides_optimizer_state_and_average_only():
    state = _assemble(_mesh(data=4, fsdp=2), ZERO_1).state
    assert _share(state.params) == 1.0
    assert max(_share(state.opt_state), _share(state.average)) < 1.2 / 8


@pytest.mark.parametrize("sharding", [Sharding(), ZERO_1], ids=["parameters", "optimizer"])
def test_what_projects_latents_up_is_divided_too(sharding):
    attention = Latent(query_rank=32, kv_rank=32, nope_dim=8, rotary_dim=8, value_dim=8)
    state = _assemble(_mesh(fsdp=8), sharding, model=_model(attention=attention)).state
    assert max(_share(state.opt_state), _share(state.average)) < 1.2 / 8


@pytest.mark.parametrize("axis", ["fsdp", "context", "expert"])
def test_devices_that_read_different_tokens_divide_parameters(axis):
    assert _share(_assemble(_mesh(**{axis: 4}, data=2)).state.params) < 1.2 / 4


def _model(**changes):
    return dataclasses.replace(tiny().model, **changes)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"model": _model(mlp=MixtureOfExperts(num_experts=6)), "mesh": MeshConfig(data=2, expert=4)},
            r"config\.mesh\.expert 4 does not divide the 6 experts of decoder/.*: choose a divisor of 6",
        ),
        ({"mesh": _mesh(tensor=8)}, r"config\.mesh\.tensor 8 does not divide the 4 heads of decoder/"),
        ({"mesh": _mesh(tensor=4, data=2)}, r"config\.mesh\.tensor 4 does not divide the 2 kv_heads of decoder/"),
        (
            {"mesh": _mesh(stage=4, data=2), "model": _model(num_layers=6)},
            r"config\.mesh\.stage 4 with config\.sharding\.pipeline\.repeats 1 does not divide 6 layers: make",
        ),
        (
            {"mesh": _mesh(stage=2, data=4), "sharding": ROUNDS},
            r"stage 2 with config\.sharding\.pipeline\.repeats 2 does not divide 2 layers",
        ),
        (
            {
                "mesh": _mesh(stage=4, data=2),
                "model": _model(num_layers=8),
                "sharding": Sharding(pipeline=Pipeline(num_microbatches=2, repeats=2)),
            },
            r"config\.sharding\.pipeline\.num_microbatches: 2 pieces cannot go round 4 stages 2 times",
        ),
        ({"mesh": _mesh(stage=2, data=4), "model": _model(share_layers=True)}, r"share_layers.* no pipeline"),
        (
            {"mesh": _mesh(stage=2, data=4), "model": _model(num_layers=3, first_layers=(Layer(),))},
            r"does not divide 1 layers.*of decoder/stack/first",
        ),
        ({"mesh": MeshConfig(data=3)}, r"config\.mesh: data 3 makes 3 devices, there are 8"),
    ],
)
def test_a_mesh_that_does_not_suit_the_model_is_one_sentence(changes, sentence):
    with pytest.raises(ConfigError, match=sentence) as caught:
        assemble(tiny(**changes), TOKENIZER)
    assert all(line.startswith("config.") for line in str(caught.value).splitlines())


def test_a_large_parameter_that_is_whole_everywhere_is_an_error_with_its_name():
    mesh = _mesh(tensor=2, data=4)
    model = _model(mlp=EXPERTS)
    with pytest.raises(ConfigError, match=r"decoder/.*/router/kernel has 256 elements and is whole .* mesh\.tensor 2"):
        _assemble(mesh, Sharding(max_replicated=255), model=model)
    _assemble(mesh, Sharding(max_replicated=256), model=model)
    _assemble(MeshConfig(data=8), Sharding(max_replicated=1), model=model)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"batch_size": 12, "mesh": MeshConfig(data=8)}, r"batch_size 12 .* make it a multiple of 8"),
        (
            {"batch_size": 8, "mesh": _mesh(data=4, stage=2), "sharding": PIECES},
            r"for 4 pieces in a pipeline, .*make it a multiple of 16",
        ),
        ({"batch_size": 16, "mesh": _mesh(tensor=3), "sharding": SEQUENCE}, r"sequence_length 16 .*mesh\.tensor 3"),
    ],
)
def test_a_batch_that_does_not_divide_is_one_sentence(changes, sentence):
    config = tiny(**changes)
    devices = np.prod([getattr(config.mesh, axis) for axis in parallel.MESH_AXES])
    with pytest.raises(ConfigError, match=sentence):
        check_batch_size(config, parallel.build_mesh(config.mesh, jax.devices()[:devices]))
