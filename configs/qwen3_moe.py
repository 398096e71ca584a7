"""Qwen3-MoE (Qwen Team 2025): --config=configs/qwen3_moe.py:tiny|30b|235b (30B-A3B and 235B-A22B)."""

import dataclasses

from lm.data import DataConfig
from lm.experiment import Experiment
from lm.models import Decoder, MixtureOfExperts, MultiHead, RMSNorm, Rotary, Router
from lm.optim import AdamW, Cosine, OptimizerConfig

QWEN3_MOE = Decoder(
    vocab_size=151_936,
    num_layers=48,
    model_dim=2048,
    num_heads=32,
    num_kv_heads=4,
    head_dim=128,
    max_length=40_960,
    norm=RMSNorm(epsilon=1e-6),
    positions=Rotary(theta=1_000_000.0),
    attention=MultiHead(qk_norm="head"),
    mlp=MixtureOfExperts(num_experts=128, num_selected=8, dim=768, router=Router(normalize=True), load_balance=0.001),
    tied_embeddings=False,
    dtype="bfloat16",
    remat="full",
)

MODELS = {
    "tiny": dataclasses.replace(
        QWEN3_MOE,
        vocab_size=512,
        num_layers=2,
        model_dim=32,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        max_length=64,
        mlp=MixtureOfExperts(num_experts=8, num_selected=2, dim=32, router=Router(normalize=True), load_balance=0.001),
        dtype="float32",
        remat="none",
    ),
    "30b": QWEN3_MOE,
    "235b": dataclasses.replace(
        QWEN3_MOE,
        num_layers=94,
        model_dim=4096,
        num_heads=64,
        mlp=MixtureOfExperts(
            num_experts=128, num_selected=8, dim=1536, router=Router(normalize=True), load_balance=0.001
        ),
    ),
}


def get_model(variant: str = "30b") -> Decoder:
    """Returns the architecture alone."""
    if variant not in MODELS:
        raise ValueError(f"there are {', '.join(MODELS)}")
    return MODELS[variant]


def get_config(variant: str = "") -> Experiment:
    """Qwen3-MoE from scratch on the user's text; `tiny` is small enough for tests."""
    model = get_model(variant or "30b")
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
