"""BART (Lewis et al. 2020): --config=configs/bart.py:tiny|base|large; an encoder-decoder that denoises."""

import dataclasses

from lm.data import DataConfig
from lm.experiment import Experiment
from lm.models import EncoderDecoder, LayerNorm, Learned, Mlp, MultiHead, NormalInitializer
from lm.objectives import BART
from lm.optim import AdamW, Linear, OptimizerConfig

BASE = EncoderDecoder(
    vocab_size=50_265,
    num_layers=6,
    model_dim=768,
    num_heads=12,
    mlp_dim=3072,
    max_length=1024,
    norm=LayerNorm(epsilon=1e-5),
    norm_placement="post",
    # As in the released model, whose position tables have two rows that no token uses.
    positions=Learned(offset=2),
    attention=MultiHead(use_qkv_bias=True, use_output_bias=True),
    mlp=Mlp(activation="gelu", gated=False, use_bias=True),
    embedding_norm=True,
    initializer=NormalInitializer(stddev=0.02, residual_scaling=False),
    dropout_rate=0.1,
)

MODELS = {
    "tiny": dataclasses.replace(
        BASE, vocab_size=512, num_layers=2, model_dim=32, num_heads=4, mlp_dim=64, max_length=64
    ),
    "base": BASE,
    "large": dataclasses.replace(BASE, num_layers=12, model_dim=1024, num_heads=16, mlp_dim=4096),
}


def get_model(variant: str = "base") -> EncoderDecoder:
    """Returns the architecture alone."""
    if variant not in MODELS:
        raise ValueError(f"there are {', '.join(MODELS)}")
    return MODELS[variant]


def get_config(variant: str = "") -> Experiment:
    """BART's pretraining (section 5); `tiny` is small enough for tests."""
    model = get_model(variant or "base")
    tiny = variant == "tiny"
    return Experiment(
        model=model,
        objective=BART(),
        data=DataConfig(sequence_length=min(model.max_length, 512), encoder_length=min(model.max_length, 512)),
        optimizer=OptimizerConfig(
            rule=AdamW(b2=0.98, epsilon=1e-6),
            schedule=Linear(warmup_steps=5 if tiny else 10_000),
            learning_rate=1e-3 if tiny else 4e-4,
            weight_decay=0.01,
        ),
        batch_size=8 if tiny else 8000,
        num_microbatches=1 if tiny else 125,
        num_steps=40 if tiny else 500_000,
    )
