"""RoBERTa (Liu et al. 2019): --config=configs/roberta.py:tiny|base|large; BERT's shape, dynamic masking, no pairs."""

import dataclasses

from lm.data import DataConfig
from lm.experiment import Experiment
from lm.models import Encoder, HeadTransform, LayerNorm, Learned, Mlp, MultiHead, NormalInitializer
from lm.objectives import ROBERTA
from lm.optim import AdamW, Linear, OptimizerConfig

BASE = Encoder(
    vocab_size=50_265,
    num_layers=12,
    model_dim=768,
    num_heads=12,
    mlp_dim=3072,
    max_length=512,
    norm=LayerNorm(epsilon=1e-5),
    norm_placement="post",
    # The released tables have two rows that no token uses: positions are counted from behind the padding id.
    positions=Learned(offset=2),
    attention=MultiHead(use_qkv_bias=True, use_output_bias=True, dropout_rate=0.1),
    mlp=Mlp(activation="gelu", gated=False, use_bias=True),
    embedding_norm=True,
    num_token_types=1,
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
    """RoBERTa's pretraining (table 9); `tiny` is small enough for tests."""
    model = get_model(variant or "base")
    tiny = variant == "tiny"
    return Experiment(
        model=model,
        objective=ROBERTA,
        data=DataConfig(sequence_length=model.max_length),
        optimizer=OptimizerConfig(
            rule=AdamW(b2=0.98, epsilon=1e-6),
            schedule=Linear(warmup_steps=5 if tiny else 24_000),
            learning_rate=1e-3 if tiny else 6e-4,
            weight_decay=0.01,
        ),
        batch_size=8 if tiny else 8192,
        num_microbatches=1 if tiny else 128,
        num_steps=40 if tiny else 500_000,
    )
