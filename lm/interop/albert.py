"""ALBERT (Lan et al. 2019): BERT whose layers are one layer, with narrow embeddings and sentence order."""

from typing import Any

from lm.interop.bert import embedding_rows, read_encoder, write_encoder
from lm.interop.family import Config, Family, Fields, attention, linear, norm, row
from lm.models import Encoder

LAYER, OURS = "albert.encoder.albert_layer_groups.0.albert_layers.0", "encoder/stack/layers/block_0"
ROWS = (
    *embedding_rows("albert.embeddings"),
    *linear("albert.encoder.embedding_hidden_mapping_in", "encoder/embedding_projection"),
    *attention(f"{LAYER}.attention", f"{OURS}/attention", "query", "key", "value", "dense"),
    *norm(f"{LAYER}.attention.LayerNorm", f"{OURS}/attention_norm"),
    *linear(f"{LAYER}.ffn", f"{OURS}/mlp/up"),
    *linear(f"{LAYER}.ffn_output", f"{OURS}/mlp/down"),
    *norm(f"{LAYER}.full_layer_layer_norm", f"{OURS}/mlp_norm"),
    *linear("albert.pooler", "classifier/pooler"),
    *linear("predictions.dense", "head/dense"),
    *norm("predictions.LayerNorm", "head/norm"),
    row("predictions.bias", "head/bias"),
    row("predictions.decoder.weight", "head/projection/kernel", equation="V D -> D V"),
    *linear("sop_classifier.classifier", "classifier/projection"),
)


def read(config: Config) -> Encoder:
    """Makes our config of a config.json."""
    config.expect("num_hidden_groups", 1)
    config.expect("inner_group_num", 1)
    architecture = config.architecture
    has_head = config.holds("predictions.bias", architecture in ("AlbertForMaskedLM", "AlbertForPreTraining"))
    has_classes = config.holds("sop_classifier.classifier.weight", architecture == "AlbertForPreTraining")
    return read_encoder(
        config,
        has_head=has_head,
        num_classes=2 if has_classes else 0,
        share_layers=True,
        embedding_dim=config.get("embedding_size", 128),
    )


def write(config: Any) -> Fields | None:
    """Makes a config.json of our config."""
    fields = write_encoder(config)
    if fields is None or not config.share_layers:
        return None
    head = "AlbertForMaskedLM" if config.head_transform is not None else "AlbertModel"
    return {
        **fields,
        "architectures": ["AlbertForPreTraining" if config.num_classes else head],
        "embedding_size": config.embedding_width,
        "num_hidden_groups": 1,
        "inner_group_num": 1,
    }


ALBERT = Family(
    model_type="albert",
    architecture="AlbertForMaskedLM",
    rows=ROWS,
    read=read,
    write=write,
    prefix="albert.",
    ignored=(r"position_ids$", r"pooler\.(weight|bias)$", r"predictions\.decoder\."),
)
