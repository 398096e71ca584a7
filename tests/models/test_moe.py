"""The layer against the blocks of `transformers`, and the laws of a model that has it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import parallel
from lm.models import (
    AllToAll,
    BiasBalancing,
    Capacity,
    Decoder,
    Dense,
    Dropless,
    ExpertGroups,
    Layer,
    MixtureOfExperts,
    Mlp,
    Router,
    SharedExpert,
)
from lm.models.attention import Side
from lm.models.moe import MixtureLayer
from lm.models.multihead import Context

BIASED = Router(score="sigmoid", normalize=True, scale=2.5, balancing=BiasBalancing(step=0.01))
MIXTURE = MixtureOfExperts(
    num_experts=4, num_selected=2, dim=24, router=BIASED, shared=SharedExpert(dim=8), z_loss=1e-3
)
MODEL = Decoder(
    vocab_size=50, num_layers=2, model_dim=16, num_heads=2, mlp_dim=32, max_length=32, dtype="float32", mlp=MIXTURE
)


def _with(**changes):
    return dataclasses.replace(MODEL, mlp=dataclasses.replace(MIXTURE, **changes))


def _context(valid_BT):
    valid_BT = jnp.asarray(valid_BT, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(valid_BT.shape[1]), valid_BT.shape)
    side = Side(valid_BT, positions, valid_BT != 0, positions[0])
    return Context(side, side)


def _layer(mixture, params, x, model_dim=16):
    """Applies the layer alone, on rows without padding."""
    config = dataclasses.replace(MODEL, model_dim=model_dim, mlp=mixture)
    layer = MixtureLayer(mixture, config)
    return layer.apply({"params": params}, x, _context(np.ones(x.shape[:2])))[0]


def _randomize(torch, module, stddev=0.3):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.copy_(stddev * torch.randn(tensor.shape, generator=generator))
    return module.eval()


def _expert_kernels(experts):
    """Splits transformers' fused weights [E, 2F, D] and [E, D, F]."""
    gate, up = np.split(experts.gate_up_proj.detach().numpy(), 2, axis=1)
    down = experts.down_proj.detach().numpy()
    kernels = {"gate": gate, "up": up, "down": down}
    return {name: {"kernel": jnp.asarray(np.swapaxes(kernel, 1, 2))} for name, kernel in kernels.items()}


def _dense_kernels(mlp):
    return {
        name: {"kernel": jnp.asarray(getattr(mlp, f"{name}_proj").weight.detach().numpy().T)}
        for name in ("gate", "up", "down")
    }


def _compare(torch, block, mixture, params, tolerance=1e-5):
    x = np.random.default_rng(0).normal(size=(2, 11, 16)).astype(np.float32)
    with torch.no_grad():
        expected = block(torch.from_numpy(x))
    for dispatch in (Dense(), Dropless(), Capacity(factor=mixture.num_experts / mixture.num_selected)):
        settings = dataclasses.replace(mixture, dispatch=dispatch)
        y = jax.jit(lambda x, settings=settings: _layer(settings, params, x))(jnp.asarray(x))
        np.testing.assert_allclose(y, expected.numpy(), atol=tolerance)
    assert np.abs(expected.numpy()).max() > 0.1


def test_equals_mixtral():
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    config = modeling.MixtralConfig(hidden_size=16, intermediate_size=24, num_local_experts=6, num_experts_per_tok=2)
    block = _randomize(torch, modeling.MixtralSparseMoeBlock(config))
    params = {
        "router": {"kernel": jnp.asarray(block.gate.weight.detach().numpy().T)},
        "experts": _expert_kernels(block.experts),
    }
    _compare(torch, block, MixtureOfExperts(num_experts=6, num_selected=2, dim=24), params)


@pytest.mark.parametrize("normalize", [False, True])
def test_equals_qwen2_moe(normalize):
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.qwen2_moe.modeling_qwen2_moe")
    config = modeling.Qwen2MoeConfig(
        hidden_size=16,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=20,
        num_experts=8,
        num_experts_per_tok=3,
        norm_topk_prob=normalize,
    )
    block = _randomize(torch, modeling.Qwen2MoeSparseMoeBlock(config))
    params = {
        "router": {"kernel": jnp.asarray(block.gate.weight.detach().numpy().T)},
        "experts": _expert_kernels(block.experts),
        "shared": _dense_kernels(block.shared_expert),
        "shared_gate": {"kernel": jnp.asarray(block.shared_expert_gate.weight.detach().numpy()[0])},
    }
    mixture = MixtureOfExperts(
        num_experts=8,
        num_selected=3,
        dim=12,
        router=Router(normalize=normalize),
        shared=SharedExpert(dim=20, gated=True),
    )
    _compare(torch, block, mixture, params)


def test_equals_qwen3_moe():
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    config = modeling.Qwen3MoeConfig(
        hidden_size=16, moe_intermediate_size=12, num_experts=8, num_experts_per_tok=4, norm_topk_prob=True
    )
    block = _randomize(torch, modeling.Qwen3MoeSparseMoeBlock(config))
    params = {
        "router": {"kernel": jnp.asarray(block.gate.weight.detach().numpy().T)},
        "experts": _expert_kernels(block.experts),
    }
    _compare(torch, block, MixtureOfExperts(num_experts=8, num_selected=4, dim=12), params)


def _deepseek(torch, block, groups, router):
    params = {
        "router": {"kernel": jnp.asarray(block.gate.weight.detach().numpy().T)},
        "experts": _expert_kernels(block.experts),
        "shared": _dense_kernels(block.shared_experts),
    }
    if router.balancing is not None:
        params["router_bias"] = jnp.asarray(block.gate.e_score_correction_bias.numpy())
    mixture = MixtureOfExperts(
        num_experts=8,
        num_selected=3,
        dim=12,
        router=dataclasses.replace(router, groups=groups),
        shared=SharedExpert(dim=24),
    )
    _compare(torch, block, mixture, params)


DEEPSEEK = {
    "hidden_size": 16,
    "moe_intermediate_size": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
}


@pytest.mark.parametrize("normalize", [False, True])
def test_equals_deepseek_v3(normalize):
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    config = modeling.DeepseekV3Config(**DEEPSEEK, norm_topk_prob=normalize)
    block = _randomize(torch, modeling.DeepseekV3MoE(config))
    groups = ExpertGroups(num_groups=4, num_selected=2, score="best_two")
    _deepseek(torch, block, groups, dataclasses.replace(BIASED, normalize=normalize))


def test_equals_deepseek_v2():
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.deepseek_v2.modeling_deepseek_v2")
    config = modeling.DeepseekV2Config(
        **DEEPSEEK, num_attention_heads=4, num_key_value_heads=4, topk_method="group_limited_greedy"
    )
    block = _randomize(torch, modeling.DeepseekV2Moe(config))
    groups = ExpertGroups(num_groups=4, num_selected=2, score="best")
    _deepseek(torch, block, groups, Router(scale=2.5))


def test_equals_switch():
    """Top-1 with the probability as weight, and what exceeds the capacity dropped (`transformers`' Switch)."""
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.switch_transformers.modeling_switch_transformers")
    capacity = 3
    config = modeling.SwitchTransformersConfig(
        d_model=16, d_ff=24, num_experts=4, expert_capacity=capacity, dropout_rate=0.0, dense_act_fn="relu"
    )
    block = _randomize(torch, modeling.SwitchTransformersSparseMLP(config))
    experts = [block.experts[f"expert_{i}"] for i in range(4)]
    params = {
        "router": {"kernel": jnp.asarray(block.router.classifier.weight.detach().numpy().T)},
        "experts": {
            ours: {"kernel": jnp.asarray(np.stack([getattr(e, theirs).weight.detach().numpy().T for e in experts]))}
            for ours, theirs in (("up", "wi"), ("down", "wo"))
        },
    }
    x = np.random.default_rng(0).normal(size=(2, 11, 16)).astype(np.float32)
    mixture = MixtureOfExperts(
        num_experts=4,
        num_selected=1,
        dim=24,
        activation="relu",
        gated=False,
        router=Router(),
        dispatch=Capacity(factor=capacity * 4 / 11),
    )
    y = _layer(mixture, params, jnp.asarray(x))
    with torch.no_grad():
        result = block(torch.from_numpy(x))
    expected = (result[0] if isinstance(result, tuple) else result).numpy()
    kept = np.abs(np.asarray(y)).max(-1) > 0
    assert 0 < kept.sum() < kept.size
    np.testing.assert_allclose(np.asarray(y)[kept], expected[kept], atol=1e-5)


def _loss(model, batch):
    def loss(params):
        output = model.apply(params, batch)
        valid = batch.segment_ids[:, :, None] != 0
        value = jnp.mean(jnp.where(valid, output.logits, 0.0) ** 2) + sum(
            pair.sum / pair.weight for pair in output.losses.values()
        )
        return value, output

    return loss


def _value_and_gradients(config, params, batch):
    (value, output), gradients = jax.jit(jax.value_and_grad(_loss(config.build(), batch), has_aux=True))(params)
    return (float(value), output), gradients


@pytest.fixture(name="packed")
def _packed(make_batch):
    return make_batch([[5, 3], [8, 4]], length=14)


@pytest.fixture(name="params")
def _params():
    return jax.jit(MODEL.build().init)(jax.random.key(0))


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(MODEL, scan_layers=False),
        dataclasses.replace(MODEL, remat="full"),
        _with(dispatch=Dense()),
        _with(dispatch=Capacity(factor=2.0)),
    ],
    ids=["unrolled", "remat", "dense", "capacity"],
)
def test_value_gradients_and_counts_do_not_depend_on_the_form(config, params, packed):
    (value, output), gradients = _value_and_gradients(MODEL, params, packed)
    (other, found), other_gradients = _value_and_gradients(config, params, packed)
    assert other == pytest.approx(value, rel=1e-6)
    same = lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6)  # noqa: E731 - one line for four trees
    jax.tree.map(same, found.statistics, output.statistics)
    jax.tree.map(same, found.metrics, output.metrics)
    jax.tree.map(same, other_gradients, gradients)


@pytest.mark.parametrize("dispatch", [Dropless(), Capacity(factor=1.0)], ids=lambda d: type(d).__name__)
def test_bfloat16_is_near_float32_and_gradients_are_finite(dispatch, params, packed):
    config = _with(dispatch=dispatch)
    (value, _), _ = _value_and_gradients(config, params, packed)
    low = dataclasses.replace(config, dtype="bfloat16")
    (other, output), gradients = _value_and_gradients(low, params, packed)
    assert output.hidden.dtype == jnp.bfloat16
    assert other == pytest.approx(value, rel=0.02)
    assert all(np.isfinite(g).all() and g.dtype == jnp.float32 for g in jax.tree.leaves(gradients))


def test_gradients_are_finite_where_experts_are_empty(params, packed):
    mlp = params["decoder"]["stack"]["layers"]["block_0"]["mlp"]
    mlp["router_bias"] = mlp["router_bias"].at[:, 2:].set(-100.0)
    (value, output), gradients = _value_and_gradients(MODEL, params, packed)
    counts = output.statistics["decoder"]["stack"]["layers"]["block_0"]["mlp"]["router_bias"]
    np.testing.assert_array_equal(counts, [[20, 20, 0, 0]] * 2)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
    up = gradients["decoder"]["stack"]["layers"]["block_0"]["mlp"]["experts"]["up"]["kernel"]
    np.testing.assert_array_equal(up[:, 2:], 0.0)
    assert np.abs(up[:, :2]).min(axis=(2, 3)).shape == (2, 2)


def test_documents_do_not_see_each_other_or_padding(params, packed):
    """Without a capacity, another document in the row changes nothing of this one."""
    run = jax.jit(lambda tokens: MODEL.build().apply(params, packed._replace(inputs=tokens)).logits)
    changed = jnp.where(packed.segment_ids == 2, packed.inputs, (packed.inputs + 7) % 50)
    mine = np.asarray(packed.segment_ids == 2)
    np.testing.assert_array_equal(np.asarray(run(packed.inputs))[mine], np.asarray(run(changed))[mine])


def test_losses_and_metrics_are_means_over_layers(params, packed):
    config = _with(load_balance=0.5)
    output = config.build().apply(params, packed)
    assert output.losses["load_balance"].weight == 2 * 20
    mean = output.losses["load_balance"].sum / output.losses["load_balance"].weight
    assert 0.5 * 2 * 0.95 < mean < 0.5 * 4
    assert set(output.losses) == {"load_balance", "router_z"}
    names = {"max_load", "min_load", "entropy", "drop_rate", "load_of_4"}
    assert {f"router/{name}" for name in names} == set(output.metrics)
    load = output.metrics["router/load_of_4"]
    np.testing.assert_array_equal(load.weight, 2 * 20 * 2)
    np.testing.assert_array_equal(load.sum.sum(), load.weight)


def test_bias_has_no_gradient_and_follows_the_counts_whatever_the_optimizer_did(params, packed):
    model = MODEL.build()
    (_, output), gradients = _value_and_gradients(MODEL, params, packed)
    where = ("decoder", "stack", "layers", "block_0", "mlp", "router_bias")

    def at(tree):
        for name in where:
            tree = tree[name]
        return np.asarray(tree)

    np.testing.assert_array_equal(at(gradients), 0.0)
    decayed = jax.tree.map(lambda x: 0.9 * x + 1.0, params)
    updated = model.after_update(params, decayed, output.statistics)
    counts = at(output.statistics)
    expected = at(params) + 0.01 * np.sign(counts.mean(-1, keepdims=True) - counts)
    np.testing.assert_allclose(at(updated), expected, rtol=1e-6)
    assert np.abs(expected).max() > 0
    changed = jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), updated, decayed)
    assert sum(not same for same in jax.tree.leaves(changed)) == 1


def test_every_second_layer_and_dense_first_layers(make_batch):
    """Switch has experts in every second layer, DeepSeek none in the first ones."""
    batch = make_batch([[6]])
    pattern = dataclasses.replace(
        MODEL, num_layers=5, mlp=Mlp(), layers=(Layer(), Layer(mlp=MIXTURE)), first_layers=(Layer(),)
    )
    model = pattern.build()
    params = jax.jit(model.init)(jax.random.key(0))
    stack = params["decoder"]["stack"]
    assert "router" in stack["layers"]["block_1"]["mlp"]
    assert "router" not in stack["layers"]["block_0"]["mlp"]
    assert "router" not in stack["first"]["block_0"]["mlp"]
    output = jax.jit(model.apply)(params, batch)
    assert output.losses["load_balance"].weight == 2 * 6
    unrolled = dataclasses.replace(pattern, scan_layers=False).build()
    np.testing.assert_allclose(jax.jit(unrolled.apply)(params, batch).logits, output.logits, atol=1e-5)


def test_cached_logits_equal_uncached_ones(params, make_batch):
    model, batch = MODEL.build(), make_batch([[6], [4]], length=6)
    whole = jax.jit(model.apply)(params, batch)
    cache = model.init_cache(params, 2, 6)
    step = jax.jit(lambda batch, cache: model.apply(params, batch, cache=cache))
    for t in range(6):
        piece = jax.tree.map(lambda x, t=t: x[:, t : t + 1], batch)
        output = step(piece, cache)
        cache = output.cache
        valid = np.asarray(piece.segment_ids[:, 0] != 0)
        np.testing.assert_allclose(
            np.asarray(output.logits[:, 0])[valid], np.asarray(whole.logits[:, t])[valid], atol=1e-5
        )


MESHES = {
    "data x expert x tensor": parallel.MeshConfig(data=2, expert=2, tensor=2),
    "fsdp x expert": parallel.MeshConfig(data=1, fsdp=2, expert=4),
    "data": parallel.MeshConfig(data=4, fsdp=2),
}
PLACED = [
    (Dropless(), "data x expert x tensor"),
    (Dropless(), "fsdp x expert"),
    (Dropless(), "data"),
    (AllToAll(), "data x expert x tensor"),
    (AllToAll(), "fsdp x expert"),
    (Capacity(factor=2.0), "fsdp x expert"),
    (Dense(), "data x expert x tensor"),
]


def _noisy_value_and_gradients(config, params, batch):
    """With dropout everywhere and noise at the router."""
    model = config.build()

    def loss(params):
        output = model.apply(params, batch, key=jax.random.key(3))
        valid = batch.segment_ids[:, :, None] != 0
        extra = sum(pair.sum / pair.weight for pair in output.losses.values())
        return jnp.mean(jnp.where(valid, output.logits, 0.0) ** 2) + extra, output

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)


@pytest.fixture(name="alone", scope="module")
def _alone(make_batch):
    batch = make_batch([[5, 3], [8], [7], [2, 6]] * 2, length=8)
    config = dataclasses.replace(_with(dispatch=Dropless(), dropout_rate=0.2), num_layers=1, dropout_rate=0.1)
    config = dataclasses.replace(config, mlp=dataclasses.replace(config.mlp, router=_JITTERY))
    params = jax.jit(config.build().init)(jax.random.key(0))
    with parallel.use(parallel.build_mesh(parallel.MeshConfig(), jax.devices()[:1]), parallel.DEFAULT_RULES):
        return batch, config, params, _noisy_value_and_gradients(config, params, batch)


_JITTERY = dataclasses.replace(BIASED, jitter=0.05)


@pytest.mark.parametrize(("dispatch", "mesh"), PLACED, ids=lambda x: x if isinstance(x, str) else type(x).__name__)
def test_experts_on_many_devices_give_the_result_of_one(dispatch, mesh, alone):
    batch, config, params, ((value, output), gradients) = alone
    config = dataclasses.replace(config, mlp=dataclasses.replace(config.mlp, dispatch=dispatch))
    mesh = parallel.build_mesh(MESHES[mesh])
    with parallel.use(mesh, parallel.DEFAULT_RULES):
        shardings = jax.tree.map(
            lambda _, axes: jax.sharding.NamedSharding(mesh, parallel.spec(axes, parallel.DEFAULT_RULES.parameters)),
            params,
            config.build().axes(),
        )
        rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp", "expert")))
        placed, spread = jax.device_put(params, shardings), jax.device_put(batch, rows)
        (other, found), other_gradients = _noisy_value_and_gradients(config, placed, spread)
    kernel = placed["decoder"]["stack"]["layers"]["block_0"]["mlp"]["experts"]["up"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape)[1] == 4 // mesh.shape["expert"]
    assert float(other) == pytest.approx(float(value), rel=1e-5)
    same = lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5)  # noqa: E731 - one line for four trees
    jax.tree.map(same, found.metrics, output.metrics)
    jax.tree.map(same, found.statistics, output.statistics)
    jax.tree.map(same, other_gradients, gradients)


def test_a_full_buffer_drops_and_says_so(alone):
    batch, config, params, ((value, _), _) = alone
    config = dataclasses.replace(config, mlp=dataclasses.replace(config.mlp, dispatch=AllToAll(factor=0.5)))
    with parallel.use(parallel.build_mesh(MESHES["fsdp x expert"]), parallel.DEFAULT_RULES):
        (other, output), gradients = _noisy_value_and_gradients(config, params, batch)
    rate = output.metrics["router/drop_rate"]
    assert 0.2 < float(rate.sum) / float(rate.weight) < 0.9
    assert float(other) != pytest.approx(float(value), rel=1e-5)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (_with(num_selected=5), "num_selected"),
        (_with(dispatch=Capacity(factor=0.0)), "dispatch.factor"),
        (_with(dispatch=AllToAll(factor=0.0)), "dispatch.factor"),
        (_with(dim=0), "mlp.dim"),
        (_with(shared=SharedExpert(dim=0)), "shared.dim"),
        (_with(dropout_rate=1.0), "dropout_rate"),
        (dataclasses.replace(MODEL, share_layers=True), "share_layers"),
    ],
)
def test_problems_name_the_field(config, field):
    problems = config.problems()
    assert len(problems) == 1
    assert field in problems[0]
    with pytest.raises(ValueError, match=field):
        config.build()
