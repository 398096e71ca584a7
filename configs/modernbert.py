"""ModernBERT (Warner et al. 2024): --config=configs/modernbert.py:tiny|base|large; rotary, gated, local and global."""

import dataclasses

from lm.data import DataConfig
from lm.experiment import Experiment
from lm.models import Encoder, HeadTransform, Layer, LayerNorm, Mlp, NormalInitializer, Rotary
from lm.objectives import MaskedLM, Replacement
from lm.optim import AdamW, OptimizerConfig, WarmupStableDecay

LOCAL = Layer(window=128, positions=Rotary(theta=10_000.0))
GLOBAL = Layer(positions=Rotary(theta=160_000.0))

BASE = Encoder(
    vocab_size=50_368,
    num_layers=22,
    model_dim=768,
    num_heads=12,
    mlp_dim=1152,
    max_length=8192,
    norm=LayerNorm(epsilon=1e-5, use_bias=False),
    mlp=Mlp(activation="gelu", gated=True),
    # Every third layer is global, from the first on, which follows the norm of the embeddings.
    first_layers=(dataclasses.replace(GLOBAL, normalize_attention=False),),
    layers=(LOCAL, LOCAL, GLOBAL),
    embedding_norm=True,
    head_transform=HeadTransform(use_bias=False),
    head_bias=True,
    initializer=NormalInitializer(stddev=0.02, residual_scaling=True),
)

MODELS = {
    "tiny": dataclasses.replace(
        BASE,
        vocab_size=512,
        num_layers=4,
        model_dim=32,
        num_heads=4,
        mlp_dim=64,
        max_length=64,
        layers=(dataclasses.replace(LOCAL, window=16),) * 2 + (GLOBAL,),
    ),
    "base": BASE,
    "large": dataclasses.replace(BASE, num_layers=28, model_dim=1024, num_heads=16, mlp_dim=2624),
}


def get_model(variant: str = "base") -> Encoder:
    """Returns the architecture alone."""
    if variant not in MODELS:
        raise ValueError(f"there are {', '.join(MODELS)}")
    return MODELS[variant]


def get_config(variant: str = "") -> Experiment:
    """ModernBERT's first phase, rows of 1024 and a rate of 30 % (section 2.2.2); `tiny` is small enough for tests."""
    model = get_model(variant or "base")
    tiny = variant == "tiny"
    return Experiment(
        model=model,
        objective=MaskedLM(rate=0.3, replacement=Replacement(mask_rate=0.8, random_rate=0.1)),
        data=DataConfig(sequence_length=min(model.max_length, 1024)),
        optimizer=OptimizerConfig(
            rule=AdamW(b2=0.98, epsilon=1e-6),
            schedule=WarmupStableDecay(warmup_steps=5 if tiny else 2000, decay_steps=10 if tiny else 50_000),
            learning_rate=1e-3 if tiny else 8e-4,
            weight_decay=0.01,
        ),
        batch_size=8 if tiny else 4608,
        num_microbatches=1 if tiny else 72,
        num_steps=40 if tiny else 400_000,
    )
