"""When two configs are the same model: equal but for how it is computed and trained.

Knows no format. Law: parameters of one config are parameters of another with the same meaning, and
give the same logits.
"""

import dataclasses
import re
from typing import Any

from lm import config as configs
from lm.models import (
    Alibi,
    Dropless,
    EncoderDecoder,
    Layer,
    Mlp,
    MultiHead,
    NoPositions,
    NormalInitializer,
    Plain,
    Ring,
    Rotary,
)
from lm.models.transformer import Transformer

# Fields that change how a model is computed or trained, at any depth, and what they are set to.
_RUNNING: dict[str, Any] = {
    "dtype": "float32",
    "scan_layers": True,
    "remat": "none",
    "initializer": NormalInitializer(),
    "dropout_rate": 0.0,
    "kernel": Plain(),
    "context_parallel": Ring(),
    "dispatch": Dropless(),
    "load_balance": 0.0,
    "balance_rows": False,
    "z_loss": 0.0,
    "jitter": 0.0,
    "step": 0.0,
}


def unfold_layers(config: Transformer, depth: int) -> list[Layer]:
    """Returns what each layer of a stack has of its own, in order."""
    runs = config.runs(depth)
    return [layer for _, layers, repeats in runs for _ in range(repeats) for layer in layers]


def positions_of(config: Transformer, *, windowed: bool) -> Any:
    """Returns the positions of the first layer with a window (or without); the model's where there is none."""
    layers = unfold_layers(config, max(config.encoder_depth, config.decoder_depth))
    found = next((layer.positions for layer in layers if (layer.window is not None) == windowed), None)
    return found or config.positions


def meaning(config: Transformer) -> Transformer:
    """Returns the config with every spelling of one model made the same, to be compared."""
    depths = {config.encoder_depth, config.decoder_depth} - {0}
    layers = unfold_layers(config, max(depths))
    spelled: dict[str, Any] = {"num_kv_heads": config.sizes["K"], "head_dim": config.sizes["H"]}
    if isinstance(config, EncoderDecoder):
        spelled["num_encoder_layers"] = config.encoder_depth
    config = dataclasses.replace(config, **spelled)
    plain = _plain(config)
    each = tuple(
        dataclasses.replace(layer, positions=layer.positions or plain.positions, mlp=_mlp(layer, plain))
        for layer in layers
    )
    # What stands in every layer now means nothing elsewhere; other schemes also add to embeddings or have a table.
    rest: dict[str, Any] = {"layers": each, "first_layers": (), "mlp": Mlp()}
    if isinstance(plain.positions, Rotary | Alibi):
        rest["positions"] = NoPositions()
    if isinstance(plain.attention, MultiHead) and plain.attention.scale is None:
        rest["attention"] = dataclasses.replace(plain.attention, scale=config.sizes["H"] ** -0.5)
    return dataclasses.replace(plain, **rest)


def _mlp(layer: Layer, config: Transformer) -> Any:
    mlp = _plain(layer.mlp or config.mlp)
    return dataclasses.replace(mlp, dim=config.mlp_dim) if getattr(mlp, "dim", 0) is None else mlp


def _plain(config: Any) -> Any:
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in _RUNNING:
            changes[field.name] = _RUNNING[field.name]
        elif dataclasses.is_dataclass(value):
            changes[field.name] = _plain(value)
    return dataclasses.replace(config, **changes)


def differences(ours: Transformer, theirs: Transformer) -> list[str]:
    """Returns one line "config.FIELD: OURS -> THEIRS" for each field in which two models differ in meaning."""
    lines = configs.differences(configs.to_json(meaning(ours)), configs.to_json(meaning(theirs)), "config.model")
    # What is the same in many layers is said once.
    seen: dict[str, list[str]] = {}
    for line in lines:
        seen.setdefault(re.sub(r"^config\.model\.layers\.\d+\.", "config.model.layers.*.", line), []).append(line)
    return [same[0] if len(same) == 1 else f"{line} ({len(same)} layers)" for line, same in seen.items()]
