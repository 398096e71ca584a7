"""DeepSeek-V2 and V3: latent attention, shared and fine-grained experts, dense layers first.

Their rotated channels stand as pairs side by side; ours are half of them apart. V3's layers for
predicting further tokens are not part of the model and are left out.
"""

import math
from typing import Any

from lm.interop.experts import ROUTER, expert_rows, find_mixture
from lm.interop.family import Config, Family, Fields, fold_layers, linear, norm, row
from lm.interop.llama import EMBEDDINGS, IGNORED, LAYER, NORMS, OURS, mlp_rows
from lm.interop.meaning import unfold_layers
from lm.interop.rotary import read_rotary, write_rotary
from lm.models import (
    BiasBalancing,
    Decoder,
    ExpertGroups,
    Latent,
    Layer,
    MixtureOfExperts,
    Mlp,
    RMSNorm,
    Rotary,
    Router,
    SharedExpert,
    YarnScaling,
)

THEIRS, HEADS = f"{LAYER}.self_attn", f"{OURS}/attention"
ROWS = (
    *(*EMBEDDINGS, *NORMS, *mlp_rows(), ROUTER),
    row(
        f"{THEIRS}.q_proj.weight", f"{HEADS}/query/kernel", equation="(N H) D -> D N H", rotated=f"{HEADS}/query/kernel"
    ),
    *linear(f"{THEIRS}.q_a_proj", f"{HEADS}/query_down"),
    *norm(f"{THEIRS}.q_a_layernorm", f"{HEADS}/query_norm"),
    row(
        f"{THEIRS}.q_b_proj.weight",
        f"{HEADS}/query_up/kernel",
        equation="(N H) R -> R N H",
        rotated=f"{HEADS}/query_up/kernel",
    ),
    row(
        f"{THEIRS}.kv_a_proj_with_mqa.weight",
        *(f"{HEADS}/kv_down/kernel", f"{HEADS}/key_rotary/kernel"),
        equation="*R D -> D R",
        rotated=f"{HEADS}/key_rotary/kernel",
    ),
    *norm(f"{THEIRS}.kv_a_layernorm", f"{HEADS}/kv_norm"),
    row(
        f"{THEIRS}.kv_b_proj.weight",
        *(f"{HEADS}/key_up/kernel", f"{HEADS}/value_up/kernel"),
        equation="(N *H) R -> R N H",
    ),
    *linear(f"{THEIRS}.o_proj", f"{HEADS}/out", "D (N H) -> N H D"),
    row(f"{LAYER}.mlp.gate.e_score_correction_bias", f"{OURS}/mlp/router_bias"),
    *expert_rows(f"{LAYER}.mlp.experts", "gate_proj", "up_proj", "down_proj"),
    *mlp_rows(f"{LAYER}.mlp.shared_experts", f"{OURS}/mlp/shared"),
)


def _magnitude(factor: float, share: float) -> float:
    """Returns the factor by which YaRN lets scores grow (DeepSeek's `yarn_get_mscale`)."""
    return 0.1 * share * math.log(factor) + 1.0 if factor > 1 else 1.0


def _read(config: Config, router: Router) -> Decoder:
    for name in ("attention_bias", "mlp_bias"):
        config.expect(name, False)
    config.expect("moe_layer_freq", 1)
    config.expect("rope_interleave", True)
    config.expect("hidden_act", "silu")
    nope, rotated = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    scale, share = None, parameters.get("mscale_all_dim")
    if share and parameters.get("rope_type", parameters.get("type", "default")) != "default":
        scale = (nope + rotated) ** -0.5 * _magnitude(float(parameters["factor"]), share) ** 2
    moe_dim = config["moe_intermediate_size"]
    shared = config.get("n_shared_experts", 0)
    mixture = MixtureOfExperts(
        num_experts=config["n_routed_experts"],
        num_selected=config["num_experts_per_tok"],
        dim=moe_dim,
        router=router,
        shared=SharedExpert(dim=shared * moe_dim) if shared else None,
    )
    dense = min(config.get("first_k_dense_replace", 0), config["num_hidden_layers"])
    return Decoder(
        vocab_size=config["vocab_size"],
        num_layers=config["num_hidden_layers"],
        model_dim=config["hidden_size"],
        num_heads=config["num_attention_heads"],
        mlp_dim=config["intermediate_size"],
        max_length=config["max_position_embeddings"],
        norm=RMSNorm(epsilon=config.get("rms_norm_eps", 1e-6)),
        positions=read_rotary(config),
        attention=Latent(
            query_rank=config.get("q_lora_rank"),
            kv_rank=config["kv_lora_rank"],
            nope_dim=nope,
            rotary_dim=rotated,
            value_dim=config["v_head_dim"],
            scale=scale,
            dropout_rate=config.get("attention_dropout", 0.0),
        ),
        mlp=mixture,
        **fold_layers([Layer(mlp=Mlp())] * dense + [Layer()] * (config["num_hidden_layers"] - dense)),
        tied_embeddings=config.get("tie_word_embeddings", False),
    )


def _groups(config: Config, score: Any) -> ExpertGroups | None:
    if (config.get("n_group") or 1) == 1:
        return None
    return ExpertGroups(num_groups=config["n_group"], num_selected=config["topk_group"], score=score)


def _read_v2(config: Config) -> Decoder:
    config.expect("norm_topk_prob", False)
    limited = config.choose("topk_method", {"greedy": False, "group_limited_greedy": True}, "greedy")
    groups = _groups(config, "best") if limited else None
    return _read(config, Router(scale=float(config.get("routed_scaling_factor", 1.0)), groups=groups))


def _read_v3(config: Config) -> Decoder:
    config.expect("topk_method", "noaux_tc")
    config.expect("scoring_func", "sigmoid")
    router = Router(
        score="sigmoid",
        normalize=config.get("norm_topk_prob", True),
        scale=float(config.get("routed_scaling_factor", 2.5)),
        groups=_groups(config, "best_two"),
        balancing=BiasBalancing(),
    )
    return _read(config, router)


def _write(config: Any) -> Fields | None:
    mixture = find_mixture(config)
    if not isinstance(config, Decoder) or not isinstance(config.attention, Latent) or mixture is None:
        return None
    if not isinstance(config.positions, Rotary) or mixture.dim is None:
        return None
    heads, router, shared = config.attention, mixture.router, mixture.shared
    layers = unfold_layers(config, config.num_layers)
    dense = [not isinstance(layer.mlp or config.mlp, MixtureOfExperts) for layer in layers]
    return {
        **_write_rotary(config.positions, heads),
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.model_dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_heads,
        "intermediate_size": config.mlp_dim,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm.epsilon,
        "hidden_act": mixture.activation,
        "q_lora_rank": heads.query_rank,
        "kv_lora_rank": heads.kv_rank,
        "qk_nope_head_dim": heads.nope_dim,
        "qk_rope_head_dim": heads.rotary_dim,
        "v_head_dim": heads.value_dim,
        "attention_dropout": heads.dropout_rate,
        "n_routed_experts": mixture.num_experts,
        "num_experts_per_tok": mixture.num_selected,
        "moe_intermediate_size": mixture.dim,
        "n_shared_experts": 0 if shared is None else shared.dim // mixture.dim,
        "first_k_dense_replace": dense.index(False),
        "norm_topk_prob": router.normalize,
        "routed_scaling_factor": router.scale,
        "n_group": 1 if router.groups is None else router.groups.num_groups,
        "topk_group": 1 if router.groups is None else router.groups.num_selected,
        "tie_word_embeddings": config.tied_embeddings,
    }


def _write_rotary(rotary: Rotary, heads: Latent) -> Fields:
    """Returns the fields of the rotation; YaRN's growth of scores is a field of it."""
    fields = write_rotary(rotary)
    if heads.scale is None or not isinstance(rotary.scaling, YarnScaling):
        return fields
    grown = math.sqrt(heads.scale * (heads.nope_dim + heads.rotary_dim) ** 0.5)
    share = round((grown - 1.0) / (0.1 * math.log(rotary.scaling.factor)), 9)
    factor = rotary.scaling.attention_factor
    factor = _magnitude(rotary.scaling.factor, 1.0) if factor is None else factor
    return {**fields, "rope_scaling": {**fields["rope_scaling"], "mscale_all_dim": share, "attention_factor": factor}}


def _write_v2(config: Any) -> Fields | None:
    fields = _write(config)
    if fields is None:
        return None
    return {**fields, "topk_method": "greedy" if fields["n_group"] == 1 else "group_limited_greedy"}


DEEPSEEK_V2 = Family(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    rows=ROWS,
    read=_read_v2,
    write=_write_v2,
    prefix="model.",
    ignored=IGNORED,
)
DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    rows=ROWS,
    read=_read_v3,
    write=_write,
    prefix="model.",
    ignored=(*IGNORED, r"\.layers\.\d+\.(enorm|hnorm|eh_proj|embed_tokens|shared_head)"),
)
