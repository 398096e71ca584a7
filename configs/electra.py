"""ELECTRA (Clark et al. 2020): --config=configs/electra.py:tiny|small|base|large, generator and discriminator together.

Sizes are said of the discriminator, which is what is kept: 14M, 110M and 335M parameters.
"""

import dataclasses

from lm.data import DataConfig
from lm.experiment import Experiment
from lm.models import Electra, HeadTransform, LayerNorm, Learned, Mlp, MultiHead, NormalInitializer
from lm.objectives import ReplacedTokenDetection
from lm.optim import AdamW, Linear, OptimizerConfig

# Table 6. A generator has the depth of its discriminator and a share of its widths: a quarter, in base a third.
BASE = Electra(
    vocab_size=30_522,
    num_layers=12,
    model_dim=768,
    num_heads=12,
    mlp_dim=3072,
    max_length=512,
    norm=LayerNorm(epsilon=1e-12),
    norm_placement="post",
    positions=Learned(),
    attention=MultiHead(use_qkv_bias=True, use_output_bias=True, dropout_rate=0.1),
    mlp=Mlp(activation="gelu", gated=False, use_bias=True),
    embedding_norm=True,
    num_token_types=2,
    head_transform=HeadTransform(),
    initializer=NormalInitializer(stddev=0.02, residual_scaling=False),
    dropout_rate=0.1,
    generator_dim=256,
    generator_heads=4,
    generator_mlp_dim=1024,
    generator_layers=12,
)

MODELS = {
    "tiny": dataclasses.replace(
        BASE,
        vocab_size=512,
        num_layers=2,
        model_dim=32,
        num_heads=4,
        mlp_dim=64,
        max_length=64,
        generator_dim=16,
        generator_heads=2,
        generator_mlp_dim=32,
        generator_layers=2,
    ),
    "small": dataclasses.replace(
        BASE,
        model_dim=256,
        num_heads=4,
        mlp_dim=1024,
        embedding_dim=128,
        generator_dim=64,
        generator_heads=1,
        generator_mlp_dim=256,
    ),
    "base": BASE,
    "large": dataclasses.replace(BASE, num_layers=24, model_dim=1024, num_heads=16, mlp_dim=4096, generator_layers=24),
}


def get_model(variant: str = "base") -> Electra:
    """Returns the architecture alone."""
    if variant not in MODELS:
        raise ValueError(f"there are {', '.join(MODELS)}")
    return MODELS[variant]


def get_config(variant: str = "") -> Experiment:
    """Replaced-token detection with the settings of table 6; `tiny` is small enough for tests."""
    variant = variant or "base"
    model = get_model(variant)
    tiny, large = variant == "tiny", variant == "large"
    return Experiment(
        model=model,
        objective=ReplacedTokenDetection(rate=0.25 if large else 0.15),
        data=DataConfig(sequence_length=64 if tiny else 128 if variant == "small" else 512),
        optimizer=OptimizerConfig(
            rule=AdamW(b2=0.999, epsilon=1e-6),
            schedule=Linear(warmup_steps=5 if tiny else 10_000),
            learning_rate=1e-3 if tiny else 5e-4 if variant == "small" else 2e-4,
            weight_decay=0.01,
        ),
        batch_size=8 if tiny else {"small": 128, "base": 256, "large": 2048}[variant],
        num_steps=40 if tiny else {"small": 1_000_000, "base": 766_000, "large": 400_000}[variant],
    )
