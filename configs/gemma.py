"""Gemma 2 and 3, text (Gemma Team 2024, 2025): --config=configs/gemma.py:tiny|gemma2_2b|gemma2_9b|gemma2_27b
|gemma3_tiny|gemma3_1b|gemma3_4b|gemma3_12b|gemma3_27b; local and global layers, sandwich norms."""

import dataclasses

from lm.data import DataConfig
from lm.experiment import Experiment
from lm.models import Decoder, Layer, LinearScaling, Mlp, MultiHead, RMSNorm, Rotary
from lm.optim import AdamW, Cosine, OptimizerConfig

GEMMA2 = Decoder(
    vocab_size=256_000,
    num_layers=26,
    model_dim=2304,
    num_heads=8,
    num_kv_heads=4,
    head_dim=256,
    mlp_dim=9216,
    max_length=8192,
    norm=RMSNorm(epsilon=1e-6, zero_centered=True),
    norm_placement="sandwich",
    positions=Rotary(theta=10_000.0),
    attention=MultiHead(scale=256**-0.5, logit_softcap=50.0),
    mlp=Mlp(activation="gelu_tanh", gated=True),
    layers=(Layer(window=4096), Layer()),
    tied_embeddings=True,
    scale_embeddings=True,
    final_logit_softcap=30.0,
    dtype="bfloat16",
    remat="full",
)


def _local(window: int) -> Layer:
    return Layer(window=window, positions=Rotary(theta=10_000.0))


GEMMA3 = dataclasses.replace(
    GEMMA2,
    vocab_size=262_208,
    max_length=131_072,
    positions=Rotary(theta=1_000_000.0, scaling=LinearScaling(factor=8.0)),
    attention=MultiHead(scale=256**-0.5, qk_norm="head"),
    # Five local layers, then a global one.
    layers=(*(_local(1024),) * 5, Layer()),
    final_logit_softcap=None,
)


def _size(model: Decoder, num_layers: int, model_dim: int, num_heads: int, num_kv_heads: int, mlp_dim: int) -> Decoder:
    return dataclasses.replace(
        model,
        num_layers=num_layers,
        model_dim=model_dim,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        mlp_dim=mlp_dim,
    )


def _tiny(model: Decoder, layers: tuple[Layer, ...]) -> Decoder:
    small = _size(model, 3, 32, 4, 2, 64)
    return dataclasses.replace(
        small,
        vocab_size=512,
        head_dim=8,
        max_length=64,
        attention=dataclasses.replace(model.attention, scale=None),
        layers=layers,
        dtype="float32",
        remat="none",
    )


def _scaled(model: Decoder, query_scalar: int, head_dim: int) -> Decoder:
    attention = dataclasses.replace(model.attention, scale=query_scalar**-0.5)
    return dataclasses.replace(model, attention=attention, head_dim=head_dim)


MODELS = {
    "tiny": _tiny(GEMMA2, (Layer(window=16), Layer())),
    "gemma2_2b": GEMMA2,
    "gemma2_9b": _size(GEMMA2, 42, 3584, 16, 8, 14_336),
    # Scores are divided by sqrt(model_dim / num_heads), not by that of the head.
    "gemma2_27b": _scaled(_size(GEMMA2, 46, 4608, 32, 16, 36_864), 144, 128),
    "gemma3_tiny": _tiny(GEMMA3, (_local(16), _local(16), Layer())),
    "gemma3_1b": dataclasses.replace(
        _size(GEMMA3, 26, 1152, 4, 1, 6912),
        vocab_size=262_144,
        max_length=32_768,
        positions=Rotary(theta=1_000_000.0),
        layers=(*(_local(512),) * 5, Layer()),
    ),
    "gemma3_4b": _size(GEMMA3, 34, 2560, 8, 4, 10_240),
    "gemma3_12b": _size(GEMMA3, 48, 3840, 16, 8, 15_360),
    "gemma3_27b": _scaled(_size(GEMMA3, 62, 5376, 32, 16, 21_504), 168, 128),
}


def get_model(variant: str = "gemma2_2b") -> Decoder:
    """Returns the architecture alone."""
    if variant not in MODELS:
        raise ValueError(f"there are {', '.join(MODELS)}")
    return MODELS[variant]


def get_config(variant: str = "") -> Experiment:
    """Gemma from scratch on the user's text; the tiny ones are small enough for tests."""
    model = get_model(variant or "gemma2_2b")
    tiny = variant.endswith("tiny")
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
