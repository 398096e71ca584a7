"""Kernels of one platform: splash attention interpreted, the arguments of cuDNN's, what they refuse, who is chosen."""

import dataclasses
import re
from typing import ClassVar, Literal
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from configs import llama3
from lm import models, parallel
from lm.models import Auto, Blocked, Chunked, Cudnn, MultiHead, Plain, Ring, Splash
from lm.models.attention import Features, Layout, Scoring
from lm.models.context_parallel import attend
from lm.models.kernels import platform_problems
from lm.scaling import compiled
from tests.models.test_attention import SCORINGS, make_inputs, make_side

FEATURES = Features(0.0, False, False, False, False, "bfloat16", 64, 64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByXla(Cudnn):
    """The same call, computed by XLA instead of cuDNN."""

    implementation: ClassVar[Literal["cudnn", "xla"]] = "xla"


def cases(kernel):
    for causal in (True, False):
        yield kernel, SCORINGS["plain"], causal, None
    yield (
        (kernel, SCORINGS["soft_cap"], True, None)
        if isinstance(kernel, Splash)
        else (kernel, SCORINGS["plain"], True, 3)
    )


@pytest.mark.parametrize(
    ("kernel", "scoring", "causal", "window"),
    [
        *cases(Splash(interpret=True)),
        *cases(ByXla()),
        *cases(Blocked(blocks=3)),
        *((Blocked(), SCORINGS[name], True, None) for name in ("bias", "sinks")),
    ],
    ids=str,
)
def test_a_kernel_equals_the_plain_one(kernel, scoring, causal, window):
    (q, k, v), side = make_inputs()
    # No flags: these kernels do not read them.
    side = side._replace(bidirectional=jnp.zeros_like(side.bidirectional))
    layout = Layout(side, side, causal, window)

    def results(kernel):
        def mean(qkv):
            out = kernel.attend(*qkv, layout, scoring)
            return jnp.mean(jnp.sin(out) * jnp.arange(1.0, 9.0)[None, None, None]), out

        return jax.jit(jax.value_and_grad(mean, has_aux=True))((q, k, v))

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6, rtol=2e-5), results(kernel), results(Plain()))


@pytest.mark.parametrize("kernel", [Splash(interpret=True), ByXla()], ids=["splash", "cudnn"])
def test_cross_attention_to_a_source_that_lacks_a_segment(kernel):
    (q, k, v), _ = make_inputs()
    queries, keys = make_side([[1] * 4 + [2] * 3, [1] * 7]), make_side([[1] * 11, [1] * 6 + [2] * 5])
    layout = Layout(queries, keys, False)
    out = kernel.attend(q[:, :7], k, v, layout, SCORINGS["plain"])
    np.testing.assert_allclose(out, Plain().attend(q[:, :7], k, v, layout, SCORINGS["plain"]), atol=2e-6)


def test_a_kernel_runs_on_the_shards_of_a_mesh():
    (q, k, v), side = jax.device_get(make_inputs())
    side = side._replace(bidirectional=np.zeros_like(side.bidirectional))
    layout = Layout(side, side, True)
    mesh = parallel.build_mesh(parallel.MeshConfig(data=2, tensor=2), jax.devices()[:4])
    with parallel.use(mesh, parallel.DEFAULT_RULES):
        run = jax.jit(lambda qkv: attend(Ring(), Splash(interpret=True), qkv, layout, SCORINGS["plain"]))
        out = jax.device_get(run((q, k, v)))
    np.testing.assert_allclose(out, Plain().attend(q, k, v, layout, SCORINGS["plain"]), atol=2e-6)


@pytest.mark.parametrize(
    ("kernel", "change", "words"),
    [
        (Splash(), {"dropout_rate": 0.1}, "attention.dropout_rate"),
        (Splash(), {"sinks": True}, "attention.sinks"),
        (Splash(), {"biased": True}, "model.positions"),
        (Splash(), {"window": True}, "layers.window"),
        (Splash(block=100), {}, "kernel.block: 100"),
        (Blocked(blocks=0), {}, "kernel.blocks: 0"),
        (Blocked(blocks=1000), {}, "kernel.blocks: 1000"),
        (Blocked(), {"dropout_rate": 0.1}, "attention.dropout_rate"),
        (Cudnn(), {"soft_cap": True}, "attention.logit_softcap"),
        (Cudnn(), {"dtype": "float32"}, "model.dtype"),
        (Cudnn(), {"key_width": 60, "value_width": 60}, "head_dim.*not 60"),
        (Cudnn(), {"value_width": 32}, "value_dim"),
    ],
    ids=str,
)
def test_what_a_kernel_cannot_do_is_told_in_one_sentence(kernel, change, words):
    assert kernel.problems(FEATURES) == [] or change == {}
    (line,) = kernel.problems(FEATURES._replace(**change))
    assert line.startswith("config.model.")
    assert re.search(words, line)


def test_a_model_refuses_what_its_kernel_cannot_do():
    config = dataclasses.replace(
        llama3.get_model("tiny"), positions=models.Alibi(), attention=MultiHead(kernel=Splash())
    )
    assert config.problems() == [
        "config.model.positions: the kernel Splash does not compute it; use the kernel Chunked or Plain"
    ]


def test_a_kernel_is_refused_on_another_platform():
    (q, k, v), side = make_inputs()
    with pytest.raises(ValueError, match=r"Splash runs on a tpu, the devices here are cpu; use Auto, Chunked or Plain"):
        attend(Ring(), Splash(), (q, k, v), Layout(side, side, True), SCORINGS["plain"])
    (line,) = platform_problems(Cudnn(), "tpu")
    assert "Cudnn runs on a gpu" in line
    assert platform_problems(Cudnn(), "cuda") == platform_problems(Auto(), "cpu") == []


def test_auto_chooses_by_platform_and_feature():
    def choose(platform, num_pairs=100, **change):
        return Auto().resolve(platform, FEATURES._replace(**change), num_pairs)

    assert choose("tpu") == Splash()
    assert choose("gpu") == choose("cuda") == Cudnn()
    assert choose("cpu") == Blocked(blocks=2)
    assert choose("cpu", dtype="float32") == Blocked(blocks=4)
    assert choose("tpu", window=True) == choose("gpu", dtype="float32") == choose("cpu", dropout_rate=0.1) == Plain()
    assert choose("cpu", num_pairs=1 << 23) == choose("gpu", num_pairs=1 << 23, sinks=True) == Chunked()
    # Wide heads need a Hopper.
    assert choose("gpu", key_width=256, value_width=256) == choose("gpu", old_gpu=True) == Cudnn()
    assert choose("gpu", key_width=256, value_width=256, old_gpu=True) == Plain()
    # Only the plain kernel drops weights.
    assert choose("tpu", num_pairs=1 << 23, dropout_rate=0.1) == Plain()


@pytest.mark.parametrize(("capability", "old"), [("8.0", True), ("9.0", False), ("10.3", False), ("gfx90a", False)])
def test_gpus_before_hopper_are_told_by_their_compute_capability(capability, old):
    device = mock.Mock(compute_capability=capability, platform="gpu", id=0, process_index=0)
    assert parallel.is_old_gpu(jax.sharding.Mesh(np.asarray([device], object), ("data",))) == old


def test_auto_computes_on_this_platform():
    (q, k, v), side = make_inputs()
    side = side._replace(bidirectional=jnp.zeros_like(side.bidirectional))
    layout, scoring = Layout(side, side, True), Scoring(scale=0.3)
    for kernel in (Auto(), Auto(plain_up_to=1)):
        out = attend(Ring(), kernel, (q, k, v), layout, scoring)
        np.testing.assert_allclose(out, Plain().attend(q, k, v, layout, scoring), atol=2e-6)


def test_splash_attention_lowers_for_a_tpu():
    """The real kernel, not interpreted, in a program for TPUs; lowered only, since there is none to run it on."""
    (q, k, v), side = make_inputs()
    layout = Layout(side, side, True)
    grad = jax.grad(lambda qkv: Splash().attend(*qkv, layout, SCORINGS["soft_cap"]).sum())
    text = jax.jit(grad).trace((q, k, v)).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") >= 3


# length, keys, query heads, key heads, channels of keys and of values, causal, soft-cap
TPU_CASES = {
    "grouped heads, soft-cap": (1024, 1024, 4, 2, 128, 128, True, 30.0),
    "a source of another length": (100, 300, 4, 1, 64, 64, False, None),
    "latent": (256, 256, 4, 4, 192, 128, True, None),
}


@pytest.mark.parametrize("name", TPU_CASES)
def test_splash_attention_compiles_for_a_tpu(name):
    """Interpreted kernels are not held to the blocks that the chip has."""
    pytest.importorskip("libtpu")
    length, num_keys, heads, kv_heads, width, value_width, causal, cap = TPU_CASES[name]
    chips = compiled.topology_mesh(parallel.MeshConfig(), compiled.parse_topology("v5e:2x2")).devices
    mesh = parallel.build_mesh(parallel.MeshConfig(), list(chips.flat[:1]))
    one = NamedSharding(mesh, PartitionSpec())

    def grad(qkv, sides):
        layout, scoring = Layout(*sides, causal), Scoring(scale=0.1, soft_cap=cap)
        return jax.grad(lambda qkv: Splash().attend(*qkv, layout, scoring).sum())(qkv)

    shapes = ((2, length, heads, width), (2, num_keys, kv_heads, width), (2, num_keys, kv_heads, value_width))
    arrays = tuple(jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=one) for shape in shapes)
    sides = [make_side([[1] * size] * 2) for size in (length, num_keys)]
    sides = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), sides)
    with parallel.use(mesh, parallel.DEFAULT_RULES):
        text = jax.jit(grad).lower(arrays, sides).compile().as_text()
    # Forward, and the gradients of queries and of keys with values.
    assert text.count("tpu_custom_call") == 3


# queries, keys, key heads, channels, causal, window, mask type of the call
GPU_CASES = {
    "causal": (256, 256, 4, 64, True, None, "CAUSAL"),
    "both ways": (256, 256, 4, 64, False, None, "NO_MASK"),
    "window": (256, 256, 2, 128, True, 32, "CAUSAL"),
    "a source of another, odd length": (100, 201, 1, 64, False, None, "NO_MASK"),
}


@pytest.mark.parametrize("name", GPU_CASES)
def test_cudnn_lowers_for_a_gpu(name, monkeypatch):
    """What `problems` lets through is a call of cuDNN, forward and backward; there is no GPU here to compute it."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    length, num_keys, kv_heads, width, causal, window, mask = GPU_CASES[name]
    assert Cudnn().problems(FEATURES._replace(window=window is not None, key_width=width, value_width=width)) == []
    layout = Layout(make_side([[1] * length] * 2), make_side([[1] * num_keys] * 2), causal, window)
    q = jnp.zeros((2, length, 4, width), jnp.bfloat16)
    k = jnp.zeros((2, num_keys, kv_heads, width), jnp.bfloat16)
    grad = jax.grad(lambda qkv: Cudnn().attend(*qkv, layout, Scoring(scale=0.1)).sum())
    text = jax.jit(grad).trace((q, k, k)).lower(lowering_platforms=("cuda",)).as_text()
    assert re.findall(r"__cudnn\$fmha\w+", text) == [
        "__cudnn$fmhaScaleBiasSoftmax",
        "__cudnn$fmhaScaleBiasSoftmaxBackward",
    ]
    assert set(re.findall(r"mask_type\W+22: \W+22(\w+)\\", text)) == {mask}
    # Who may read whom is a bias of their own lengths, made even.
    assert f"2x1x{length + length % 2}x{num_keys + num_keys % 2}x" in text


def _has_gpu():
    try:
        return bool(jax.devices("gpu"))
    except RuntimeError:
        return False


@pytest.mark.skipif(not _has_gpu(), reason="needs an NVIDIA GPU: JAX_PLATFORMS=cuda,cpu")
@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 3)])
def test_cudnn_equals_the_plain_one_on_a_gpu(causal, window):
    """With packed segments, padding and grouped heads; what else there is, `problems` refuses."""
    arrays, side = make_inputs()
    side = side._replace(bidirectional=jnp.zeros_like(side.bidirectional))

    def results(kernel):
        def mean(qkv):
            out = kernel.attend(*qkv, Layout(side, side, causal, window), SCORINGS["plain"])
            return jnp.mean(jnp.sin(out.astype(jnp.float32))), out

        inputs = jax.device_put([x.astype(jnp.bfloat16) for x in arrays], jax.devices("gpu")[0])
        return jax.device_get(jax.jit(jax.value_and_grad(mean, has_aux=True))(tuple(inputs)))

    got, expected = (
        jax.tree.map(lambda x: np.asarray(x, np.float32), results(kernel)) for kernel in (Cudnn(), Plain())
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-2 * np.abs(b).max()), got, expected)
