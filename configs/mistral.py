"""Mistral 7B (Jiang et al. 2023): --config=configs/mistral.py:tiny|7b; Llama's block with a sliding window."""

import dataclasses

from lm.data import DataConfig
from lm.experiment import Experiment
from lm.models import Decoder, Layer, Mlp, MultiHead, RMSNorm, Rotary
from lm.optim import AdamW, Cosine, OptimizerConfig

MISTRAL = Decoder(
    vocab_size=32_000,
    num_layers=32,
    model_dim=4096,
    num_heads=32,
    num_kv_heads=8,
    mlp_dim=14_336,
    max_length=32_768,
    norm=RMSNorm(epsilon=1e-5),
    positions=Rotary(theta=10_000.0),
    attention=MultiHead(),
    mlp=Mlp(activation="silu", gated=True),
    layers=(Layer(window=4096),),
    tied_embeddings=False,
    dtype="bfloat16",
    remat="full",
)

MODELS = {
    "tiny": dataclasses.replace(
        MISTRAL,
        vocab_size=512,
        num_layers=2,
        model_dim=32,
        num_heads=4,
        num_kv_heads=2,
        mlp_dim=64,
        max_length=64,
        layers=(Layer(window=16),),
        dtype="float32",
        remat="none",
    ),
    "7b": MISTRAL,
}


def get_model(variant: str = "7b") -> Decoder:
    """Returns the architecture alone."""
    if variant not in MODELS:
        raise ValueError(f"there are {', '.join(MODELS)}")
    return MODELS[variant]


def get_config(variant: str = "") -> Experiment:
    """Mistral from scratch on the user's text; `tiny` is small enough for tests."""
    model = get_model(variant or "7b")
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
