"""Llama 2 and 3, Mistral, Qwen2 and Qwen3: RMSNorm before each branch, rotary positions, SwiGLU.

They share a table of tensors and differ in a few fields of config.json: where biases are, whether
queries and keys are normalised, and which layers have a window.
"""

import dataclasses
from typing import Any

from lm.interop.family import Config, Family, Fields, Row, attention, fold_layers, linear, norm, row
from lm.interop.meaning import unfold_layers
from lm.interop.rotary import read_rotary, write_rotary
from lm.models import Decoder, Layer, Mlp, MultiHead, RMSNorm, Rotary

LAYER, OURS = "model.layers.{layer}", "decoder/stack/{layer}"
EMBEDDINGS = (
    row("model.embed_tokens.weight", "tokens/embedding"),
    *norm("model.norm", "decoder/final_norm"),
    row("lm_head.weight", "head/projection/kernel", equation="V D -> D V"),
)
ATTENTION = (
    *attention(f"{LAYER}.self_attn", f"{OURS}/attention", "q_proj", "k_proj", "v_proj", "o_proj"),
    *norm(f"{LAYER}.self_attn.q_norm", f"{OURS}/attention/query_norm"),
    *norm(f"{LAYER}.self_attn.k_norm", f"{OURS}/attention/key_norm"),
)
NORMS = (
    *norm(f"{LAYER}.input_layernorm", f"{OURS}/attention_norm"),
    *norm(f"{LAYER}.post_attention_layernorm", f"{OURS}/mlp_norm"),
)


def mlp_rows(theirs: str = f"{LAYER}.mlp", ours: str = f"{OURS}/mlp") -> tuple[Row, ...]:
    """Returns the table of a gated feed-forward layer; also used by the families with experts."""
    names = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
    return tuple(each for a, b in names.items() for each in linear(f"{theirs}.{a}", f"{ours}/{b}"))


ROWS = (*EMBEDDINGS, *NORMS, *ATTENTION, *mlp_rows())
IGNORED = (r"rotary_emb\.inv_freq$", r"^lm_head\.weight$")
ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}


def read_decoder(config: Config, heads: MultiHead, **changes: Any) -> Decoder:
    """Makes the config that these families share."""
    mlp = Mlp(
        activation=config.choose("hidden_act", ACTIVATIONS, "silu"), gated=True, use_bias=config.get("mlp_bias", False)
    )
    settings: Fields = {
        "vocab_size": config["vocab_size"],
        "num_layers": config["num_hidden_layers"],
        "model_dim": config["hidden_size"],
        "num_heads": config["num_attention_heads"],
        "num_kv_heads": config.get("num_key_value_heads", config["num_attention_heads"]),
        "head_dim": config.get("head_dim", config["hidden_size"] // config["num_attention_heads"]),
        "mlp_dim": config["intermediate_size"],
        "max_length": config["max_position_embeddings"],
        "norm": RMSNorm(epsilon=config.get("rms_norm_eps", 1e-6)),
        "positions": read_rotary(config),
        "attention": dataclasses.replace(heads, dropout_rate=config.get("attention_dropout", 0.0)),
        "mlp": mlp,
        "tied_embeddings": config.get("tie_word_embeddings", False),
    }
    return Decoder(**settings | changes)


def write_decoder(config: Any) -> Fields | None:
    """Makes the fields that these families share; None without RMSNorm or rotary positions."""
    if not isinstance(config, Decoder) or not isinstance(config.norm, RMSNorm):
        return None
    if not isinstance(config.positions, Rotary) or not isinstance(config.attention, MultiHead):
        return None
    activation = getattr(config.mlp, "activation", None)
    names: dict[Any, str] = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    return {
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.model_dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.sizes["K"],
        "head_dim": config.sizes["H"],
        "intermediate_size": config.mlp_dim,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm.epsilon,
        "hidden_act": names.get(activation),
        "tie_word_embeddings": config.tied_embeddings,
        "attention_dropout": config.attention.dropout_rate,
        **write_rotary(config.positions),
    }


def _read_llama(config: Config) -> Decoder:
    bias = config.get("attention_bias", False)
    return read_decoder(config, MultiHead(use_qkv_bias=bias, use_output_bias=bias))


def _write_llama(config: Any) -> Fields | None:
    fields = write_decoder(config)
    if fields is None or not isinstance(config.mlp, Mlp):
        return None
    return {**fields, "attention_bias": config.attention.use_qkv_bias, "mlp_bias": config.mlp.use_bias}


def _read_mistral(config: Config) -> Decoder:
    return read_decoder(config, MultiHead(), layers=(Layer(window=config.get("sliding_window")),))


def _write_mistral(config: Any) -> Fields | None:
    fields = write_decoder(config)
    return None if fields is None else {**fields, "sliding_window": config.layers[0].window}


def read_windows(config: Config) -> list[Layer]:
    """Returns the layers of Qwen: from `layer_types`, or full up to max_window_layers and with a window after."""
    count, window = config["num_hidden_layers"], config.get("sliding_window")
    if not config.get("use_sliding_window", False):
        return [Layer()] * count
    kinds = config.get("layer_types")
    if kinds is None:
        first = config.get("max_window_layers", 28)
        return [Layer(window=window if i >= first else None) for i in range(count)]
    known = {"full_attention": None, "sliding_attention": window}
    if any(kind not in known for kind in kinds):
        raise config.refuse("layer_types", f"known are {', '.join(known)}")
    return [Layer(window=known[kind]) for kind in kinds]


def write_windows(config: Any) -> Fields:
    """Returns Qwen's fields of the windows; of several sizes only the first is written."""
    windows = [layer.window for layer in unfold_layers(config, config.num_layers)]
    sizes = [window for window in windows if window is not None]
    return {
        "use_sliding_window": bool(sizes),
        "sliding_window": sizes[0] if sizes else None,
        "max_window_layers": next((i for i, window in enumerate(windows) if window is not None), len(windows)),
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
    }


def _read_qwen2(config: Config) -> Decoder:
    return read_decoder(config, MultiHead(use_qkv_bias=True), **fold_layers(read_windows(config)))


def _read_qwen3(config: Config) -> Decoder:
    bias = config.get("attention_bias", False)
    heads = MultiHead(use_qkv_bias=bias, use_output_bias=bias, qk_norm="head")
    return read_decoder(config, heads, **fold_layers(read_windows(config)))


def _write_qwen2(config: Any) -> Fields | None:
    fields = write_decoder(config)
    return None if fields is None else {**fields, **write_windows(config)}


def _write_qwen3(config: Any) -> Fields | None:
    fields = _write_qwen2(config)
    return None if fields is None else {**fields, "attention_bias": config.attention.use_qkv_bias}


def _family(model_type: str, architecture: str, read: Any, write: Any) -> Family:
    return Family(
        model_type=model_type, architecture=architecture, rows=ROWS, read=read, write=write, prefix="model.",
        ignored=IGNORED,
    )  # fmt: skip


LLAMA = _family("llama", "LlamaForCausalLM", _read_llama, _write_llama)
MISTRAL = _family("mistral", "MistralForCausalLM", _read_mistral, _write_mistral)
QWEN2 = _family("qwen2", "Qwen2ForCausalLM", _read_qwen2, _write_qwen2)
QWEN3 = _family("qwen3", "Qwen3ForCausalLM", _read_qwen3, _write_qwen3)
