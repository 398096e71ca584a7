"""Mixtral, Qwen2-MoE and Qwen3-MoE: the attention of Llama and its kin, and a mixture of experts.

Every expert's matrices are tensors of their own in a checkpoint and slices of one leaf here.
"""

from typing import Any

from lm.interop.family import Config, Family, Fields, Row, fold_layers, row
from lm.interop.llama import (
    ATTENTION,
    EMBEDDINGS,
    IGNORED,
    LAYER,
    NORMS,
    OURS,
    mlp_rows,
    read_decoder,
    write_decoder,
)
from lm.interop.meaning import unfold_layers
from lm.models import Decoder, Layer, MixtureOfExperts, Mlp, MultiHead, Router, SharedExpert


def expert_rows(theirs: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    """Returns the table of the experts; also DeepSeek's."""
    names = {"gate": gate, "up": up, "down": down}
    return tuple(
        row(f"{theirs}.{{expert}}.{name}.weight", f"{OURS}/mlp/experts/{part}/kernel", equation="Y X -> X Y")
        for part, name in names.items()
    )


ROUTER = row(f"{LAYER}.mlp.gate.weight", f"{OURS}/mlp/router/kernel", equation="E D -> D E")
MIXTRAL_ROWS = (
    *(*EMBEDDINGS, *NORMS, *ATTENTION),
    row(f"{LAYER}.block_sparse_moe.gate.weight", f"{OURS}/mlp/router/kernel", equation="E D -> D E"),
    *expert_rows(f"{LAYER}.block_sparse_moe.experts", "w1", "w3", "w2"),
)
QWEN_ROWS = (
    *(*EMBEDDINGS, *NORMS, *ATTENTION, *mlp_rows(), ROUTER),
    *expert_rows(f"{LAYER}.mlp.experts", "gate_proj", "up_proj", "down_proj"),
    *mlp_rows(f"{LAYER}.mlp.shared_expert", f"{OURS}/mlp/shared"),
    row(f"{LAYER}.mlp.shared_expert_gate.weight", f"{OURS}/mlp/shared_gate/kernel", equation="A1 D -> (A D)"),
)


def find_mixture(config: Any) -> MixtureOfExperts | None:
    """Returns the settings of the first layer with experts; None if there is none."""
    each = (layer.mlp or config.mlp for layer in unfold_layers(config, config.num_layers))
    return next((mlp for mlp in each if isinstance(mlp, MixtureOfExperts)), None)


def _read_mixtral(config: Config) -> Decoder:
    mixture = MixtureOfExperts(
        num_experts=config["num_local_experts"],
        num_selected=config["num_experts_per_tok"],
        router=Router(normalize=True, jitter=config.get("router_jitter_noise", 0.0)),
        load_balance=config.get("router_aux_loss_coef", 0.001),
    )
    return read_decoder(config, MultiHead(), layers=(Layer(window=config.get("sliding_window")),), mlp=mixture)


def _write_mixtral(config: Any) -> Fields | None:
    fields, mixture = write_decoder(config), find_mixture(config)
    if fields is None or mixture is None:
        return None
    return {
        **fields,
        "hidden_act": mixture.activation,
        "intermediate_size": mixture.dim or config.mlp_dim,
        "num_local_experts": mixture.num_experts,
        "num_experts_per_tok": mixture.num_selected,
        "router_aux_loss_coef": mixture.load_balance,
        "router_jitter_noise": mixture.router.jitter,
        "sliding_window": config.layers[0].window,
    }


def _read_qwen(config: Config, heads: MultiHead, shared: SharedExpert | None) -> Decoder:
    config.expect("use_sliding_window", False)
    mixture = MixtureOfExperts(
        num_experts=config.get("num_experts", config.get("num_local_experts")),
        num_selected=config["num_experts_per_tok"],
        dim=config["moe_intermediate_size"],
        router=Router(normalize=config.get("norm_topk_prob", False)),
        shared=shared,
        load_balance=config.get("router_aux_loss_coef", 0.001),
    )
    dense, step = Layer(mlp=Mlp()), config.get("decoder_sparse_step", 1)
    without = config.get("mlp_only_layers", [])
    layers = [
        Layer() if i not in without and (i + 1) % step == 0 else dense for i in range(config["num_hidden_layers"])
    ]
    config.expect("hidden_act", "silu")
    return read_decoder(config, heads, mlp=mixture, **fold_layers(layers))


def _write_qwen(config: Any) -> Fields | None:
    fields, mixture = write_decoder(config), find_mixture(config)
    if fields is None or mixture is None:
        return None
    layers = unfold_layers(config, config.num_layers)
    sparse = [isinstance(layer.mlp or config.mlp, MixtureOfExperts) for layer in layers]
    return {
        **fields,
        "hidden_act": mixture.activation,
        "num_experts": mixture.num_experts,
        "num_experts_per_tok": mixture.num_selected,
        "moe_intermediate_size": mixture.dim or config.mlp_dim,
        "norm_topk_prob": mixture.router.normalize,
        "router_aux_loss_coef": mixture.load_balance,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, is_sparse in enumerate(sparse) if not is_sparse],
        "use_sliding_window": False,
    }


def _read_qwen2(config: Config) -> Decoder:
    shared = SharedExpert(dim=config["shared_expert_intermediate_size"], gated=True)
    return _read_qwen(config, MultiHead(use_qkv_bias=config.get("qkv_bias", True)), shared)


def _write_qwen2(config: Any) -> Fields | None:
    fields, mixture = _write_qwen(config), find_mixture(config)
    if fields is None or mixture is None or mixture.shared is None:
        return None
    return {
        **fields,
        "shared_expert_intermediate_size": mixture.shared.dim,
        "qkv_bias": config.attention.use_qkv_bias,
    }


def _read_qwen3(config: Config) -> Decoder:
    bias = config.get("attention_bias", False)
    return _read_qwen(config, MultiHead(use_qkv_bias=bias, use_output_bias=bias, qk_norm="head"), None)


def _write_qwen3(config: Any) -> Fields | None:
    fields = _write_qwen(config)
    return None if fields is None else {**fields, "attention_bias": config.attention.use_qkv_bias}


MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    rows=MIXTRAL_ROWS,
    read=_read_mixtral,
    write=_write_mixtral,
    prefix="model.",
    ignored=IGNORED,
)
QWEN2_MOE = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    rows=QWEN_ROWS,
    read=_read_qwen2,
    write=_write_qwen2,
    prefix="model.",
    ignored=IGNORED,
)
QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    rows=QWEN_ROWS,
    read=_read_qwen3,
    write=_write_qwen3,
    prefix="model.",
    ignored=IGNORED,
)
