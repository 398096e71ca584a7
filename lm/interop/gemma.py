"""Gemma 1, 2 and 3 (text): scaled embeddings, zero-centred RMSNorm, GeGLU; 2 and 3 alternate windows.

Gemma 2 soft-caps scores and logits; Gemma 3 normalises queries and keys and rotates local layers with
another base.
"""

import dataclasses
from typing import Any

from lm.interop.family import Config, Family, Fields, fold_layers, norm
from lm.interop.llama import ATTENTION, EMBEDDINGS, IGNORED, LAYER, NORMS, OURS, mlp_rows, read_decoder, write_decoder
from lm.interop.meaning import positions_of, unfold_layers
from lm.interop.rotary import read_rotary, write_rotary
from lm.models import Decoder, Layer, Mlp, MultiHead, RMSNorm, Rotary

SANDWICH = (
    *norm(f"{LAYER}.input_layernorm", f"{OURS}/attention_norm"),
    *norm(f"{LAYER}.post_attention_layernorm", f"{OURS}/attention_output_norm"),
    *norm(f"{LAYER}.pre_feedforward_layernorm", f"{OURS}/mlp_norm"),
    *norm(f"{LAYER}.post_feedforward_layernorm", f"{OURS}/mlp_output_norm"),
)
ACTIVATIONS = {"gelu": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "silu": "silu", "relu": "relu"}


def _read(config: Config, attention: MultiHead, **changes: Any) -> Decoder:
    bias = config.get("attention_bias", False)
    attention = dataclasses.replace(attention, use_qkv_bias=bias, use_output_bias=bias)
    # Gemma 1 says "gelu" and means the approximation, as its `hidden_activation` says.
    name = "hidden_activation" if config.get("hidden_activation") else "hidden_act"
    settings: Fields = {
        "head_dim": config.get("head_dim", 256),
        "norm": RMSNorm(epsilon=config.get("rms_norm_eps", 1e-6), zero_centered=True),
        "mlp": Mlp(activation=config.choose(name, ACTIVATIONS, "gelu_pytorch_tanh"), gated=True),
        "tied_embeddings": config.get("tie_word_embeddings", True),
        "scale_embeddings": True,
        "final_logit_softcap": config.get("final_logit_softcapping"),
    }
    return read_decoder(config, attention, **settings | changes)


def _write(config: Any) -> Fields | None:
    fields = write_decoder(config)
    if fields is None or not isinstance(config.mlp, Mlp):
        return None
    activation = {"gelu_tanh": "gelu_pytorch_tanh"}.get(config.mlp.activation, config.mlp.activation)
    return {
        **fields,
        "hidden_act": activation,
        "hidden_activation": activation,
        "attention_bias": config.attention.use_qkv_bias,
    }


def _scale(config: Config) -> float:
    return config.get("query_pre_attn_scalar", 256) ** -0.5


def _read_layers(config: Config, period: int, local: Layer, full: Layer) -> dict[str, tuple[Layer, ...]]:
    """Returns the layers from `layer_types`; without it, every `period`-th is full."""
    count = config["num_hidden_layers"]
    default = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(count)]
    known = {"full_attention": full, "sliding_attention": local}
    kinds = config.get("layer_types", default)
    if len(kinds) != count or any(kind not in known for kind in kinds):
        raise config.refuse("layer_types", f"known are {count} of {', '.join(known)}")
    return fold_layers([known[kind] for kind in kinds])


def _read_gemma2(config: Config) -> Decoder:
    attention = MultiHead(scale=_scale(config), logit_softcap=config.get("attn_logit_softcapping"))
    layers = _read_layers(config, 2, Layer(window=config["sliding_window"]), Layer())
    return _read(config, attention, norm_placement="sandwich", **layers)


def _write_gemma2(config: Any) -> Fields | None:
    fields = _write(config)
    if fields is None:
        return None
    windows = [layer.window for layer in unfold_layers(config, config.num_layers)]
    return {
        **fields,
        "query_pre_attn_scalar": _scalar(config),
        "attn_logit_softcapping": config.attention.logit_softcap,
        "final_logit_softcapping": config.final_logit_softcap,
        "sliding_window": next((window for window in windows if window is not None), 4096),
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
    }


def _scalar(config: Any) -> float:
    """Returns the number whose inverse square root multiplies the scores; whole where it is close to one."""
    exact = config.sizes["H"] if config.attention.scale is None else config.attention.scale**-2
    return round(exact) if abs(exact - round(exact)) < 1e-6 * exact else exact


def _read_gemma3(config: Config) -> Decoder:
    config.expect("use_bidirectional_attention", False)
    parameters = config.get("rope_parameters") or {}
    local_theta = config.get("rope_local_base_freq", 10_000.0)
    local = Rotary(theta=float(local_theta))
    if "sliding_attention" in parameters:
        local = read_rotary(config, "sliding_attention", local_theta)
    attention = MultiHead(scale=_scale(config), qk_norm="head", logit_softcap=config.get("attn_logit_softcapping"))
    layers = _read_layers(
        config,
        config.get("sliding_window_pattern", config.get("_sliding_window_pattern", 6)),
        Layer(window=config["sliding_window"], positions=local),
        Layer(),
    )
    positions = read_rotary(config, "full_attention", 1_000_000.0)
    return _read(config, attention, norm_placement="sandwich", positions=positions, **layers)


def _write_gemma3(config: Any) -> Fields | None:
    fields = _write_gemma2(config)
    if fields is None:
        return None
    full, local = (positions_of(config, windowed=windowed) for windowed in (False, True))
    if not isinstance(full, Rotary) or not isinstance(local, Rotary):
        return None
    return {**fields, **write_rotary(full), "rope_local_base_freq": local.theta}


GEMMA = Family(
    model_type="gemma",
    architecture="GemmaForCausalLM",
    rows=(*EMBEDDINGS, *NORMS, *ATTENTION, *mlp_rows()),
    read=lambda config: _read(config, MultiHead()),
    write=_write,
    prefix="model.",
    ignored=IGNORED,
)
GEMMA2 = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    rows=(*EMBEDDINGS, *SANDWICH, *ATTENTION, *mlp_rows()),
    read=_read_gemma2,
    write=_write_gemma2,
    prefix="model.",
    ignored=IGNORED,
)
GEMMA3 = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    rows=(*EMBEDDINGS, *SANDWICH, *ATTENTION, *mlp_rows()),
    read=_read_gemma3,
    write=_write_gemma3,
    prefix="model.",
    ignored=IGNORED,
)
