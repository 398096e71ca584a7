"""BERT (Devlin et al. 2019): --config=configs/bert.py:tiny|base|large, with its masked and next-sentence heads."""

import dataclasses

from lm.data import DataConfig
from lm.experiment import Experiment
from lm.models import Encoder, HeadTransform, LayerNorm, Learned, Mlp, MultiHead, NormalInitializer
from lm.objectives import BERT
from lm.optim import AdamW, Linear, OptimizerConfig

BASE = Encoder(
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
    num_classes=2,
    head_transform=HeadTransform(),
    head_bias=True,
    initializer=NormalInitializer(stddev=0.02, residual_scaling=False),
    dropout_rate=0.1,
)

MODELS = {
    "tiny": dataclasses.replace(
        BASE, vocab_size=512, num_layers=2, model_dim=32, num_heads=4, mlp_dim=64, max_length=64
    ),
    "base": BASE,
    "large": dataclasses.replace(BASE, num_layers=24, model_dim=1024, num_heads=16, mlp_dim=4096),
}


def get_model(variant: str = "base") -> Encoder:
    """Returns the architecture alone."""
    if variant not in MODELS:
        raise ValueError(f"there are {', '.join(MODELS)}")
    return MODELS[variant]


def get_config(variant: str = "") -> Experiment:
    """BERT's first phase, rows of 128 tokens (appendix A.2); `tiny` is small enough for tests."""
    model = get_model(variant or "base")
    tiny = variant == "tiny"
    return Experiment(
        model=model,
        objective=BERT,
        data=DataConfig(sequence_length=64 if tiny else 128),
        optimizer=OptimizerConfig(
            rule=AdamW(b2=0.999, epsilon=1e-6),
            schedule=Linear(warmup_steps=5 if tiny else 10_000),
            learning_rate=1e-3 if tiny else 1e-4,
            weight_decay=0.01,
        ),
        batch_size=8 if tiny else 256,
        num_steps=40 if tiny else 1_000_000,
    )
