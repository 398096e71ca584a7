"""T5 1.0, T5 1.1, Flan-T5 and UL2: RMSNorm, bucketed relative positions, unscaled scores.

1.0 has ReLU and ties the output to the embeddings, scaled; 1.1 gates its feed-forward layer and has an
output matrix of its own. Since transformers 5 no field says which: the tensors do.
"""

from typing import Any

from lm.interop.family import Config, Family, Fields, Row, attention, linear, row
from lm.models import Bucketed, EncoderDecoder, Mlp, MultiHead, RMSNorm


def _tower(tower: str, mlp: int) -> tuple[Row, ...]:
    """Returns the table of one tower; `mlp` counts the branches before its feed-forward layers."""
    block, ours = f"{tower}.block.{{layer}}.layer", f"{tower}/stack/{{layer}}"
    dense = f"{block}.{mlp}.DenseReluDense"
    return (
        row(
            f"{tower}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            f"{tower}/stack/relative_bias/embedding",
        ),
        *attention(f"{block}.0.SelfAttention", f"{ours}/attention", "q", "k", "v", "o"),
        row(f"{block}.0.layer_norm.weight", f"{ours}/attention_norm/scale"),
        *attention(f"{block}.1.EncDecAttention", f"{ours}/cross", "q", "k", "v", "o"),
        row(f"{block}.1.layer_norm.weight", f"{ours}/cross_norm/scale"),
        row(f"{dense}.wi.weight", f"{ours}/mlp/up/kernel", equation="F D -> D F", unless=f"{ours}/mlp/gate/kernel"),
        *linear(f"{dense}.wi_0", f"{ours}/mlp/gate"),
        row(f"{dense}.wi_1.weight", f"{ours}/mlp/up/kernel", equation="F D -> D F", beside=f"{ours}/mlp/gate/kernel"),
        *linear(f"{dense}.wo", f"{ours}/mlp/down"),
        row(f"{block}.{mlp}.layer_norm.weight", f"{ours}/mlp_norm/scale"),
        row(f"{tower}.final_layer_norm.weight", f"{tower}/final_norm/scale"),
    )


ROWS = (
    row("shared.weight", "tokens/embedding"),
    *_tower("encoder", 1),
    *_tower("decoder", 2),
    row("lm_head.weight", "head/projection/kernel", equation="V D -> D V"),
)
ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "silu": "silu"}


def read(config: Config) -> EncoderDecoder:
    """Makes our config of a config.json."""
    gated, _, name = config.get("feed_forward_proj", "relu").rpartition("-")
    if gated not in ("", "gated") or name not in ACTIVATIONS:
        raise config.refuse("feed_forward_proj", f"known are {', '.join(ACTIVATIONS)}, and gated- before each")
    # "gated-gelu" has always meant the approximation.
    activation: Any = "gelu_tanh" if gated and name == "gelu" else ACTIVATIONS[name]
    ties = config.get("tie_word_embeddings", True)
    dropout = config.get("dropout_rate", 0.1)
    return EncoderDecoder(
        vocab_size=config["vocab_size"],
        num_layers=config.get("num_decoder_layers", config["num_layers"]),
        num_encoder_layers=config["num_layers"],
        model_dim=config["d_model"],
        num_heads=config["num_heads"],
        head_dim=config["d_kv"],
        mlp_dim=config["d_ff"],
        max_length=config.get("n_positions", 512),
        norm=RMSNorm(epsilon=config.get("layer_norm_epsilon", 1e-6)),
        positions=Bucketed(
            num_buckets=config.get("relative_attention_num_buckets", 32),
            max_distance=config.get("relative_attention_max_distance", 128),
        ),
        attention=MultiHead(scale=1.0, dropout_rate=dropout),
        mlp=Mlp(activation=activation, gated=bool(gated), dropout_rate=dropout),
        tied_embeddings=not config.holds("lm_head.weight", not ties),
        scale_logits=config.get("scale_decoder_outputs", ties),
        dropout_rate=dropout,
    )


def write(config: Any) -> Fields | None:
    """Makes a config.json of our config."""
    if not isinstance(config, EncoderDecoder) or not isinstance(config.positions, Bucketed):
        return None
    if not isinstance(config.mlp, Mlp) or config.mlp.activation not in ACTIVATIONS.values():
        return None
    names = {ours: theirs for theirs, ours in ACTIVATIONS.items()} | ({"gelu_tanh": "gelu"} if config.mlp.gated else {})
    return {
        "is_encoder_decoder": True,
        "decoder_start_token_id": 0,
        "vocab_size": config.vocab_size,
        "num_layers": config.encoder_depth,
        "num_decoder_layers": config.decoder_depth,
        "d_model": config.model_dim,
        "num_heads": config.num_heads,
        "d_kv": config.sizes["H"],
        "d_ff": config.mlp_dim,
        "n_positions": config.max_length,
        "layer_norm_epsilon": config.norm.epsilon,
        "relative_attention_num_buckets": config.positions.num_buckets,
        "relative_attention_max_distance": config.positions.max_distance,
        "feed_forward_proj": ("gated-" if config.mlp.gated else "") + names[config.mlp.activation],
        # Both spellings of whether logits are scaled: before and since transformers 5.
        "tie_word_embeddings": config.scale_logits,
        "scale_decoder_outputs": config.scale_logits,
        "dropout_rate": config.dropout_rate,
    }


T5 = Family(
    model_type="t5",
    architecture="T5ForConditionalGeneration",
    rows=ROWS,
    read=read,
    write=write,
    ignored=(r"^(encoder|decoder)\.embed_tokens\.weight$", r"EncDecAttention\.relative_attention_bias"),
)
