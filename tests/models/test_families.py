"""Each published family against `transformers` on random weights, mapped by hand: 1e-4 or better, padded and packed."""

import dataclasses
import types

import jax.numpy as jnp
import numpy as np
import pytest

from lm import models

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

SIZES = types.SimpleNamespace(vocab=50, dim=32, layers=2, heads=4, hidden=48)


def randomized(module):
    """Random weights of a size that makes every term matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            offset = 0.5 if parameter.ndim == 1 else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + offset)
    return module.eval()


class Weights:
    """Reads a state dict into the layouts of our parameter tree; `{}` in a name is the number of the layer."""

    def __init__(self, module, layers, prefix=""):
        self.state, self.layers, self.prefix = module.state_dict(), layers, prefix

    def one(self, name):
        return jnp.asarray(self.state[self.prefix + name].numpy())

    def get(self, name, change=lambda x: x):
        """Returns a tensor, or the stack of all layers' tensors."""
        if "{}" not in name:
            return change(self.one(name))
        return jnp.stack([change(self.one(name.format(i))) for i in self.layers])

    def norm(self, name, *, bias=False):
        return {"scale": self.get(f"{name}.weight")} | ({"bias": self.get(f"{name}.bias")} if bias else {})

    def dense(self, name, shape=None, *, bias=False):
        """A linear map, [output, input] in torch; `shape` splits the dimension of heads."""

        def kernel(x):
            return x.T if shape is None else x.T.reshape(shape)

        out = {"kernel": self.get(f"{name}.weight", kernel)}
        if bias:
            # Of the kernel's shape, the bias has what is not summed over: heads and their width, or the model's.
            heads = shape is not None and shape[0] == SIZES.dim
            out["bias"] = self.get(f"{name}.bias", lambda x: x.reshape(shape[1:]) if heads else x)
        return out

    def attention(self, names, heads=SIZES.heads, kv_heads=None, head_dim=None, bias=False, output_bias=None):
        """Query, key, value and output projections by their names."""
        head_dim = head_dim or SIZES.dim // heads
        kv_heads = kv_heads or heads
        query, key, value, out = names
        output_bias = bias if output_bias is None else output_bias
        return {
            "query": self.dense(query, (SIZES.dim, heads, head_dim), bias=bias),
            "key": self.dense(key, (SIZES.dim, kv_heads, head_dim), bias=bias),
            "value": self.dense(value, (SIZES.dim, kv_heads, head_dim), bias=bias),
            "out": self.dense(out, (heads, head_dim, SIZES.dim), bias=output_bias),
        }


def small(kind, **changes):
    return kind(
        vocab_size=SIZES.vocab,
        num_layers=SIZES.layers,
        model_dim=SIZES.dim,
        num_heads=SIZES.heads,
        mlp_dim=SIZES.hidden,
        max_length=64,
        **changes,
    )


def check(config, params, batch, expected, atol=1e-4):
    """Compares logits where there are tokens, and the tree with the one that the model declares."""
    import jax

    model = config.build()
    declared = jax.tree.map(
        lambda p: p.shape, model.parameters(), is_leaf=lambda leaf: isinstance(leaf, models.Parameter)
    )
    assert jax.tree.map(lambda x: x.shape, params) == declared
    logits = model.apply(params, batch).logits
    tokens = np.asarray(batch.segment_ids) != 0
    np.testing.assert_allclose(np.asarray(logits)[tokens], np.asarray(expected.detach())[tokens], atol=atol, rtol=1e-5)


def ids(x):
    return torch.tensor(np.asarray(x, np.int64))


LAYERS = range(SIZES.layers)


def test_bert(make_batch):
    hf = randomized(
        transformers.BertForPreTraining(
            transformers.BertConfig(
                vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
                max_position_embeddings=64, attn_implementation="eager",
            )
        )
    )  # fmt: skip
    config = small(
        models.Encoder,
        norm=models.LayerNorm(epsilon=1e-12),
        norm_placement="post",
        positions=models.Learned(),
        attention=models.MultiHead(use_qkv_bias=True, use_output_bias=True),
        mlp=models.Mlp(activation="gelu", gated=False, use_bias=True),
        embedding_norm=True,
        num_token_types=2,
        head_transform=models.HeadTransform(),
        head_bias=True,
        num_classes=2,
    )
    w = Weights(hf, LAYERS)
    layer, embeddings, head = "bert.encoder.layer.{}.", "bert.embeddings.", "cls.predictions."
    names = [layer + f"attention.{x}" for x in ("self.query", "self.key", "self.value", "output.dense")]
    block = {
        "attention": w.attention(names, bias=True),
        "attention_norm": w.norm(layer + "attention.output.LayerNorm", bias=True),
        "mlp": {
            "up": w.dense(layer + "intermediate.dense", bias=True),
            "down": w.dense(layer + "output.dense", bias=True),
        },
        "mlp_norm": w.norm(layer + "output.LayerNorm", bias=True),
    }
    params = {
        "tokens": {"embedding": w.get(embeddings + "word_embeddings.weight")},
        "encoder": {
            "positions": {"embedding": w.get(embeddings + "position_embeddings.weight")},
            "types": {"embedding": w.get(embeddings + "token_type_embeddings.weight")},
            "embedding_norm": w.norm(embeddings + "LayerNorm", bias=True),
            "stack": {"layers": {"block_0": block}},
        },
        "head": {
            "dense": w.dense(head + "transform.dense", bias=True),
            "norm": w.norm(head + "transform.LayerNorm", bias=True),
            "bias": w.get(head + "bias"),
        },
        "classifier": {
            "pooler": w.dense("bert.pooler.dense", bias=True),
            "projection": w.dense("cls.seq_relationship", bias=True),
        },
    }
    batch = make_batch([[10], [7]])
    kinds = (batch.positions > 4).astype(jnp.int32)
    batch = batch._replace(
        token_types=kinds,
        label_targets=jnp.zeros_like(kinds).at[1].set(1),
        label_weights=jnp.zeros(kinds.shape).at[:, 0].set(1.0),
    )
    out = hf(ids(batch.inputs), attention_mask=ids(batch.segment_ids), token_type_ids=ids(kinds))
    check(config, params, batch, out.prediction_logits)
    model = config.build()
    output = model.apply(params, batch)
    classes = model.class_logits(params, output.hidden)[:, 0]
    np.testing.assert_allclose(classes, out.seq_relationship_logits.detach(), atol=1e-4)
    loss = torch.nn.functional.cross_entropy(out.seq_relationship_logits, torch.tensor([0, 1]), reduction="sum")
    np.testing.assert_allclose(output.losses["labels"].sum, loss.detach(), rtol=1e-5)
    assert float(output.losses["labels"].weight) == 2


def test_albert(make_batch):
    hf = randomized(
        transformers.AlbertForMaskedLM(
            transformers.AlbertConfig(
                vocab_size=50, embedding_size=16, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                intermediate_size=48, max_position_embeddings=64, attn_implementation="eager",
            )
        )
    )  # fmt: skip
    config = small(
        models.Encoder,
        norm=models.LayerNorm(epsilon=1e-12),
        norm_placement="post",
        positions=models.Learned(),
        attention=models.MultiHead(use_qkv_bias=True, use_output_bias=True),
        mlp=models.Mlp(activation="gelu_tanh", gated=False, use_bias=True),
        embedding_norm=True,
        embedding_dim=16,
        num_token_types=2,
        share_layers=True,
        head_transform=models.HeadTransform(activation="gelu_tanh"),
        head_bias=True,
    )
    w = Weights(hf, LAYERS)
    layer, embeddings = "albert.encoder.albert_layer_groups.0.albert_layers.0.", "albert.embeddings."
    block = {
        "attention": w.attention([layer + f"attention.{x}" for x in ("query", "key", "value", "dense")], bias=True),
        "attention_norm": w.norm(layer + "attention.LayerNorm", bias=True),
        "mlp": {"up": w.dense(layer + "ffn", bias=True), "down": w.dense(layer + "ffn_output", bias=True)},
        "mlp_norm": w.norm(layer + "full_layer_layer_norm", bias=True),
    }
    params = {
        "tokens": {"embedding": w.get(embeddings + "word_embeddings.weight")},
        "encoder": {
            "positions": {"embedding": w.get(embeddings + "position_embeddings.weight")},
            "types": {"embedding": w.get(embeddings + "token_type_embeddings.weight")},
            "embedding_norm": w.norm(embeddings + "LayerNorm", bias=True),
            "embedding_projection": w.dense("albert.encoder.embedding_hidden_mapping_in", bias=True),
            "stack": {"layers": {"block_0": block}},
        },
        "head": {
            "dense": w.dense("predictions.dense", bias=True),
            "norm": w.norm("predictions.LayerNorm", bias=True),
            "bias": w.get("predictions.bias"),
        },
    }
    batch = make_batch([[10], [7]])
    check(config, params, batch, hf(ids(batch.inputs), attention_mask=ids(batch.segment_ids)).logits)


def test_modernbert(make_batch):
    hf_config = transformers.ModernBertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64, local_attention=4, global_attn_every_n_layers=3, attn_implementation="eager",
        pad_token_id=0, reference_compile=False,
    )  # fmt: skip
    hf = randomized(transformers.ModernBertForMaskedLM(hf_config))
    local = models.Layer(window=4, positions=models.Rotary(theta=10_000.0))
    everywhere = models.Layer(positions=models.Rotary(theta=160_000.0))
    config = dataclasses.replace(
        small(
            models.Encoder,
            norm=models.LayerNorm(use_bias=False),
            mlp=models.Mlp(activation="gelu", gated=True),
            embedding_norm=True,
            head_transform=models.HeadTransform(use_bias=False),
            head_bias=True,
            layers=(local, local, everywhere),
            first_layers=(dataclasses.replace(everywhere, normalize_attention=False),),
        ),
        num_layers=4,
    )

    def block(number):
        w = Weights(hf, [number])
        layer = "model.layers.{}."

        def part(name, width, number, *shape):
            def cut(x):
                return x.T[:, number * width : (number + 1) * width].reshape(32, *shape)

            return {"kernel": w.get(f"{layer}{name}.weight", cut)}

        qkv = [part("attn.Wqkv", 32, number, 4, 8) for number in range(3)]
        up, gate = (part("mlp.Wi", 48, number, 48) for number in (1, 0))
        norms = {"attention_norm": w.norm(layer + "attn_norm")} if number else {}
        return norms | {
            "attention": {
                "query": qkv[0], "key": qkv[1], "value": qkv[2], "out": w.dense(layer + "attn.Wo", (4, 8, 32)),
            },
            "mlp_norm": w.norm(layer + "mlp_norm"),
            "mlp": {"gate": gate, "up": up, "down": w.dense(layer + "mlp.Wo")},
        }  # fmt: skip

    w = Weights(hf, [])
    params = {
        "tokens": {"embedding": w.get("model.embeddings.tok_embeddings.weight")},
        "encoder": {
            "embedding_norm": w.norm("model.embeddings.norm"),
            "stack": {
                "first": {"block_0": block(0)},
                "layers": {f"block_{i}": block(i + 1) for i in range(3)},
            },
            "final_norm": w.norm("model.final_norm"),
        },
        "head": {"dense": w.dense("head.dense"), "norm": w.norm("head.norm"), "bias": w.get("decoder.bias")},
    }
    batch = make_batch([[12], [9]])
    check(config, params, batch, hf(ids(batch.inputs), attention_mask=ids(batch.segment_ids)).logits)


def t5_tower(w, name, layers, gated):
    block = f"{name}.block.{{}}.layer."
    last = 1 if name == "encoder" else 2

    def attend(kind, number):
        return w.attention([f"{block}{number}.{kind}.{x}" for x in "qkvo"])

    mlp = ("wi_0", "wi_1", "wo") if gated else ("wi", "wo")
    ours = ("gate", "up", "down") if gated else ("up", "down")
    parts = {
        "attention_norm": w.norm(f"{block}0.layer_norm"),
        "attention": attend("SelfAttention", 0),
        "mlp_norm": w.norm(f"{block}{last}.layer_norm"),
        "mlp": {a: w.dense(f"{block}{last}.DenseReluDense.{b}") for a, b in zip(ours, mlp, strict=True)},
    }
    if name == "decoder":
        parts |= {"cross_norm": w.norm(f"{block}1.layer_norm"), "cross": attend("EncDecAttention", 1)}
    table = w.get(f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight")
    return {
        "stack": {"relative_bias": {"embedding": table}, "layers": {"block_0": parts}},
        "final_norm": w.norm(f"{name}.final_layer_norm"),
    }


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_t5(make_batch, version):
    gated = version == "1.1"
    hf = randomized(
        transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, relative_attention_num_buckets=8,
                relative_attention_max_distance=20, feed_forward_proj="gated-gelu" if gated else "relu",
                tie_word_embeddings=not gated, dropout_rate=0.0,
            )
        )
    )  # fmt: skip
    config = small(
        models.EncoderDecoder,
        positions=models.Bucketed(num_buckets=8, max_distance=20),
        attention=models.MultiHead(scale=1.0),
        mlp=models.Mlp(activation="gelu_tanh" if gated else "relu", gated=gated),
        tied_embeddings=not gated,
        scale_logits=not gated,
    )
    w = Weights(hf, LAYERS)
    params = {"tokens": {"embedding": w.get("shared.weight")}}
    params |= {name: t5_tower(w, name, LAYERS, gated) for name in ("encoder", "decoder")}
    if gated:
        params["head"] = {"projection": w.dense("lm_head")}
    batch = make_batch([[9], [12]], encoder=[[14], [11]])
    out = hf(
        ids(batch.encoder_inputs),
        attention_mask=ids(batch.encoder_segment_ids),
        decoder_input_ids=ids(batch.inputs),
    )
    check(config, params, batch, out.logits)


def test_bart(make_batch):
    hf = randomized(
        transformers.BartForConditionalGeneration(
            transformers.BartConfig(
                vocab_size=50, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
                decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64,
                attn_implementation="eager",
            )
        )
    )  # fmt: skip
    config = small(
        models.EncoderDecoder,
        norm=models.LayerNorm(),
        norm_placement="post",
        positions=models.Learned(offset=2),
        attention=models.MultiHead(use_qkv_bias=True, use_output_bias=True),
        mlp=models.Mlp(activation="gelu", gated=False, use_bias=True),
        embedding_norm=True,
        head_bias=True,
    )
    w = Weights(hf, LAYERS)

    def tower(name):
        layer = f"model.{name}.layers.{{}}."

        def attend(kind):
            return w.attention([f"{layer}{kind}.{x}_proj" for x in ("q", "k", "v", "out")], bias=True)

        parts = {
            "attention": attend("self_attn"),
            "attention_norm": w.norm(layer + "self_attn_layer_norm", bias=True),
            "mlp": {"up": w.dense(layer + "fc1", bias=True), "down": w.dense(layer + "fc2", bias=True)},
            "mlp_norm": w.norm(layer + "final_layer_norm", bias=True),
        }
        if name == "decoder":
            parts |= {
                "cross": attend("encoder_attn"),
                "cross_norm": w.norm(layer + "encoder_attn_layer_norm", bias=True),
            }
        return {
            "positions": {"embedding": w.get(f"model.{name}.embed_positions.weight")},
            "embedding_norm": w.norm(f"model.{name}.layernorm_embedding", bias=True),
            "stack": {"layers": {"block_0": parts}},
        }

    params = {
        "tokens": {"embedding": w.get("model.shared.weight")},
        "encoder": tower("encoder"),
        "decoder": tower("decoder"),
        "head": {"bias": w.get("final_logits_bias", lambda x: x[0])},
    }
    batch = make_batch([[9], [12]], encoder=[[14], [11]])
    out = hf(
        ids(batch.encoder_inputs), attention_mask=ids(batch.encoder_segment_ids), decoder_input_ids=ids(batch.inputs)
    )
    check(config, params, batch, out.logits)


# Decoders, all in Llama's naming.

LLAMA_NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}


def llama_block(w, norms, *, kv_heads=2, head_dim=None, bias=False, qk_norm=False):
    layer = "model.layers.{}."
    names = [layer + f"self_attn.{x}_proj" for x in "qkvo"]
    attention = w.attention(names, kv_heads=kv_heads, head_dim=head_dim, bias=bias, output_bias=False)
    if qk_norm:
        attention |= {
            "query_norm": w.norm(layer + "self_attn.q_norm"),
            "key_norm": w.norm(layer + "self_attn.k_norm"),
        }
    return {name: w.norm(layer + theirs) for name, theirs in norms.items()} | {
        "attention": attention,
        "mlp": {name: w.dense(layer + f"mlp.{name}_proj") for name in ("gate", "up", "down")},
    }


def llama_params(hf, runs, tied=True):
    """`runs` maps the names of runs to their blocks."""
    w = Weights(hf, [])
    params = {
        "tokens": {"embedding": w.get("model.embed_tokens.weight")},
        "decoder": {"stack": runs, "final_norm": w.norm("model.norm")},
    }
    return params if tied else params | {"head": {"projection": w.dense("lm_head")}}


COMMON = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
}


def run_padded(hf, make_batch, config, params):
    batch = make_batch([[13], [9]])
    check(config, params, batch, hf(ids(batch.inputs), attention_mask=ids(batch.segment_ids)).logits)


def test_mistral(make_batch):
    hf = randomized(
        transformers.MistralForCausalLM(
            transformers.MistralConfig(
                **COMMON, num_hidden_layers=2, sliding_window=4, head_dim=8,
                rope_parameters={"rope_type": "default", "rope_theta": 500.0},
            )
        )
    )  # fmt: skip
    config = small(
        models.Decoder,
        num_kv_heads=2,
        positions=models.Rotary(theta=500.0),
        tied_embeddings=False,
        layers=(models.Layer(window=4),),
    )
    block = llama_block(Weights(hf, LAYERS), LLAMA_NORMS)
    run_padded(hf, make_batch, config, llama_params(hf, {"layers": {"block_0": block}}, tied=False))


def test_qwen2(make_batch):
    hf = randomized(transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**COMMON, num_hidden_layers=2)))
    config = small(models.Decoder, num_kv_heads=2, tied_embeddings=False, attention=models.MultiHead(use_qkv_bias=True))
    block = llama_block(Weights(hf, LAYERS), LLAMA_NORMS, bias=True)
    run_padded(hf, make_batch, config, llama_params(hf, {"layers": {"block_0": block}}, tied=False))


def test_qwen3(make_batch):
    hf = randomized(transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**COMMON, num_hidden_layers=2, head_dim=12)))
    config = small(
        models.Decoder,
        num_kv_heads=2,
        head_dim=12,
        tied_embeddings=False,
        attention=models.MultiHead(qk_norm="head"),
    )
    block = llama_block(Weights(hf, LAYERS), LLAMA_NORMS, head_dim=12, qk_norm=True)
    run_padded(hf, make_batch, config, llama_params(hf, {"layers": {"block_0": block}}, tied=False))


def test_olmo2(make_batch):
    hf = randomized(
        transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**COMMON, num_hidden_layers=2, rms_norm_eps=1e-6))
    )
    config = small(
        models.Decoder,
        num_kv_heads=2,
        norm_placement="branch",
        tied_embeddings=False,
        attention=models.MultiHead(qk_norm="all"),
    )
    norms = {"attention_output_norm": "post_attention_layernorm", "mlp_output_norm": "post_feedforward_layernorm"}
    block = llama_block(Weights(hf, LAYERS), norms, qk_norm=True)
    for name, heads in (("query_norm", 4), ("key_norm", 2)):
        block["attention"][name] = {"scale": block["attention"][name]["scale"].reshape(2, heads, 8)}
    run_padded(hf, make_batch, config, llama_params(hf, {"layers": {"block_0": block}}, tied=False))


GEMMA_NORMS = {
    "attention_norm": "input_layernorm",
    "attention_output_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_output_norm": "post_feedforward_layernorm",
}
GEMMA = {
    "num_kv_heads": 2,
    "head_dim": 8,
    "norm": models.RMSNorm(zero_centered=True),
    "norm_placement": "sandwich",
    "mlp": models.Mlp(activation="gelu_tanh", gated=True),
    "scale_embeddings": True,
}


def test_gemma2(make_batch):
    hf = randomized(
        transformers.Gemma2ForCausalLM(
            transformers.Gemma2Config(
                **COMMON, num_hidden_layers=2, head_dim=8, sliding_window=4, query_pre_attn_scalar=16,
                attn_logit_softcapping=2.0, final_logit_softcapping=3.0,
            )
        )
    )  # fmt: skip
    config = small(
        models.Decoder,
        **GEMMA,
        attention=models.MultiHead(scale=16**-0.5, logit_softcap=2.0),
        final_logit_softcap=3.0,
        layers=(models.Layer(window=4), models.Layer()),
    )
    blocks = {f"block_{i}": llama_block(Weights(hf, [i]), GEMMA_NORMS) for i in range(2)}
    run_padded(hf, make_batch, config, llama_params(hf, {"layers": blocks}))


def test_gemma3(make_batch):
    """Five layers in a pattern of three: two repeats do not fit, and the rest stands at the end."""
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
    rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
    }
    hf = randomized(
        transformers.Gemma3ForCausalLM(
            transformers.Gemma3TextConfig(
                **COMMON, num_hidden_layers=5, head_dim=8, sliding_window=4, query_pre_attn_scalar=8, layer_types=kinds,
                rope_parameters=rope,
            )
        )
    )  # fmt: skip
    local = models.Layer(window=4, positions=models.Rotary(theta=100.0))
    config = dataclasses.replace(
        small(
            models.Decoder,
            **GEMMA,
            attention=models.MultiHead(qk_norm="head"),
            positions=models.Rotary(theta=1000.0, scaling=models.LinearScaling(factor=8.0)),
            layers=(local, local, models.Layer()),
        ),
        num_layers=5,
    )

    def blocks(numbers):
        return {
            f"block_{i}": llama_block(Weights(hf, [number]), GEMMA_NORMS, qk_norm=True)
            for i, number in enumerate(numbers)
        }

    run_padded(hf, make_batch, config, llama_params(hf, {"layers": blocks([0, 1, 2]), "last": blocks([3, 4])}))


def test_deepseek(make_batch):
    """DeepSeek-V3's attention, all layers dense; its checkpoints interleave rotated channels, ours are halves."""
    hf = randomized(
        transformers.DeepseekV3ForCausalLM(
            transformers.DeepseekV3Config(
                vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
                intermediate_size=48, max_position_embeddings=64, q_lora_rank=12, kv_lora_rank=16, qk_rope_head_dim=4,
                qk_nope_head_dim=6, v_head_dim=10, first_k_dense_replace=2, attn_implementation="eager",
            )
        )
    )  # fmt: skip
    config = small(
        models.Decoder,
        attention=models.Latent(query_rank=12, kv_rank=16, nope_dim=6, rotary_dim=4, value_dim=10),
        tied_embeddings=False,
    )
    w = Weights(hf, LAYERS)
    layer = "model.layers.{}."
    attention = layer + "self_attn."
    halves = jnp.asarray([0, 2, 1, 3])

    def query_up(x):
        x = x.T.reshape(12, 4, 10)
        return jnp.concatenate([x[..., :6], x[..., 6:][..., halves]], axis=-1)

    def kv_up(part):
        return lambda x: x.T.reshape(16, 4, 16)[..., part]

    block = {name: w.norm(layer + theirs) for name, theirs in LLAMA_NORMS.items()} | {
        "attention": {
            "query_down": w.dense(attention + "q_a_proj"),
            "query_norm": w.norm(attention + "q_a_layernorm"),
            "query_up": {"kernel": w.get(attention + "q_b_proj.weight", query_up)},
            "kv_down": {"kernel": w.get(attention + "kv_a_proj_with_mqa.weight", lambda x: x.T[:, :16])},
            "key_rotary": {"kernel": w.get(attention + "kv_a_proj_with_mqa.weight", lambda x: x.T[:, 16:][:, halves])},
            "kv_norm": w.norm(attention + "kv_a_layernorm"),
            "key_up": {"kernel": w.get(attention + "kv_b_proj.weight", kv_up(slice(0, 6)))},
            "value_up": {"kernel": w.get(attention + "kv_b_proj.weight", kv_up(slice(6, 16)))},
            "out": w.dense(attention + "o_proj", (4, 10, 32)),
        },
        "mlp": {name: w.dense(layer + f"mlp.{name}_proj") for name in ("gate", "up", "down")},
    }
    run_padded(hf, make_batch, config, llama_params(hf, {"layers": {"block_0": block}}, tied=False))


def test_bloom(make_batch):
    """ALiBi, with a number of heads that is no power of two."""
    hf = randomized(
        transformers.BloomForCausalLM(
            transformers.BloomConfig(vocab_size=50, hidden_size=36, n_layer=2, n_head=6, attn_implementation="eager")
        )
    )
    config = models.Decoder(
        vocab_size=50,
        num_layers=2,
        model_dim=36,
        num_heads=6,
        mlp_dim=144,
        norm=models.LayerNorm(),
        positions=models.Alibi(),
        attention=models.MultiHead(use_qkv_bias=True, use_output_bias=True),
        mlp=models.Mlp(activation="gelu_tanh", gated=False, use_bias=True),
        embedding_norm=True,
    )
    w = Weights(hf, LAYERS, "transformer.")

    def qkv(number):
        def kernel(x):
            return x.reshape(6, 3, 6, 36)[:, number].transpose(2, 0, 1)

        return {
            "kernel": w.get("h.{}.self_attention.query_key_value.weight", kernel),
            "bias": w.get("h.{}.self_attention.query_key_value.bias", lambda x: x.reshape(6, 3, 6)[:, number]),
        }

    block = {
        "attention_norm": w.norm("h.{}.input_layernorm", bias=True),
        "attention": {
            "query": qkv(0),
            "key": qkv(1),
            "value": qkv(2),
            "out": w.dense("h.{}.self_attention.dense", (6, 6, 36), bias=True),
        },
        "mlp_norm": w.norm("h.{}.post_attention_layernorm", bias=True),
        "mlp": {
            "up": w.dense("h.{}.mlp.dense_h_to_4h", bias=True),
            "down": w.dense("h.{}.mlp.dense_4h_to_h", bias=True),
        },
    }
    params = {
        "tokens": {"embedding": w.get("word_embeddings.weight")},
        "decoder": {
            "embedding_norm": w.norm("word_embeddings_layernorm", bias=True),
            "stack": {"layers": {"block_0": block}},
            "final_norm": w.norm("ln_f", bias=True),
        },
    }
    run_padded(hf, make_batch, config, params)


def test_gptj(make_batch):
    """The parallel block (PaLM's, here with biases), half of each head rotated, an output projection with a bias."""
    hf = randomized(
        transformers.GPTJForCausalLM(
            transformers.GPTJConfig(
                vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4, attn_implementation="eager"
            )
        )
    )
    config = models.Decoder(
        vocab_size=50,
        num_layers=2,
        model_dim=32,
        num_heads=4,
        mlp_dim=128,
        norm=models.LayerNorm(),
        positions=models.Rotary(fraction=0.5),
        mlp=models.Mlp(activation="gelu_tanh", gated=False, use_bias=True),
        parallel_block=True,
        tied_embeddings=False,
        head_bias=True,
    )
    w = Weights(hf, LAYERS, "transformer.")
    halves = jnp.asarray([0, 2, 1, 3, 4, 5, 6, 7])  # The checkpoint interleaves what we hold in halves.

    def rotated(name):
        return {"kernel": w.get(f"h.{{}}.attn.{name}.weight", lambda x: x.T.reshape(32, 4, 8)[..., halves])}

    block = {
        "attention_norm": w.norm("h.{}.ln_1", bias=True),
        "attention": {
            "query": rotated("q_proj"),
            "key": rotated("k_proj"),
            "value": w.dense("h.{}.attn.v_proj", (32, 4, 8)),
            "out": w.dense("h.{}.attn.out_proj", (4, 8, 32)),
        },
        "mlp": {"up": w.dense("h.{}.mlp.fc_in", bias=True), "down": w.dense("h.{}.mlp.fc_out", bias=True)},
    }
    head = Weights(hf, [])
    params = {
        "tokens": {"embedding": w.get("wte.weight")},
        "decoder": {"stack": {"layers": {"block_0": block}}, "final_norm": w.norm("ln_f", bias=True)},
        "head": {"projection": head.dense("lm_head"), "bias": head.get("lm_head.bias")},
    }
    run_padded(hf, make_batch, config, params)
