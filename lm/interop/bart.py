"""BART (Lewis et al. 2019): LayerNorm after each branch, learned positions, GELU, one table of tokens for all."""

from typing import Any

from lm.interop.bert import ACTIVATIONS
from lm.interop.family import Config, Family, Fields, Row, attention, linear, norm, row
from lm.models import EncoderDecoder, LayerNorm, Learned, Mlp, MultiHead

HEADS = ("q_proj", "k_proj", "v_proj", "out_proj")
# Rows of the table of positions before that of position 0.
OFFSET = 2


def _tower(tower: str) -> tuple[Row, ...]:
    layer, ours = f"model.{tower}.layers.{{layer}}", f"{tower}/stack/{{layer}}"
    return (
        row(f"model.{tower}.embed_positions.weight", f"{tower}/positions/embedding"),
        *norm(f"model.{tower}.layernorm_embedding", f"{tower}/embedding_norm"),
        *attention(f"{layer}.self_attn", f"{ours}/attention", *HEADS),
        *norm(f"{layer}.self_attn_layer_norm", f"{ours}/attention_norm"),
        *attention(f"{layer}.encoder_attn", f"{ours}/cross", *HEADS),
        *norm(f"{layer}.encoder_attn_layer_norm", f"{ours}/cross_norm"),
        *linear(f"{layer}.fc1", f"{ours}/mlp/up"),
        *linear(f"{layer}.fc2", f"{ours}/mlp/down"),
        *norm(f"{layer}.final_layer_norm", f"{ours}/mlp_norm"),
    )


ROWS = (
    row("model.shared.weight", "tokens/embedding"),
    *_tower("encoder"),
    *_tower("decoder"),
    row("final_logits_bias", "head/bias", equation="A1 V -> (A V)"),
)


def read(config: Config) -> EncoderDecoder:
    """Makes our config of a config.json."""
    for name in ("ffn_dim", "attention_heads"):
        config.expect(f"encoder_{name}", config[f"decoder_{name}"])
    config.expect("tie_word_embeddings", True)
    return EncoderDecoder(
        vocab_size=config["vocab_size"],
        num_layers=config["decoder_layers"],
        num_encoder_layers=config["encoder_layers"],
        model_dim=config["d_model"],
        num_heads=config["decoder_attention_heads"],
        mlp_dim=config["decoder_ffn_dim"],
        max_length=config["max_position_embeddings"],
        norm=LayerNorm(epsilon=1e-5),
        norm_placement="post",
        positions=Learned(offset=OFFSET),
        attention=MultiHead(use_qkv_bias=True, use_output_bias=True, dropout_rate=config.get("attention_dropout", 0.0)),
        mlp=Mlp(
            activation=config.choose("activation_function", ACTIVATIONS, "gelu"),
            gated=False,
            use_bias=True,
            dropout_rate=config.get("activation_dropout", 0.0),
        ),
        embedding_norm=True,
        scale_embeddings=config.get("scale_embedding", False),
        tied_embeddings=True,
        head_bias=config.holds("final_logits_bias", True),
        dropout_rate=config.get("dropout", 0.1),
    )


def write(config: Any) -> Fields | None:
    """Makes a config.json of our config."""
    if not isinstance(config, EncoderDecoder) or not isinstance(config.norm, LayerNorm):
        return None
    if not isinstance(config.mlp, Mlp):
        return None
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    return {
        "is_encoder_decoder": True,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": None,
        "vocab_size": config.vocab_size,
        "encoder_layers": config.encoder_depth,
        "decoder_layers": config.decoder_depth,
        "d_model": config.model_dim,
        "encoder_attention_heads": config.num_heads,
        "decoder_attention_heads": config.num_heads,
        "encoder_ffn_dim": config.mlp_dim,
        "decoder_ffn_dim": config.mlp_dim,
        "max_position_embeddings": config.max_length,
        "activation_function": names.get(config.mlp.activation),
        "scale_embedding": config.scale_embeddings,
        "tie_word_embeddings": config.tied_embeddings,
        "attention_dropout": config.attention.dropout_rate,
        "activation_dropout": config.mlp.dropout_rate,
        "dropout": config.dropout_rate,
    }


BART = Family(
    model_type="bart",
    architecture="BartForConditionalGeneration",
    rows=ROWS,
    read=read,
    write=write,
    ignored=(r"embed_tokens\.weight$", r"^lm_head\.weight$"),
)
