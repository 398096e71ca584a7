"""PaLM (Chowdhery et al. 2022): --config=configs/palm.py:tiny|8b|62b|540b; parallel blocks, one key-value head."""

import dataclasses

from lm.data import DataConfig
from lm.experiment import Experiment, LossConfig
from lm.models import Decoder, FanInInitializer, LayerNorm, Mlp, MultiHead, Rotary
from lm.optim import Adafactor, InverseSquareRoot, OptimizerConfig

PALM_8B = Decoder(
    vocab_size=256_000,
    num_layers=32,
    model_dim=4096,
    num_heads=16,
    num_kv_heads=1,
    head_dim=256,
    mlp_dim=16_384,
    max_length=2048,
    norm=LayerNorm(use_bias=False),
    positions=Rotary(),
    attention=MultiHead(),
    mlp=Mlp(activation="silu", gated=True),
    parallel_block=True,
    tied_embeddings=True,
    scale_logits=True,
    # Section 5: kernels by fan-in, embeddings of unit variance, hence logits divided by sqrt(model_dim).
    initializer=FanInInitializer(),
    dtype="bfloat16",
    remat="full",
)


def _size(num_layers: int, model_dim: int, num_heads: int) -> Decoder:
    return dataclasses.replace(
        PALM_8B, num_layers=num_layers, model_dim=model_dim, num_heads=num_heads, mlp_dim=4 * model_dim
    )


MODELS = {
    "tiny": dataclasses.replace(
        _size(2, 32, 4), vocab_size=512, head_dim=8, max_length=64, dtype="float32", remat="none"
    ),
    "8b": PALM_8B,
    "62b": _size(64, 8192, 32),
    "540b": _size(118, 18_432, 48),
}


def get_model(variant: str = "8b") -> Decoder:
    """Returns the architecture alone."""
    if variant not in MODELS:
        raise ValueError(f"there are {', '.join(MODELS)}")
    return MODELS[variant]


def get_config(variant: str = "") -> Experiment:
    """PaLM's training with z-loss (section 5); `tiny` is small enough for tests."""
    model = get_model(variant or "8b")
    tiny = variant == "tiny"
    return Experiment(
        model=model,
        data=DataConfig(sequence_length=model.max_length),
        optimizer=OptimizerConfig(
            rule=Adafactor(),
            schedule=InverseSquareRoot(warmup_steps=5 if tiny else 10_000),
            learning_rate=1e-2,
            weight_decay=0.0,
        ),
        loss=LossConfig(z_loss=1e-4),
        batch_size=8 if tiny else 512,
        num_steps=40 if tiny else 255_000,
    )
