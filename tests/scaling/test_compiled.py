"""Compiled text is read as it runs; topologies are checked before libtpu is asked."""

import dataclasses
import importlib.util

import pytest

from benchmarks.guard import cases
from lm.config import ConfigError
from lm.parallel import MeshConfig
from lm.scaling import compiled

# A loop of 24 that says how often it runs, one of 8 whose condition does, a branch, a started gather and a tuple.
TEXT = """HloModule step

%body (p: f32[8]) -> f32[8] {
  %g = f32[32,8]{1,0} all-gather(%p), dimensions={0}
  ROOT %r = f32[8] bitcast(%g)
}

%condition (p: (s32[])) -> pred[] {
  %limit = s32[]{:T(128)} constant(8), metadata={op_name="while"}
  ROOT %c = pred[] compare(%i, %limit), direction=LT
}

%other (p: f32[8]) -> f32[8] {
  %s = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%p), dimensions={0}
  ROOT %d = bf16[16,8]{1,0} all-gather-done(%s)
}

%chosen (p: f32[8]) -> f32[8] {
  ROOT %x = f32[8] collective-permute(%p), source_target_pairs={{0,1}}
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%a), condition=%unknown, body=%body, backend_config={"known_trip_count":{"n":"24"}}
  %v = (s32[], f32[8]) while(%a), condition=%condition, body=%other
  %b = f32[8] conditional(%i, %a), branch_computations={%chosen}
  ROOT %t = (f32[8]{0}, f32[], /*index=2*/f32[4]{0}) all-reduce(%b, %b, %b), to_apply=%add
}
"""


def test_collectives_count_as_often_as_their_loops_run():
    assert compiled.read_collectives(TEXT) == {
        "all-gather": (24 + 8, 24 * 32 * 8 * 4 + 8 * 16 * 8 * 2),
        "all-reduce": (1, 4 * (8 + 1 + 4)),
        "collective-permute": (1, 32),
    }


def test_a_topology_is_read():
    assert compiled.parse_topology("v5p:4x4x8") == compiled.Topology("v5p:4x4x8", "v5p", 128)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v9:4x4", "is no TPU topology"),
        ("v5e", "is no TPU topology"),
        ("v5e:4xx4", "is no TPU topology"),
        ("v5e:4x4x4", "v5e has 2 dimensions, not 3"),
    ],
)
def test_what_is_no_topology_is_one_sentence(name, words):
    with pytest.raises(ConfigError, match=words):
        compiled.parse_topology(name)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is here")
def test_without_libtpu_one_sentence_says_what_to_install():
    with pytest.raises(ConfigError, match="pip install"):
        compiled.topology_mesh(MeshConfig(), compiled.parse_topology("v5e:4x4"))


def test_compiles_a_step_for_a_topology_without_a_tpu():
    pytest.importorskip("libtpu")
    topology = compiled.parse_topology("v5e:4x4")
    experiment = dataclasses.replace(cases()["decoder on fsdp"], mesh=MeshConfig(data=1, fsdp=16))
    found = compiled.compile_step(experiment, compiled.topology_mesh(experiment.mesh, topology))
    assert found.argument_bytes > 0
    assert found.collectives["all-gather"][0] > 0


def test_a_slice_that_libtpu_does_not_know_is_one_sentence():
    pytest.importorskip("libtpu")
    with pytest.raises(ConfigError, match="does not exist"):
        compiled.topology_mesh(MeshConfig(), compiled.parse_topology("v5e:4x5"))
