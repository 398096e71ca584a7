"""ALBERT (Lan et al. 2020): --config=configs/albert.py:tiny|base|large|xlarge|xxlarge; one layer's weights for all."""

import dataclasses

from lm.data import DataConfig
from lm.experiment import Experiment
from lm.models import Encoder, HeadTransform, LayerNorm, Learned, Mlp, MultiHead, NormalInitializer
from lm.objectives import ALBERT
from lm.optim import AdamW, Linear, OptimizerConfig

BASE = Encoder(
    vocab_size=30_000,
    num_layers=12,
    model_dim=768,
    num_heads=12,
    mlp_dim=3072,
    max_length=512,
    norm=LayerNorm(epsilon=1e-12),
    norm_placement="post",
    positions=Learned(),
    attention=MultiHead(use_qkv_bias=True, use_output_bias=True),
    mlp=Mlp(activation="gelu_tanh", gated=False, use_bias=True),
    embedding_norm=True,
    embedding_dim=128,
    num_token_types=2,
    num_classes=2,
    share_layers=True,
    head_transform=HeadTransform(activation="gelu_tanh"),
    head_bias=True,
    initializer=NormalInitializer(stddev=0.02, residual_scaling=False),
)

MODELS = {
    "tiny": dataclasses.replace(
        BASE, vocab_size=512, num_layers=2, model_dim=32, num_heads=4, mlp_dim=64, max_length=64, embedding_dim=16
    ),
    "base": BASE,
    "large": dataclasses.replace(BASE, num_layers=24, model_dim=1024, num_heads=16, mlp_dim=4096),
    "xlarge": dataclasses.replace(BASE, num_layers=24, model_dim=2048, num_heads=16, mlp_dim=8192),
    "xxlarge": dataclasses.replace(BASE, num_layers=12, model_dim=4096, num_heads=64, mlp_dim=16_384),
}


def get_model(variant: str = "base") -> Encoder:
    """Returns the architecture alone."""
    if variant not in MODELS:
        raise ValueError(f"there are {', '.join(MODELS)}")
    return MODELS[variant]


def get_config(variant: str = "") -> Experiment:
    """ALBERT's pretraining (section 4.1), with AdamW instead of LAMB; `tiny` is small enough for tests."""
    model = get_model(variant or "base")
    tiny = variant == "tiny"
    return Experiment(
        model=model,
        objective=ALBERT,
        data=DataConfig(sequence_length=model.max_length),
        optimizer=OptimizerConfig(
            rule=AdamW(b2=0.999, epsilon=1e-6),
            schedule=Linear(warmup_steps=5 if tiny else 3125),
            learning_rate=1e-3 if tiny else 1.76e-4,
            weight_decay=0.01,
        ),
        batch_size=8 if tiny else 4096,
        num_microbatches=1 if tiny else 64,
        num_steps=40 if tiny else 125_000,
    )
