"""BERT and RoBERTa: LayerNorm after each branch, learned positions, a transformed head for masked tokens.

A checkpoint of the body alone (`BertModel`) becomes a model without that head; its pooler is left out
unless a classifier of sentence pairs comes with it.
"""

from typing import Any

from lm.interop.family import Config, Family, Fields, Row, attention, linear, norm, row
from lm.models import Encoder, HeadTransform, LayerNorm, Learned, Mlp, MultiHead

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
LEGACY = ((".LayerNorm.gamma", ".LayerNorm.weight"), (".LayerNorm.beta", ".LayerNorm.bias"))


def embedding_rows(theirs: str) -> tuple[Row, ...]:
    """Returns the table of BERT's embeddings; also ALBERT's."""
    return (
        row(f"{theirs}.word_embeddings.weight", "tokens/embedding"),
        row(f"{theirs}.position_embeddings.weight", "encoder/positions/embedding"),
        row(f"{theirs}.token_type_embeddings.weight", "encoder/types/embedding"),
        *norm(f"{theirs}.LayerNorm", "encoder/embedding_norm"),
    )


def _body(prefix: str) -> tuple[Row, ...]:
    layer, ours = f"{prefix}.encoder.layer.{{layer}}", "encoder/stack/{layer}"
    return (
        *embedding_rows(f"{prefix}.embeddings"),
        *attention(f"{layer}.attention", f"{ours}/attention", "self.query", "self.key", "self.value", "output.dense"),
        *norm(f"{layer}.attention.output.LayerNorm", f"{ours}/attention_norm"),
        *linear(f"{layer}.intermediate.dense", f"{ours}/mlp/up"),
        *linear(f"{layer}.output.dense", f"{ours}/mlp/down"),
        *norm(f"{layer}.output.LayerNorm", f"{ours}/mlp_norm"),
        *linear(f"{prefix}.pooler.dense", "classifier/pooler"),
    )


BERT_ROWS = (
    *_body("bert"),
    *linear("cls.predictions.transform.dense", "head/dense"),
    *norm("cls.predictions.transform.LayerNorm", "head/norm"),
    row("cls.predictions.bias", "head/bias"),
    row("cls.predictions.decoder.weight", "head/projection/kernel", equation="V D -> D V"),
    *linear("cls.seq_relationship", "classifier/projection"),
)
ROBERTA_ROWS = (
    *_body("roberta"),
    *linear("lm_head.dense", "head/dense"),
    *norm("lm_head.layer_norm", "head/norm"),
    row("lm_head.bias", "head/bias"),
    row("lm_head.decoder.weight", "head/projection/kernel", equation="V D -> D V"),
)


def read_encoder(config: Config, *, has_head: bool, num_classes: int, **changes: Any) -> Encoder:
    """Makes the config that BERT, RoBERTa and ALBERT share."""
    config.expect("position_embedding_type", "absolute")
    config.expect("is_decoder", False)
    config.expect("add_cross_attention", False)
    activation = config.choose("hidden_act", ACTIVATIONS, "gelu")
    settings: Fields = {
        "vocab_size": config["vocab_size"],
        "num_layers": config["num_hidden_layers"],
        "model_dim": config["hidden_size"],
        "num_heads": config["num_attention_heads"],
        "mlp_dim": config["intermediate_size"],
        "max_length": config["max_position_embeddings"],
        "norm": LayerNorm(epsilon=config.get("layer_norm_eps", 1e-12)),
        "norm_placement": "post",
        "positions": Learned(),
        "attention": MultiHead(
            use_qkv_bias=True, use_output_bias=True, dropout_rate=config.get("attention_probs_dropout_prob", 0.1)
        ),
        "mlp": Mlp(activation=activation, gated=False, use_bias=True),
        "num_token_types": config.get("type_vocab_size", 2),
        "embedding_norm": True,
        "tied_embeddings": not has_head or config.get("tie_word_embeddings", True),
        "head_transform": HeadTransform(activation=activation) if has_head else None,
        "head_bias": has_head,
        "num_classes": num_classes,
        "dropout_rate": config.get("hidden_dropout_prob", 0.1),
    }
    return Encoder(**settings | changes)


def write_encoder(config: Any) -> Fields | None:
    """Makes the fields that BERT, RoBERTa and ALBERT share."""
    if not isinstance(config, Encoder) or not isinstance(config.norm, LayerNorm) or not isinstance(config.mlp, Mlp):
        return None
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    return {
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.model_dim,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_dim,
        "max_position_embeddings": config.max_length,
        "layer_norm_eps": config.norm.epsilon,
        "hidden_act": names.get(config.mlp.activation),
        "type_vocab_size": config.num_token_types,
        "tie_word_embeddings": config.tied_embeddings,
        "attention_probs_dropout_prob": config.attention.dropout_rate,
        "hidden_dropout_prob": config.dropout_rate,
    }


def _read_bert(config: Config) -> Encoder:
    has_head = config.holds("cls.predictions.bias", config.architecture in ("BertForMaskedLM", "BertForPreTraining"))
    has_classes = config.holds("cls.seq_relationship.weight", config.architecture == "BertForPreTraining")
    return read_encoder(config, has_head=has_head, num_classes=2 if has_classes else 0)


def _write_bert(config: Any) -> Fields | None:
    fields = write_encoder(config)
    if fields is None:
        return None
    head = "BertForMaskedLM" if config.head_transform is not None else "BertModel"
    return {**fields, "architectures": ["BertForPreTraining" if config.num_classes else head]}


def _read_roberta(config: Config) -> Encoder:
    # Positions begin behind the padding token's row, and the table is as long as that makes it.
    offset = config.get("pad_token_id", 1) + 1
    return read_encoder(
        config,
        has_head=config.holds("lm_head.bias", config.architecture == "RobertaForMaskedLM"),
        num_classes=0,
        positions=Learned(offset=offset),
        max_length=config["max_position_embeddings"] - offset,
    )


def _write_roberta(config: Any) -> Fields | None:
    fields = write_encoder(config)
    if fields is None or not isinstance(config.positions, Learned) or config.positions.offset < 1:
        return None
    return {
        **fields,
        "architectures": ["RobertaForMaskedLM" if config.head_transform is not None else "RobertaModel"],
        "max_position_embeddings": config.max_length + config.positions.offset,
        "pad_token_id": config.positions.offset - 1,
    }


IGNORED = (r"position_ids$", r"pooler\.dense\.", r"(cls\.predictions|lm_head)\.decoder\.")
BERT = Family(
    model_type="bert",
    architecture="BertForMaskedLM",
    rows=BERT_ROWS,
    read=_read_bert,
    write=_write_bert,
    prefix="bert.",
    ignored=IGNORED,
    legacy=LEGACY,
)
ROBERTA = Family(
    model_type="roberta",
    architecture="RobertaForMaskedLM",
    rows=ROBERTA_ROWS,
    read=_read_roberta,
    write=_write_roberta,
    prefix="roberta.",
    ignored=IGNORED,
    legacy=LEGACY,
)
