"""The plan against XLA: state and batch to the byte, temporaries within a factor of two; and what it says of a run."""

import dataclasses

import pytest

from benchmarks.guard import cases
from lm import parallel
from lm.config import ConfigError
from lm.parallel import MeshConfig
from lm.parallel.hardware import HARDWARE
from lm.scaling import report
from lm.scaling.planner import make_plan
from lm.scaling.step import abstract_mesh, describe_step
from lm.scaling.suggestions import suggest

V5P = HARDWARE["v5p"]
NAMES = ["decoder on data", "decoder on fsdp x tensor", "encoder on fsdp", "encoder_decoder on fsdp", "experts on fsdp"]


@pytest.mark.parametrize("name", NAMES)
def test_memory_is_that_of_xla(name):
    experiment = cases()[name]
    plan = make_plan(experiment, 8, V5P)
    step = describe_step(experiment, parallel.build_mesh(experiment.mesh))
    memory = step.lower(keep_unused=True).compile().memory_analysis()
    # The step counter and the key: three words that no plan is made for.
    assert memory.argument_size_in_bytes - plan.argument_bytes == 12
    # XLA's order and fusions are its own; for a CPU the plan reads the CPU's branches.
    assert 0.5 < step.count("cpu").peak / memory.temp_size_in_bytes < 2


def test_gathers_of_parameters_are_those_of_xla():
    experiment = cases()["decoder on fsdp"]
    step = describe_step(experiment, parallel.build_mesh(experiment.mesh))
    planned = {(m.kind, m.axes): m.count for m in step.count("cpu").messages()}
    found = parallel.count_collectives(step.lower().compile().as_text())
    # Each of two layers' seven matrices forward and backward, and the two tables.
    assert planned["all-gather", ("fsdp",)] == found["all-gather"].count == 2 * 7 * 2 + 2


def test_an_abstract_mesh_costs_what_a_real_one_does():
    experiment = cases()["decoder on fsdp x tensor"]
    real = describe_step(experiment, parallel.build_mesh(experiment.mesh)).count()
    assert describe_step(experiment, abstract_mesh(experiment.mesh, 8)).count() == real


def test_operations_are_the_models_and_attention_in_full():
    experiment = cases()["decoder on data"]
    plan, model = make_plan(experiment, 8, V5P), experiment.model
    length = experiment.data.sequence_length
    # The model's count halves causal attention; plain attention computes all of it, two products forward and four
    # backward, for which the scores are computed again.
    masked = 3 * 4 * model.num_layers * model.num_heads * model.sizes["H"] * (length - (length + 1) / 2)
    again = 2 * model.num_layers * model.num_heads * model.sizes["H"] * length
    expected = plan.model_flops + (masked + again) * plan.tokens
    assert plan.cost.flops * 8 == pytest.approx(expected, rel=0.02)


def test_remat_adds_a_forward_pass_and_keeps_less():
    experiment = cases()["decoder on data"]
    again = dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, remat="full"))
    plain, remat = make_plan(experiment, 8, V5P), make_plan(again, 8, V5P)
    assert plain.cost.flops < remat.cost.flops < 1.34 * plain.cost.flops
    assert remat.cost.peak < plain.cost.peak


def test_twice_the_devices_hold_half_the_parameters():
    experiment = dataclasses.replace(cases()["decoder on data"], batch_size=32)
    four, eight = (
        make_plan(dataclasses.replace(experiment, mesh=MeshConfig(data=1, fsdp=size)), size, V5P) for size in (4, 8)
    )
    # Norm scales stay whole.
    assert eight.parameter_bytes == pytest.approx(four.parameter_bytes / 2, rel=0.03)
    assert eight.cost.flops == four.cost.flops / 2


def test_what_does_not_fit_is_mended():
    experiment = cases()["decoder on data"]
    small = dataclasses.replace(V5P, memory=1.5e6)
    plan = make_plan(experiment, 8, small)
    assert not plan.fits
    suggestion = suggest(experiment, 8, small)
    assert suggestion is not None
    assert suggestion.plan.fits
    assert "DOES NOT FIT" in report.describe(plan)
    assert "It fits with --config." in report.advise(plan, suggestion)
    nothing = dataclasses.replace(V5P, memory=1e3)
    assert "use more devices" in report.advise(plan, suggest(experiment, 8, nothing, most=3))


def test_a_mesh_that_does_not_fit_is_one_sentence():
    experiment = dataclasses.replace(cases()["decoder on data"], mesh=MeshConfig(data=3, fsdp=2))
    with pytest.raises(ConfigError, match="makes 6 devices, there are 8"):
        make_plan(experiment, 8, V5P)
