"""The plan against XLA: state and batch to the byte, temporaries within a factor of two; and what it says of a run."""

import dataclasses

import jax
import pytest

from benchmarks.guard import cases
from lm import parallel
from lm.config import ConfigError, override
from lm.optim import AdamW, AdamW8Bit
from lm.parallel import MeshConfig, Pipeline, Sharding
from lm.parallel.hardware import HARDWARE
from lm.scaling import report
from lm.scaling.compiled import compile_step
from lm.scaling.planner import make_plan
from lm.scaling.step import abstract_mesh, describe_step
from lm.scaling.suggestions import mesh_overrides, savings, suggest

V5P = HARDWARE["v5p"]
NAMES = ["decoder on fsdp x tensor", "encoder on fsdp", "encoder_decoder on fsdp", "experts on fsdp"]


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


PIECES = Sharding(pipeline=Pipeline(num_microbatches=4))
# mesh, sharding, and which messages are those of XLA, in number and bytes. How a sum of gradients is sent, XLA:CPU
# decides otherwise.
DIVIDED = {
    # Each of two layers' seven matrices forward and backward, and the two tables.
    "fsdp": (MeshConfig(data=1, fsdp=8), Sharding(), "all-gather", 2 * 7 * 2 + 2),
    # Each parameter once, after the update.
    "ZeRO-1": (MeshConfig(data=8), Sharding(divide="optimizer"), "all-gather", 7 + 2),
    # As with fsdp; no activations.
    "context": (MeshConfig(data=2, context=4), Sharding(), "all-gather", 2 * 7 * 2 + 2),
    # Each turn but one hands the stream on, and takes its gradient back.
    "pipeline": (MeshConfig(data=4, stage=2), PIECES, "collective-permute", 2 * (4 + 2 - 1)),
}


@pytest.mark.parametrize("name", DIVIDED)
def test_memory_and_messages_are_those_of_xla(name):
    mesh, sharding, kind, number = DIVIDED[name]
    experiment = dataclasses.replace(cases()["decoder on data"], mesh=mesh, sharding=sharding)
    step = describe_step(experiment, parallel.build_mesh(mesh))
    compiled = step.lower(keep_unused=True).compile()
    memory, cost = compiled.memory_analysis(), step.count("cpu")
    assert memory.argument_size_in_bytes - make_plan(experiment, 8, V5P).argument_bytes == 12
    assert 0.6 < cost.peak / memory.temp_size_in_bytes < 1.5
    planned = [message for message in cost.messages() if message.kind == kind]
    found = parallel.count_collectives(compiled.as_text())[kind]
    assert sum(message.count for message in planned) == found.count == number
    assert sum(message.bytes for message in planned) == found.bytes


def test_an_abstract_mesh_costs_what_a_real_one_does():
    experiment = cases()["decoder on fsdp x tensor"]
    real = describe_step(experiment, parallel.build_mesh(experiment.mesh)).count()
    assert describe_step(experiment, abstract_mesh(experiment.mesh, 8)).count() == real


# Which share of all pairs of query and key is computed: n blocks leave out (n - 1) / 2n.
SHARES = {"Plain": 1.0, "Blocked": 0.75}


@pytest.mark.parametrize("kernel", SHARES)
def test_operations_are_the_models_and_attention_in_full(kernel):
    experiment = override(cases()["decoder on data"], {"model.attention.kernel": kernel})
    plan, model = make_plan(experiment, 8, V5P), experiment.model
    length = experiment.data.sequence_length
    # The model's count halves causal attention; these kernels compute more of it, two products forward and four
    # backward, for which the scores are computed again.
    computed = SHARES[kernel] * length
    masked = 3 * 4 * model.num_layers * model.num_heads * model.sizes["H"] * (computed - (length + 1) / 2)
    again = 2 * model.num_layers * model.num_heads * model.sizes["H"] * computed
    expected = plan.model_flops + (masked + again) * plan.tokens
    assert plan.cost.flops * 8 == pytest.approx(expected, rel=0.01)


def test_what_blocks_leave_out_is_left_out_by_xla():
    """One layer, in which scores are most of all; written out, since XLA counts the body of a loop once."""
    changes = {
        "mesh.data": "1",
        "batch_size": "2",
        "model.num_layers": "1",
        "model.scan_layers": "False",
        "model.max_length": "256",
        "data.sequence_length": "256",
        "model.attention.kernel": "Blocked",
        "model.attention.kernel.blocks": "4",
    }
    experiment = override(cases()["decoder on data"], changes)
    step = describe_step(experiment, parallel.build_mesh(experiment.mesh, jax.devices()[:1]))
    compiled, cost = step.lower(keep_unused=True).compile(), step.count("cpu")
    # XLA counts elementwise operations besides.
    assert 0.95 < cost.flops / compiled.cost_analysis()["flops"] < 1
    # The plan takes one block after the other; XLA:CPU begins all that it can.
    assert 0.5 < cost.peak / compiled.memory_analysis().temp_size_in_bytes < 1.1


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


def test_a_mesh_is_named_by_what_differs_from_the_runs_own():
    fsdp, tensor = MeshConfig(data=1, fsdp=8), MeshConfig(data=1, fsdp=1, tensor=8)
    assert mesh_overrides(tensor, fsdp) == ("config.mesh.fsdp=1", "config.mesh.tensor=8")
    assert mesh_overrides(fsdp, fsdp) == ()


@pytest.mark.parametrize("kernel", ["Plain", "Blocked"])
def test_a_kernel_that_holds_scores_at_once_is_exchanged(kernel):
    changes = {"model.max_length": "1024", "data.sequence_length": "1024", "model.attention.kernel": kernel}
    overrides = savings(override(cases()["decoder on data"], changes))
    assert any("config.model.attention.kernel=Chunked" in tried for tried in overrides)


def test_state_moves_or_shrinks_when_nothing_cheaper_fits():
    """One row whose layers are computed again: there is nothing else to save."""
    experiment = dataclasses.replace(cases()["decoder on data"], mesh=MeshConfig(data=1), batch_size=1)
    experiment = override(experiment, {"model.remat": "full", "optimizer.rule": "AdamW", "optimizer.rule.b2": "0.98"})
    host, small = "config.sharding.optimizer_on_host=True", "config.optimizer.rule=AdamW8Bit"

    def find(hardware, memory):
        # Room for so much and no more, with the tenth that is left free.
        hardware = dataclasses.replace(HARDWARE[hardware], memory=memory / 0.9)
        plan, found = make_plan(experiment, 1, hardware), suggest(experiment, 1, hardware)
        assert not plan.fits
        assert found is not None
        assert found.plan.fits
        assert ("AdamW8Bit rounds the moments" in report.advise(plan, found)) == (small in found.overrides)
        return found

    total = make_plan(experiment, 1, V5P).total_bytes
    on_host = find("h100", 0.95 * total)
    assert on_host.overrides == (host,)
    assert on_host.plan.experiment.optimizer.rule == AdamW(b2=0.98)
    both = find("h100", 0.95 * on_host.plan.total_bytes)
    assert both.overrides == (host, small)
    # The speed of a TPU's link to its host is not published.
    eight_bits = find("v5p", 0.95 * total)
    assert eight_bits.overrides == (small,)
    assert eight_bits.plan.experiment.optimizer.rule == AdamW8Bit(b2=0.98)
    assert not eight_bits.plan.experiment.sharding.optimizer_on_host


def test_state_on_the_host_is_no_argument_and_is_fetched_whole():
    h100 = HARDWARE["h100"]
    there = cases()["decoder on fsdp"]
    here, host = (
        make_plan(dataclasses.replace(there, sharding=Sharding(optimizer_on_host=on)), 8, h100) for on in (False, True)
    )
    # The counts of updates alone stay.
    assert 0 < host.optimizer_bytes <= 16
    assert host.host_bytes == here.optimizer_bytes - host.optimizer_bytes
    assert host.argument_bytes == here.argument_bytes - host.host_bytes
    assert here.host_bytes == here.host_seconds == 0
    assert host.update_bytes == here.gradient_bytes + host.host_bytes
    # Here activations are the fullest, so that all of it is saved; where they are small, nothing is.
    assert host.total_bytes == here.total_bytes - host.host_bytes
    small, large = (dataclasses.replace(p, cost=dataclasses.replace(p.cost, peak=0)) for p in (host, here))
    assert small.total_bytes == large.total_bytes
    assert host.host_seconds == host.host_bytes / 64e9
    assert host.worst_seconds == pytest.approx(
        here.worst_seconds + 2 * host.host_bytes / 64e9 + 2 * host.host_bytes / h100.memory_bandwidth
    )
    assert host.best_seconds >= host.host_bytes / 64e9
    said = report.describe(host)
    assert "on the host" in said
    assert "to the device and as much back / 64 GB/s each way" in said
    assert "host" not in report.describe(here)
    assert "unknown" in report.describe(dataclasses.replace(host, hardware=V5P))


def test_xlas_arguments_leave_out_what_the_host_holds():
    experiment = dataclasses.replace(cases()["decoder on fsdp"], sharding=Sharding(optimizer_on_host=True))
    plan = make_plan(experiment, 8, V5P)
    found = compile_step(experiment, parallel.build_mesh(experiment.mesh))
    assert found.unseen_bytes == plan.host_bytes
    # What the model does not read of the batch is no argument.
    assert 0 <= plan.argument_bytes + 12 - found.argument_bytes <= plan.batch_bytes
    assert found.output_bytes - found.alias_bytes < 1024
    assert "on the host" in report.describe_compiled(found, plan)


def test_a_mesh_that_does_not_fit_is_one_sentence():
    experiment = dataclasses.replace(cases()["decoder on data"], mesh=MeshConfig(data=3, fsdp=2))
    with pytest.raises(ConfigError, match="makes 6 devices, there are 8"):
        make_plan(experiment, 8, V5P)
