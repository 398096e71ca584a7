"""Presets: where a matrix, its optimizer state and the residual stream live under each known scheme."""

import pytest
from jax.sharding import PartitionSpec as P

from lm import parallel
from lm.parallel import MESH_AXES, MeshConfig, Sharding

ZERO_1, SEQUENCE = Sharding(divide="optimizer"), Sharding(sequence=True)
MATRIX, EXPERTS, RESIDUAL = ("layers", "embed", "mlp"), ("experts", "embed", "mlp"), ("batch", "residual_length", None)
# mesh, sharding, axes -> the axes of size above one that divide a parameter, its state, and the residual stream.
PRESETS = {
    "data": (MeshConfig(data=8), Sharding(), MATRIX, [[], [], []], [[], [], []], [["data"], [], []]),
    "fsdp": (MeshConfig(fsdp=8, data=1), Sharding(), MATRIX, [[], ["fsdp"], []], None, [["fsdp"], [], []]),
    "zero 1": (MeshConfig(data=8), ZERO_1, MATRIX, [[], [], []], [[], ["data"], []], [["data"], [], []]),
    "tensor": (MeshConfig(tensor=8, data=1), Sharding(), MATRIX, [[], [], ["tensor"]], None, [[], [], []]),
    "sequence": (MeshConfig(tensor=8, data=1), SEQUENCE, MATRIX, [[], [], ["tensor"]], None, [[], ["tensor"], []]),
    "context": (MeshConfig(context=8, data=1), Sharding(), MATRIX, [[], ["context"], []], None, [[], ["context"], []]),
    "expert": (MeshConfig(expert=8, data=1), Sharding(), EXPERTS, [["expert"], [], []], None, [["expert"], [], []]),
    "not expert": (MeshConfig(expert=8, data=1), Sharding(), MATRIX, [[], ["expert"], []], None, [["expert"], [], []]),
    "stage": (MeshConfig(stage=8, data=1), Sharding(), MATRIX, [["stage"], [], []], None, [["stage"], [], []]),
    "product": (
        MeshConfig(data=2, fsdp=2, tensor=2),
        ZERO_1,
        MATRIX,
        [[], [], ["tensor"]],
        [[], ["fsdp", "data"], ["tensor"]],
        [["data", "fsdp"], [], []],
    ),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_divide_what_they_are_known_for(name):
    mesh, sharding, axes, parameter, state, residual = PRESETS[name]
    sizes, rules = dict(zip(MESH_AXES, mesh.sizes(8), strict=True)), sharding.rules()

    def dividing(names, table):
        return [[a for a in parallel.carriers(entry) if sizes[a] > 1] for entry in parallel.spec(names, table)]

    assert dividing(axes, rules.parameters) == parameter
    assert dividing(axes, rules.state) == (parameter if state is None else state)
    assert dividing(RESIDUAL, rules.activations) == residual


def test_a_table_without_mesh_axes_places_nothing_on_them():
    rules = Sharding().rules().without(frozenset({"stage"}))
    tables = (rules.parameters, rules.activations)
    assert not any("stage" in row for table in tables for row in table.values())
    assert parallel.spec(("batch",), rules.activations) == P(("data", "fsdp", "expert"))
