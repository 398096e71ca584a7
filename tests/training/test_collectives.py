"""What devices say to each other in evaluation and in a train step: each collective has its reason, no other is there.

Arrays of rank one and scalars (norm scales, counts, losses) are left out: they cost nothing, and how the compiler
groups them differs between versions. XLA:CPU writes a gradient that each device keeps a part of as an all-reduce and
a slice; that it is a reduce-scatter where there is one is seen in the program for a TPU, compiled without one.
"""

import collections
import dataclasses
import functools
import math

import jax
import pytest

from lm.experiment import LossConfig
from lm.models import Decoder
from lm.parallel import MeshConfig, list_collectives
from lm.scaling import compiled
from lm.scaling.step import describe_step
from lm.training.assembly import assemble
from lm.training.step import make_evaluation_step, make_train_step
from tests.training.experiments import TOKENIZER, random_batch, tiny

ROWS, LENGTH, LAYERS, WIDTH, VOCAB = 8, 32, 3, 16, 288
MODEL = Decoder(
    vocab_size=VOCAB, num_layers=LAYERS, model_dim=WIDTH, num_heads=4, num_kv_heads=2, mlp_dim=24, max_length=32
)
# Query, key, value, output; gate, up, down.
MATRICES = 7


@functools.cache
def traffic(mesh, train, remat="none"):
    """Counts (kind, shape of the result on one device) of arrays of rank two or more."""
    model = dataclasses.replace(MODEL, remat=remat)
    config = tiny(mesh=mesh, model=model, loss=LossConfig())
    assembly = assemble(config, TOKENIZER)
    batch = assembly.place(random_batch(rows=ROWS, length=LENGTH))
    with assembly.placed():
        if train:
            step = make_train_step(config, assembly.model, assembly.optimizer, TOKENIZER.token_bytes)
            lowered = jax.jit(step, donate_argnums=0).lower(assembly.state, batch)
        else:
            step = make_evaluation_step(config.loss, assembly.model, TOKENIZER.token_bytes)
            lowered = jax.jit(step).lower(assembly.state.params, batch)
    found = collections.Counter()
    for each in list_collectives(lowered.compile().as_text()):
        for dimensions in each.dimensions:
            if len(dimensions) > 1:
                found[each.kind, dimensions] += each.turns
    return found


def of(found, kind, *dimensions):
    """Counts those of a kind, of one shape if it is given."""
    return sum(
        count for (name, shape), count in found.items() if name == kind and (not dimensions or shape == dimensions)
    )


DATA = MeshConfig(data=8)
FSDP = MeshConfig(data=1, fsdp=8)
TENSOR = MeshConfig(data=4, tensor=2)
CONTEXT = MeshConfig(data=2, context=4)
THREE = MeshConfig(data=2, fsdp=2, tensor=2)


@pytest.mark.parametrize("mesh", [DATA, FSDP, THREE, CONTEXT], ids=["data", "fsdp", "three", "context"])
def test_no_activations_and_no_logits_are_gathered(mesh):
    found = traffic(mesh, train=True)
    shards = mesh.sizes(8)
    rows = ROWS // (shards[0] * shards[1])
    for (kind, shape), count in found.items():
        # Tokens' ids may be; logits, hidden states and heads have a rank of three or more and a length.
        whole = kind != "all-reduce" and len(shape) > 2 and shape[1] == LENGTH and shape[-1] > 1
        assert not whole, f"{count} {kind} of {shape}"
        assert not (kind == "all-reduce" and len(shape) > 2 and shape[0] > rows and shape[1] == LENGTH), shape
        assert VOCAB not in shape or LENGTH not in shape, f"{kind} of logits {shape}"


def test_data_parallel_adds_gradients_and_nothing_else():
    assert traffic(DATA, train=False) == {}
    found = traffic(DATA, train=True)
    assert {kind for kind, _ in found} == {"all-reduce"}
    # Each matrix of each layer, and the table: as it is looked up, and as it makes logits.
    assert of(found, "all-reduce") == LAYERS * MATRICES + 2


def test_fsdp_gathers_each_layer_once_forward_and_once_backward():
    forward = traffic(FSDP, train=False)
    # The table is gathered once, to be looked up and to make logits.
    assert of(forward, "all-gather") == LAYERS * MATRICES + 1
    assert {kind for kind, _ in forward} == {"all-gather"}
    found = traffic(FSDP, train=True)
    assert of(found, "all-gather") - of(found, "all-gather", VOCAB, WIDTH) == 2 * LAYERS * MATRICES
    assert of(found, "all-gather", VOCAB, WIDTH) <= 2
    assert of(found, "all-reduce") + of(found, "reduce-scatter") == LAYERS * MATRICES + 2
    assert {kind for kind, _ in found} <= {"all-gather", "all-reduce", "reduce-scatter"}


def test_tensor_parallel_has_two_reductions_a_block():
    forward = traffic(TENSOR, train=False)
    rows = ROWS // 4
    # After attention and after the feed-forward layer; once more after the lookup in a divided vocabulary.
    assert of(forward, "all-reduce", rows, LENGTH, WIDTH) == 2 * LAYERS + 1
    assert {kind for kind, _ in forward} == {"all-reduce"}


@functools.cache
def tpu_traffic(mesh, width):
    """Counts the same in a train step for four TPUs."""
    model = dataclasses.replace(MODEL, model_dim=width, mlp_dim=width)
    data = dataclasses.replace(tiny().data, sequence_length=LENGTH)
    step = describe_step(
        tiny(mesh=mesh, model=model, data=data, loss=LossConfig()),
        compiled.topology_mesh(mesh, compiled.parse_topology("v5e:2x2")),
    )
    found = collections.Counter()
    for each in list_collectives(step.lower().compile().as_text()):
        for dimensions in each.dimensions:
            if math.prod(dimensions) > width * LAYERS and len(dimensions) > 1:
                found[each.kind, dimensions] += each.turns
    return found


# A program for TPUs that are not here is kept, and cannot be read again.
UNREAD = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")


@UNREAD
def test_fsdp_on_tpus_scatters_each_gradient_once():
    pytest.importorskip("libtpu")
    # What four devices divide has to fill their tiles, or the compiler sums it whole.
    found = tpu_traffic(MeshConfig(data=1, fsdp=4), 512)
    assert {kind for kind, _ in found} == {"all-gather", "reduce-scatter"}
    # The table's gradient is the sum of its two uses.
    assert of(found, "reduce-scatter") == LAYERS * MATRICES + 1
    # Parameters only. Gathers begin within other kernels, which name them again.
    assert all(LENGTH not in shape for _, shape in found)
    assert of(found, "all-gather") >= 2 * LAYERS * MATRICES


@UNREAD
def test_tensor_parallel_on_tpus_has_two_reductions_a_block_each_way():
    pytest.importorskip("libtpu")
    found = tpu_traffic(MeshConfig(data=2, tensor=2), WIDTH)
    # And one after the lookup, one before its gradient.
    assert of(found, "all-reduce", ROWS // 2, LENGTH, WIDTH) == 2 * (2 * LAYERS + 1)
    assert {kind for kind, _ in found} == {"all-reduce"}
