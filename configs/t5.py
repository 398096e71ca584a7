"""T5 (Raffel et al. 2020): --config=configs/t5.py:tiny|small|base|large|3b|11b, and v1.1 (Flan-T5's shapes) as
v1_1_small|v1_1_base|v1_1_large|v1_1_xl|v1_1_xxl with gated GELU and a head of its own."""

import dataclasses

from lm.data import DataConfig
from lm.experiment import Experiment
from lm.models import Bucketed, EncoderDecoder, FanInInitializer, Mlp, MultiHead, RMSNorm
from lm.objectives import SpanCorruption
from lm.optim import Adafactor, InverseSquareRoot, OptimizerConfig

BASE = EncoderDecoder(
    vocab_size=32_128,
    num_layers=12,
    model_dim=768,
    num_heads=12,
    head_dim=64,
    mlp_dim=3072,
    max_length=512,
    norm=RMSNorm(epsilon=1e-6),
    positions=Bucketed(num_buckets=32, max_distance=128),
    attention=MultiHead(scale=1.0),
    mlp=Mlp(activation="relu", gated=False),
    tied_embeddings=True,
    scale_logits=True,
    initializer=FanInInitializer(),
)
# Pre-trained without dropout, with another activation and another head (the released "T5 version 1.1").
BASE_1_1 = dataclasses.replace(
    BASE, mlp_dim=2048, mlp=Mlp(activation="gelu_tanh", gated=True), tied_embeddings=False, scale_logits=False
)


def _size(model: EncoderDecoder, num_layers: int, model_dim: int, num_heads: int, mlp_dim: int) -> EncoderDecoder:
    return dataclasses.replace(model, num_layers=num_layers, model_dim=model_dim, num_heads=num_heads, mlp_dim=mlp_dim)


MODELS = {
    "tiny": dataclasses.replace(_size(BASE, 2, 32, 4, 64), vocab_size=512, head_dim=8, max_length=64),
    "small": _size(BASE, 6, 512, 8, 2048),
    "base": BASE,
    "large": _size(BASE, 24, 1024, 16, 4096),
    # Heads of 128 channels: the inner width of attention is far above the model's.
    "3b": dataclasses.replace(_size(BASE, 24, 1024, 32, 16_384), head_dim=128),
    "11b": dataclasses.replace(_size(BASE, 24, 1024, 128, 65_536), head_dim=128),
    "v1_1_tiny": dataclasses.replace(_size(BASE_1_1, 2, 32, 4, 64), vocab_size=512, head_dim=8, max_length=64),
    "v1_1_small": _size(BASE_1_1, 8, 512, 6, 1024),
    "v1_1_base": BASE_1_1,
    "v1_1_large": _size(BASE_1_1, 24, 1024, 16, 2816),
    "v1_1_xl": _size(BASE_1_1, 24, 2048, 32, 5120),
    "v1_1_xxl": _size(BASE_1_1, 24, 4096, 64, 10_240),
}


def get_model(variant: str = "base") -> EncoderDecoder:
    """Returns the architecture alone."""
    if variant not in MODELS:
        raise ValueError(f"there are {', '.join(MODELS)}")
    return MODELS[variant]


def get_config(variant: str = "") -> Experiment:
    """Span corruption on rows of 512 and 114 tokens (section 3.1); the tiny ones are small enough for tests."""
    model = get_model(variant or "base")
    tiny = variant.endswith("tiny")
    return Experiment(
        model=model,
        objective=SpanCorruption(),
        data=DataConfig(sequence_length=32 if tiny else 114, encoder_length=64 if tiny else 512),
        optimizer=OptimizerConfig(
            rule=Adafactor(),
            schedule=InverseSquareRoot(warmup_steps=5 if tiny else 10_000),
            learning_rate=1e-2,
            weight_decay=0.0,
        ),
        batch_size=8 if tiny else 128,
        num_steps=40 if tiny else 524_288,
    )
