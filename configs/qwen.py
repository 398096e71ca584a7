"""Qwen2 and Qwen3 (Yang et al. 2024, 2025): --config=configs/qwen.py:tiny|qwen2_0_5b|qwen2_1_5b|qwen2_7b|qwen2_72b
|qwen3_tiny|qwen3_0_6b|qwen3_1_7b|qwen3_4b|qwen3_8b|qwen3_14b|qwen3_32b; biases of queries and keys, or their norm."""

import dataclasses

from lm.data import DataConfig
from lm.experiment import Experiment
from lm.models import Decoder, Mlp, MultiHead, RMSNorm, Rotary
from lm.optim import AdamW, Cosine, OptimizerConfig

QWEN2 = Decoder(
    vocab_size=151_936,
    num_layers=24,
    model_dim=896,
    num_heads=14,
    num_kv_heads=2,
    head_dim=64,
    mlp_dim=4864,
    max_length=32_768,
    norm=RMSNorm(epsilon=1e-6),
    positions=Rotary(theta=1_000_000.0),
    attention=MultiHead(use_qkv_bias=True),
    mlp=Mlp(activation="silu", gated=True),
    tied_embeddings=True,
    dtype="bfloat16",
    remat="full",
)
QWEN3 = dataclasses.replace(QWEN2, attention=MultiHead(qk_norm="head"), head_dim=128, num_kv_heads=8, max_length=40_960)


def _size(model: Decoder, num_layers: int, model_dim: int, num_heads: int, mlp_dim: int) -> Decoder:
    return dataclasses.replace(model, num_layers=num_layers, model_dim=model_dim, num_heads=num_heads, mlp_dim=mlp_dim)


def _tiny(model: Decoder) -> Decoder:
    small = _size(model, 2, 32, 4, 64)
    return dataclasses.replace(
        small, vocab_size=512, num_kv_heads=2, head_dim=8, max_length=64, dtype="float32", remat="none"
    )


MODELS = {
    "tiny": _tiny(QWEN2),
    "qwen2_0_5b": QWEN2,
    "qwen2_1_5b": dataclasses.replace(_size(QWEN2, 28, 1536, 12, 8960), head_dim=128),
    "qwen2_7b": dataclasses.replace(
        _size(QWEN2, 28, 3584, 28, 18_944), num_kv_heads=4, head_dim=128, vocab_size=152_064, tied_embeddings=False
    ),
    "qwen2_72b": dataclasses.replace(
        _size(QWEN2, 80, 8192, 64, 29_568), num_kv_heads=8, head_dim=128, vocab_size=152_064, tied_embeddings=False
    ),
    "qwen3_tiny": _tiny(QWEN3),
    "qwen3_0_6b": _size(QWEN3, 28, 1024, 16, 3072),
    "qwen3_1_7b": _size(QWEN3, 28, 2048, 16, 6144),
    "qwen3_4b": _size(QWEN3, 36, 2560, 32, 9728),
    "qwen3_8b": dataclasses.replace(_size(QWEN3, 36, 4096, 32, 12_288), tied_embeddings=False),
    "qwen3_14b": dataclasses.replace(_size(QWEN3, 40, 5120, 40, 17_408), tied_embeddings=False),
    "qwen3_32b": dataclasses.replace(_size(QWEN3, 64, 5120, 64, 25_600), tied_embeddings=False),
}


def get_model(variant: str = "qwen3_0_6b") -> Decoder:
    """Returns the architecture alone."""
    if variant not in MODELS:
        raise ValueError(f"there are {', '.join(MODELS)}")
    return MODELS[variant]


def get_config(variant: str = "") -> Experiment:
    """Qwen from scratch on the user's text; the tiny ones are small enough for tests."""
    model = get_model(variant or "qwen3_0_6b")
    tiny = variant.endswith("tiny")
    return Experiment(
        model=model,
        data=DataConfig(sequence_length=min(model.max_length, 4096)),
        optimizer=OptimizerConfig(
            rule=AdamW(b2=0.95),
            schedule=Cosine(warmup_steps=5 if tiny else 2000),
            learning_rate=1e-2 if tiny else 3e-4,
        ),
        batch_size=8 if tiny else 1024,
        num_steps=40 if tiny else 500_000,
    )
