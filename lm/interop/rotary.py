"""Rotary positions in a config.json, in the spelling of before and of after transformers 5.

Knows `rope_theta`, `rope_scaling` and `rope_parameters`, and no architecture.
"""

from typing import Any

from lm.interop.family import Config, Fields
from lm.models import LinearScaling, Llama3Scaling, Rotary, YarnScaling


def read_rotary(config: Config, kind: str | None = None, theta: float = 10_000.0) -> Rotary:
    """Returns the rotation that a config.json describes.

    Args:
      config: the config.json.
      kind: which entry of `rope_parameters`, where each kind of layer has its own.
      theta: base of the wavelengths where the file names none.
    """
    found: dict[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if kind is not None and kind in found:
        found = found[kind] or {}
    theta = float(found.get("rope_theta", config.get("rope_theta", theta)))
    fraction = float(found.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)))
    return Rotary(theta=theta, fraction=fraction, scaling=_read_scaling(config, found))


def _read_scaling(config: Config, found: dict[str, Any]) -> Any:
    method = found.get("rope_type", found.get("type", "default"))
    original = found.get("original_max_position_embeddings", config.get("max_position_embeddings", 0))
    if method == "default":
        return None
    if method == "linear":
        return LinearScaling(factor=float(found["factor"]))
    if method == "llama3":
        return Llama3Scaling(
            factor=float(found["factor"]),
            low_frequency_factor=float(found["low_freq_factor"]),
            high_frequency_factor=float(found["high_freq_factor"]),
            original_max_length=int(original),
        )
    if method == "yarn":
        return YarnScaling(
            factor=float(found["factor"]),
            original_max_length=int(original),
            beta_fast=float(found.get("beta_fast") or 32.0),
            beta_slow=float(found.get("beta_slow") or 1.0),
            attention_factor=_yarn_attention(found),
            truncate=bool(found.get("truncate", True)),
        )
    raise config.refuse("rope_scaling", "known methods are default, linear, llama3 and yarn")


def _yarn_attention(found: dict[str, Any]) -> float | None:
    """Returns the factor on sines and cosines; DeepSeek gives it as two `mscale`s (YaRN, section 3.4)."""
    import math

    if found.get("attention_factor") is not None:
        return float(found["attention_factor"])
    above, below = found.get("mscale"), found.get("mscale_all_dim")
    if not above or not below:
        return None
    grown = math.log(float(found["factor"])) if float(found["factor"]) > 1 else 0.0
    return (0.1 * above * grown + 1.0) / (0.1 * below * grown + 1.0)


def write_rotary(rotary: Rotary) -> Fields:
    """Returns `rope_theta` and, where wavelengths are stretched, `rope_scaling`."""
    fields: Fields = {"rope_theta": rotary.theta}
    scaling = write_scaling(rotary)
    if scaling is not None:
        fields["rope_scaling"] = scaling
    if rotary.fraction != 1.0:
        fields["partial_rotary_factor"] = rotary.fraction
    return fields


def write_scaling(rotary: Rotary) -> Fields | None:
    """Returns `rope_scaling`, or None where wavelengths are not stretched or in a way that has no name."""
    match rotary.scaling:
        case LinearScaling(factor=factor):
            return {"rope_type": "linear", "factor": factor}
        case Llama3Scaling() as scaling:
            return {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_frequency_factor,
                "high_freq_factor": scaling.high_frequency_factor,
                "original_max_position_embeddings": scaling.original_max_length,
            }
        case YarnScaling() as scaling:
            fields = {
                "rope_type": "yarn",
                "factor": scaling.factor,
                "original_max_position_embeddings": scaling.original_max_length,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                "truncate": scaling.truncate,
            }
            if scaling.attention_factor is not None:
                fields["attention_factor"] = scaling.attention_factor
            return fields
    return None
