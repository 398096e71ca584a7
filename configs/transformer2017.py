"""The Transformer (Vaswani et al. 2017): --config=configs/transformer2017.py:tiny|base|big.

Trained here on text alone: the first part of a segment is the source, the rest the target.
"""

import dataclasses

from lm.data import DataConfig
from lm.experiment import Experiment, LossConfig
from lm.models import EncoderDecoder, FanInInitializer, LayerNorm, Mlp, MultiHead, Sinusoidal
from lm.objectives import PrefixLM
from lm.optim import AdamW, InverseSquareRoot, OptimizerConfig

BASE = EncoderDecoder(
    vocab_size=37_000,
    num_layers=6,
    model_dim=512,
    num_heads=8,
    mlp_dim=2048,
    max_length=512,
    norm=LayerNorm(epsilon=1e-6),
    norm_placement="post",
    positions=Sinusoidal(),
    attention=MultiHead(),
    mlp=Mlp(activation="relu", gated=False, use_bias=True),
    tied_embeddings=True,
    scale_embeddings=True,
    # Embeddings are multiplied by sqrt(model_dim), and so begin small.
    initializer=FanInInitializer(table_stddev=512**-0.5),
    dropout_rate=0.1,
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
        initializer=FanInInitializer(table_stddev=32**-0.5),
    ),
    "base": BASE,
    "big": dataclasses.replace(
        BASE,
        model_dim=1024,
        num_heads=16,
        mlp_dim=4096,
        initializer=FanInInitializer(table_stddev=1024**-0.5),
        dropout_rate=0.3,
    ),
}


def get_model(variant: str = "base") -> EncoderDecoder:
    """Returns the architecture alone."""
    if variant not in MODELS:
        raise ValueError(f"there are {', '.join(MODELS)}")
    return MODELS[variant]


def get_config(variant: str = "") -> Experiment:
    """The paper's optimizer and regularisation (section 5); `tiny` is small enough for tests."""
    model = get_model(variant or "base")
    tiny = variant == "tiny"
    warmup = 5 if tiny else 4000
    return Experiment(
        model=model,
        objective=PrefixLM(),
        data=DataConfig(sequence_length=min(model.max_length, 256), encoder_length=min(model.max_length, 256)),
        optimizer=OptimizerConfig(
            rule=AdamW(b2=0.98, epsilon=1e-9),
            schedule=InverseSquareRoot(warmup_steps=warmup, plateau_steps=warmup),
            # The peak of model_dim^-0.5 * step^-0.5.
            learning_rate=1e-2 if tiny else (model.model_dim * warmup) ** -0.5,
            weight_decay=0.0,
        ),
        loss=LossConfig(label_smoothing=0.1),
        batch_size=8 if tiny else 96,
        num_steps=40 if tiny else 100_000,
    )
