"""ModernBERT (Warner et al. 2024): a pre-norm encoder, GeGLU, rotary positions, two local layers for a global one."""

from typing import Any

from lm.interop.family import FROM_HEADS, Config, Family, Fields, fold_layers, linear, norm, row
from lm.interop.meaning import positions_of, unfold_layers
from lm.interop.rotary import read_rotary
from lm.models import Encoder, HeadTransform, Layer, LayerNorm, Mlp, MultiHead, Rotary

LAYER, OURS = "model.layers.{layer}", "encoder/stack/{layer}"
QKV = (f"{OURS}/attention/query", f"{OURS}/attention/key", f"{OURS}/attention/value")
GATE_UP = (f"{OURS}/mlp/gate", f"{OURS}/mlp/up")
ROWS = (
    row("model.embeddings.tok_embeddings.weight", "tokens/embedding"),
    *norm("model.embeddings.norm", "encoder/embedding_norm"),
    *norm(f"{LAYER}.attn_norm", f"{OURS}/attention_norm"),
    row(f"{LAYER}.attn.Wqkv.weight", *(f"{part}/kernel" for part in QKV), equation="(*N H) D -> D N H"),
    row(f"{LAYER}.attn.Wqkv.bias", *(f"{part}/bias" for part in QKV), equation="(*N H) -> N H"),
    *linear(f"{LAYER}.attn.Wo", f"{OURS}/attention/out", FROM_HEADS),
    *norm(f"{LAYER}.mlp_norm", f"{OURS}/mlp_norm"),
    row(f"{LAYER}.mlp.Wi.weight", *(f"{part}/kernel" for part in GATE_UP), equation="*F D -> D F"),
    row(f"{LAYER}.mlp.Wi.bias", *(f"{part}/bias" for part in GATE_UP), equation="*F -> F"),
    *linear(f"{LAYER}.mlp.Wo", f"{OURS}/mlp/down"),
    *norm("model.final_norm", "encoder/final_norm"),
    *linear("head.dense", "head/dense"),
    *norm("head.norm", "head/norm"),
    row("decoder.weight", "head/projection/kernel", equation="V D -> D V"),
    row("decoder.bias", "head/bias"),
)
ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "silu": "silu", "relu": "relu"}


def read(config: Config) -> Encoder:
    """Makes our config of a config.json."""
    has_head = config.holds("head.dense.weight", config.architecture == "ModernBertForMaskedLM")
    head = HeadTransform(
        activation=config.choose("classifier_activation", ACTIVATIONS, "gelu"),
        use_bias=config.get("classifier_bias", False),
    )
    bias = config.get("attention_bias", False)
    return Encoder(
        vocab_size=config["vocab_size"],
        num_layers=config["num_hidden_layers"],
        model_dim=config["hidden_size"],
        num_heads=config["num_attention_heads"],
        mlp_dim=config["intermediate_size"],
        max_length=config["max_position_embeddings"],
        norm=LayerNorm(epsilon=config.get("norm_eps", 1e-5), use_bias=config.get("norm_bias", False)),
        positions=_rotary(config, "full_attention", config.get("global_rope_theta", 160_000.0)),
        attention=MultiHead(use_qkv_bias=bias, use_output_bias=bias, dropout_rate=config.get("attention_dropout", 0.0)),
        mlp=Mlp(
            activation=config.choose("hidden_activation", ACTIVATIONS, "gelu"), use_bias=config.get("mlp_bias", False)
        ),
        **fold_layers(_layers(config)),
        embedding_norm=True,
        tied_embeddings=not has_head or config.get("tie_word_embeddings", True),
        head_transform=head if has_head else None,
        head_bias=has_head and config.get("decoder_bias", True),
        dropout_rate=config.get("mlp_dropout", 0.0),
    )


def _rotary(config: Config, kind: str, theta: float) -> Rotary:
    return read_rotary(config, kind) if config.get("rope_parameters") else Rotary(theta=float(theta))


def _layers(config: Config) -> list[Layer]:
    """Returns the layers: every n-th is global, the others local; the first reads the normalised embeddings as is."""
    count, every = config["num_hidden_layers"], config.get("global_attn_every_n_layers", 3)
    default = ["sliding_attention" if i % every else "full_attention" for i in range(count)]
    theta = config.get("local_rope_theta", 10_000.0)
    local = Layer(window=config.get("local_attention", 128), positions=_rotary(config, "sliding_attention", theta))
    known = {"full_attention": Layer(), "sliding_attention": local}
    kinds = config.get("layer_types", default)
    if len(kinds) != count or any(kind not in known for kind in kinds):
        raise config.refuse("layer_types", f"known are {count} of {', '.join(known)}")
    first, *others = (known[kind] for kind in kinds)
    return [Layer(window=first.window, positions=first.positions, normalize_attention=False), *others]


def write(config: Any) -> Fields | None:
    """Makes a config.json of our config."""
    if not isinstance(config, Encoder) or not isinstance(config.norm, LayerNorm) or not isinstance(config.mlp, Mlp):
        return None
    layers = unfold_layers(config, config.num_layers)
    full, local = (positions_of(config, windowed=windowed) for windowed in (False, True))
    if not isinstance(full, Rotary) or not isinstance(local, Rotary):
        return None
    thetas = {"full_attention": full.theta, "sliding_attention": local.theta}
    windows = [layer.window for layer in layers]
    head = config.head_transform
    return {
        "architectures": ["ModernBertForMaskedLM" if head is not None else "ModernBertModel"],
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.model_dim,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_dim,
        "max_position_embeddings": config.max_length,
        "norm_eps": config.norm.epsilon,
        "norm_bias": config.norm.use_bias,
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in thetas.items()},
        "global_rope_theta": full.theta,
        "local_rope_theta": local.theta,
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
        "global_attn_every_n_layers": _period(windows),
        "local_attention": next((window for window in windows if window is not None), 128),
        "hidden_activation": config.mlp.activation.replace("gelu_tanh", "gelu_pytorch_tanh"),
        "attention_bias": config.attention.use_qkv_bias,
        "mlp_bias": config.mlp.use_bias,
        "tie_word_embeddings": config.tied_embeddings,
        "decoder_bias": config.head_bias,
        "classifier_bias": head is not None and head.use_bias,
        "classifier_activation": "gelu" if head is None else head.activation.replace("gelu_tanh", "gelu_pytorch_tanh"),
        "attention_dropout": config.attention.dropout_rate,
        "mlp_dropout": config.dropout_rate,
    }


def _period(windows: list[int | None]) -> int:
    """Returns the distance between global layers, for versions of transformers that know no `layer_types`."""
    return next((i for i in range(1, len(windows)) if windows[i] is None), len(windows))


MODERNBERT = Family(
    model_type="modernbert",
    architecture="ModernBertForMaskedLM",
    rows=ROWS,
    read=read,
    write=write,
    prefix="model.",
    ignored=(r"inv_freq$", r"^decoder\.weight$"),
)
