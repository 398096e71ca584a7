"""Llama 3 (Dubey et al. 2024): --config=configs/llama3.py:tiny|1b|8b|70b (1b is Llama 3.2's, tied)."""

import dataclasses

from lm.data import DataConfig
from lm.experiment import Experiment
from lm.models import Decoder, Llama3Scaling, Mlp, MultiHead, RMSNorm, Rotary
from lm.optim import AdamW, Cosine, OptimizerConfig

LLAMA3 = Decoder(
    vocab_size=128_256,
    num_layers=32,
    model_dim=4096,
    num_heads=32,
    num_kv_heads=8,
    mlp_dim=14_336,
    max_length=8192,
    norm=RMSNorm(epsilon=1e-5),
    positions=Rotary(theta=500_000.0),
    attention=MultiHead(),
    mlp=Mlp(activation="silu", gated=True),
    tied_embeddings=False,
    dtype="bfloat16",
    remat="full",
)

MODELS = {
    "tiny": dataclasses.replace(
        LLAMA3,
        vocab_size=512,
        num_layers=2,
        model_dim=32,
        num_heads=4,
        num_kv_heads=2,
        mlp_dim=64,
        max_length=64,
        dtype="float32",
        remat="none",
    ),
    "1b": dataclasses.replace(
        LLAMA3,
        num_layers=16,
        model_dim=2048,
        head_dim=64,
        mlp_dim=8192,
        max_length=131_072,
        positions=Rotary(
            theta=500_000.0,
            scaling=Llama3Scaling(factor=32.0, original_max_length=8192),
        ),
        tied_embeddings=True,
    ),
    "8b": LLAMA3,
    "70b": dataclasses.replace(LLAMA3, num_layers=80, model_dim=8192, num_heads=64, mlp_dim=28_672),
}


def get_model(variant: str = "8b") -> Decoder:
    """Returns the architecture alone."""
    if variant not in MODELS:
        raise ValueError(f"there are {', '.join(MODELS)}")
    return MODELS[variant]


def get_config(variant: str = "") -> Experiment:
    """Llama 3 from scratch on the user's text; `tiny` is small enough for tests."""
    model = get_model(variant or "8b")
    tiny = variant == "tiny"
    return Experiment(
        model=model,
        data=DataConfig(sequence_length=min(model.max_length, 8192)),
        optimizer=OptimizerConfig(
            rule=AdamW(b2=0.95),
            schedule=Cosine(warmup_steps=5 if tiny else 2000),
            learning_rate=1e-2 if tiny else 3e-4,
        ),
        batch_size=8 if tiny else 512,
        num_steps=40 if tiny else 500_000,
    )
