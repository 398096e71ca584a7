"""GPT-2 (Radford et al. 2019): learned positions, pre-LayerNorm, one matrix for queries, keys and values."""

from typing import Any

from lm.interop.family import Config, Family, Fields, norm, row
from lm.models import Decoder, LayerNorm, Learned, Mlp, MultiHead

LAYER, OURS = "transformer.h.{layer}", "decoder/stack/{layer}"
QKV = (f"{OURS}/attention/query", f"{OURS}/attention/key", f"{OURS}/attention/value")
# GPT-2's linear layers hold inputs first ("Conv1D"), as we do.
ROWS = (
    row("transformer.wte.weight", "tokens/embedding"),
    row("transformer.wpe.weight", "decoder/positions/embedding"),
    *norm(f"{LAYER}.ln_1", f"{OURS}/attention_norm"),
    row(f"{LAYER}.attn.c_attn.weight", *(f"{part}/kernel" for part in QKV), equation="D (*N H) -> D N H"),
    row(f"{LAYER}.attn.c_attn.bias", *(f"{part}/bias" for part in QKV), equation="(*N H) -> N H"),
    row(f"{LAYER}.attn.c_proj.weight", f"{OURS}/attention/out/kernel", equation="(N H) D -> N H D"),
    row(f"{LAYER}.attn.c_proj.bias", f"{OURS}/attention/out/bias"),
    *norm(f"{LAYER}.ln_2", f"{OURS}/mlp_norm"),
    row(f"{LAYER}.mlp.c_fc.weight", f"{OURS}/mlp/up/kernel"),
    row(f"{LAYER}.mlp.c_fc.bias", f"{OURS}/mlp/up/bias"),
    row(f"{LAYER}.mlp.c_proj.weight", f"{OURS}/mlp/down/kernel"),
    row(f"{LAYER}.mlp.c_proj.bias", f"{OURS}/mlp/down/bias"),
    *norm("transformer.ln_f", "decoder/final_norm"),
    row("lm_head.weight", "head/projection/kernel", equation="V D -> D V"),
)
ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
}


def read(config: Config) -> Decoder:
    """Makes our config of a config.json."""
    config.expect("scale_attn_weights", True)
    config.expect("scale_attn_by_inverse_layer_idx", False)
    config.expect("add_cross_attention", False)
    return Decoder(
        vocab_size=config["vocab_size"],
        num_layers=config["n_layer"],
        model_dim=config["n_embd"],
        num_heads=config["n_head"],
        mlp_dim=config.get("n_inner", 4 * config["n_embd"]),
        max_length=config["n_positions"],
        norm=LayerNorm(epsilon=config.get("layer_norm_epsilon", 1e-5)),
        positions=Learned(),
        attention=MultiHead(use_qkv_bias=True, use_output_bias=True, dropout_rate=config.get("attn_pdrop", 0.1)),
        mlp=Mlp(activation=config.choose("activation_function", ACTIVATIONS, "gelu_new"), gated=False, use_bias=True),
        tied_embeddings=config.get("tie_word_embeddings", True),
        dropout_rate=config.get("resid_pdrop", 0.1),
    )


def write(config: Any) -> Fields | None:
    """Makes a config.json of our config."""
    if not isinstance(config, Decoder) or not isinstance(config.norm, LayerNorm) or not isinstance(config.mlp, Mlp):
        return None
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    return {
        "vocab_size": config.vocab_size,
        "n_layer": config.num_layers,
        "n_embd": config.model_dim,
        "n_head": config.num_heads,
        "n_inner": config.mlp_dim,
        "n_positions": config.max_length,
        "layer_norm_epsilon": config.norm.epsilon,
        "activation_function": names.get(config.mlp.activation),
        "tie_word_embeddings": config.tied_embeddings,
        "attn_pdrop": config.attention.dropout_rate,
        "resid_pdrop": config.dropout_rate,
        "embd_pdrop": config.dropout_rate,
    }


GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    rows=ROWS,
    read=read,
    write=write,
    prefix="transformer.",
    ignored=(r"h\.\d+\.attn\.(masked_)?bias$", r"^lm_head\.weight$"),
)
