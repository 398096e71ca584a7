"""Topologies are checked before libtpu is asked, and a step is compiled for one."""

import dataclasses
import importlib.util

import pytest

from benchmarks.guard import cases
from lm.config import ConfigError
from lm.parallel import MeshConfig
from lm.scaling import compiled


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
    assert found.collectives["all-gather"].count > 0


def test_a_slice_that_libtpu_does_not_know_is_one_sentence():
    pytest.importorskip("libtpu")
    with pytest.raises(ConfigError, match="does not exist"):
        compiled.topology_mesh(MeshConfig(), compiled.parse_topology("v5e:4x5"))
