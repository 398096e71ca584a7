"""Published sizes, initial weights, refusals, and equality with `transformers` on random weights."""

import dataclasses
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import models, parallel

GOLDEN = pathlib.Path(__file__).parent / "golden"


def gpt2(num_layers, model_dim, num_heads):
    return models.Decoder(
        vocab_size=50257,
        num_layers=num_layers,
        model_dim=model_dim,
        num_heads=num_heads,
        mlp_dim=4 * model_dim,
        max_length=1024,
        norm=models.LayerNorm(),
        positions=models.Learned(),
        attention=models.MultiHead(use_qkv_bias=True, use_output_bias=True),
        mlp=models.Mlp(activation="gelu_tanh", gated=False, use_bias=True),
    )


def llama3(num_layers, model_dim, num_heads, mlp_dim, tied=False):
    return models.Decoder(
        vocab_size=128256,
        num_layers=num_layers,
        model_dim=model_dim,
        num_heads=num_heads,
        num_kv_heads=8,
        mlp_dim=mlp_dim,
        max_length=8192,
        norm=models.RMSNorm(epsilon=1e-5),
        positions=models.Rotary(theta=500_000.0),
        tied_embeddings=tied,
    )


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (gpt2(12, 768, 12), 124_439_808),
        (gpt2(24, 1024, 16), 354_823_168),
        (gpt2(36, 1280, 20), 774_030_080),
        (gpt2(48, 1600, 25), 1_557_611_200),
        (llama3(32, 4096, 32, 14336), 8_030_261_248),
        (llama3(80, 8192, 64, 28672), 70_553_706_496),
        (llama3(16, 2048, 32, 8192, tied=True), 1_235_814_400),
    ],
    ids=["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "llama3-8b", "llama3-70b", "llama3.2-1b"],
)
def test_published_parameter_counts(config, count):
    assert config.num_parameters() == count


def test_gpt2_initial_weights():
    """0.02 everywhere, residual projections divided by sqrt(2 L) (GPT-2, section 2.3), biases 0, norms 1."""
    config = dataclasses.replace(gpt2(4, 64, 4), vocab_size=500)
    params = config.build().init(jax.random.key(0))
    block = params["decoder"]["stack"]["layers"]["block_0"]
    for kernel, stddev in [
        (params["tokens"]["embedding"], 0.02),
        (params["decoder"]["positions"]["embedding"], 0.02),
        (block["attention"]["query"]["kernel"], 0.02),
        (block["mlp"]["up"]["kernel"], 0.02),
        (block["mlp"]["down"]["kernel"], 0.02 / math.sqrt(8)),
        (block["attention"]["out"]["kernel"], 0.02 / math.sqrt(8)),
    ]:
        assert float(jnp.std(kernel)) == pytest.approx(stddev, rel=0.03)
        assert abs(float(jnp.mean(kernel))) < stddev / 20
    assert not np.asarray(block["mlp"]["up"]["bias"]).any()
    assert (np.asarray(block["mlp_norm"]["scale"]) == 1).all()


def test_fan_in_initial_weights_give_unit_variance(make_batch):
    config = models.Decoder(
        vocab_size=300, num_layers=2, model_dim=64, num_heads=2, mlp_dim=128, initializer=models.FanInInitializer()
    )
    params = config.build().init(jax.random.key(0))
    block = params["decoder"]["stack"]["layers"]["block_0"]
    assert float(jnp.std(block["mlp"]["down"]["kernel"])) == pytest.approx(128**-0.5, rel=0.03)
    assert float(jnp.std(block["attention"]["out"]["kernel"])) == pytest.approx(64**-0.5, rel=0.03)
    assert float(jnp.std(params["tokens"]["embedding"])) == pytest.approx(1.0, rel=0.03)


def test_parameters_say_what_they_are():
    config = dataclasses.replace(llama3(2, 64, 16, 128), vocab_size=100)
    parameters = config.build().parameters()
    out = parameters["decoder"]["stack"]["layers"]["block_0"]["attention"]["out"]["kernel"]
    assert (out.shape, out.axes) == ((2, 16, 4, 64), ("layers", "heads", "head_dim", "embed"))
    assert (out.role, out.fan_in, out.input_axes) == ("matrix", 64, ("heads", "head_dim"))
    tokens = parameters["tokens"]["embedding"]
    assert (tokens.role, tokens.axes, tokens.fan_in) == ("table", ("vocab", "embed"), 1)
    assert all(set(axes) <= set(parallel.LOGICAL_AXES) for _, axes in flat(config.build().axes()))


def flat(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, tuple | models.Parameter))
    return [(models.path_name(path), leaf) for path, leaf in leaves]


@pytest.mark.parametrize("name", ["gpt2", "llama3"])
def test_golden_parameter_tree(name):
    """Paths, shapes and axes are a file format: checkpoints and converters depend on them."""
    config = {"gpt2": gpt2(12, 768, 12), "llama3": llama3(32, 4096, 32, 14336)}[name]
    tree = {path: [list(p.shape), list(p.axes)] for path, p in flat(config.build().parameters())}
    assert tree == json.loads((GOLDEN / f"{name}.json").read_text())


def test_problems_name_every_field_at_once():
    config = models.Decoder(
        vocab_size=10,
        model_dim=30,
        num_heads=4,
        num_kv_heads=3,
        dropout_rate=1.5,
        layers=(models.Layer(window=0),),
        attention=models.MultiHead(kernel=models.Chunked(), dropout_rate=0.1),
        positions=models.Rotary(fraction=0.2),
    )
    problems = "\n".join(config.problems())
    for name in ("num_kv_heads", "num_heads", "dropout_rate", "layers.window", "attention.dropout_rate", "fraction"):
        assert f"config.model.{name}" in problems or f"config.model.positions.{name}" in problems
    with pytest.raises(ValueError, match="num_kv_heads"):
        config.build()
    assert models.Decoder(vocab_size=10).problems() == []


def test_the_docstring_documents_every_field():
    documented = models.Decoder.__doc__.partition("Attributes:")[2]
    for field in dataclasses.fields(models.Decoder):
        assert f"\n      {field.name}: " in documented


# Equality with transformers


def as_array(tensor):
    return jnp.asarray(tensor.detach().numpy())


def stacked(state, pattern, num_layers, change=lambda x: x):
    return jnp.stack([change(as_array(state[pattern.format(i)])) for i in range(num_layers)])


def from_gpt2(state, layers, heads):
    """Maps a GPT-2 state dict to the parameter tree; its weights are already [input, output]."""

    def get(pattern, change=lambda x: x):
        return stacked(state, "transformer.h.{}." + pattern, layers, change)

    def qkv(index):
        def kernel(x):
            return jnp.split(x, 3, axis=1)[index].reshape(x.shape[0], heads, -1)

        def bias(x):
            return jnp.split(x, 3)[index].reshape(heads, -1)

        return {"kernel": get("attn.c_attn.weight", kernel), "bias": get("attn.c_attn.bias", bias)}

    def norm(name):
        return {"scale": get(f"{name}.weight"), "bias": get(f"{name}.bias")}

    def dense(name, change=lambda x: x):
        return {"kernel": get(f"{name}.weight", change), "bias": get(f"{name}.bias")}

    block = {
        "attention_norm": norm("ln_1"),
        "attention": {
            "query": qkv(0),
            "key": qkv(1),
            "value": qkv(2),
            "out": dense("attn.c_proj", lambda x: x.reshape(heads, -1, x.shape[1])),
        },
        "mlp_norm": norm("ln_2"),
        "mlp": {"up": dense("mlp.c_fc"), "down": dense("mlp.c_proj")},
    }
    final = {name: as_array(state[f"transformer.ln_f.{hf}"]) for name, hf in (("scale", "weight"), ("bias", "bias"))}
    return {
        "tokens": {"embedding": as_array(state["transformer.wte.weight"])},
        "decoder": {
            "positions": {"embedding": as_array(state["transformer.wpe.weight"])},
            "stack": {"layers": {"block_0": block}},
            "final_norm": final,
        },
    }


def random_state(module):
    """Random weights of a size that makes every term matter."""
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2 + (0.5 if parameter.ndim == 1 else 0)
    return module.eval().state_dict()


def test_equals_gpt2(make_batch):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    hf = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=3, n_head=4, n_positions=16)
    )
    config = dataclasses.replace(gpt2(3, 32, 4), vocab_size=50, max_length=16)
    params = from_gpt2(random_state(hf), 3, 4)
    batch = make_batch([[12], [12]])
    expected = hf(torch.tensor(np.asarray(batch.inputs, np.int64))).logits.detach().numpy()
    np.testing.assert_allclose(config.build().apply(params, batch).logits, expected, atol=1e-4, rtol=1e-5)


def from_llama(state, layers, heads, kv_heads):
    """Maps a Llama state dict to the parameter tree; its weights are [output, input]."""

    def get(pattern, change=lambda x: x.T):
        return stacked(state, "model.layers.{}." + pattern + ".weight", layers, change)

    def split(count):
        return lambda x: x.T.reshape(x.shape[1], count, -1)

    block = {
        "attention_norm": {"scale": get("input_layernorm")},
        "attention": {
            "query": {"kernel": get("self_attn.q_proj", split(heads))},
            "key": {"kernel": get("self_attn.k_proj", split(kv_heads))},
            "value": {"kernel": get("self_attn.v_proj", split(kv_heads))},
            "out": {"kernel": get("self_attn.o_proj", lambda x: x.T.reshape(heads, -1, x.shape[0]))},
        },
        "mlp_norm": {"scale": get("post_attention_layernorm")},
        "mlp": {name: {"kernel": get(f"mlp.{name}_proj")} for name in ("gate", "up", "down")},
    }
    return {
        "tokens": {"embedding": as_array(state["model.embed_tokens.weight"])},
        "decoder": {
            "stack": {"layers": {"block_0": block}},
            "final_norm": {"scale": as_array(state["model.norm.weight"])},
        },
        "head": {"projection": {"kernel": as_array(state["lm_head.weight"]).T}},
    }


SCALINGS = {
    "none": (None, None),
    "linear": ({"rope_type": "linear", "factor": 3.0}, models.LinearScaling(factor=3.0)),
    "llama3": (
        {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        models.Llama3Scaling(factor=4.0, original_max_length=16),
    ),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        models.YarnScaling(factor=4.0, original_max_length=16),
    ),
}


@pytest.mark.parametrize(("scaling", "ours"), SCALINGS.values(), ids=SCALINGS)
def test_equals_llama(make_batch, scaling, ours):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    hf = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            max_position_embeddings=64,
            rope_parameters={"rope_theta": 500.0, **(scaling or {"rope_type": "default"})},
            tie_word_embeddings=False,
        )
    )
    config = dataclasses.replace(
        llama3(2, 32, 4, 48),
        vocab_size=50,
        num_kv_heads=2,
        norm=models.RMSNorm(),
        positions=models.Rotary(theta=500.0, scaling=ours),
    )
    params = from_llama(random_state(hf), 2, 4, 2)
    batch = make_batch([[40], [40]])
    expected = hf(torch.tensor(np.asarray(batch.inputs, np.int64))).logits.detach().numpy()
    np.testing.assert_allclose(config.build().apply(params, batch).logits, expected, atol=1e-4, rtol=1e-5)
