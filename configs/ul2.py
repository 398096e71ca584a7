"""UL2 (Tay et al. 2022): --config=configs/ul2.py:tiny|base|20b (encoder-decoder) or decoder_tiny|decoder_base."""

import dataclasses

from lm.data import Bytes, DataConfig
from lm.experiment import Experiment
from lm.models import Bucketed, Decoder, EncoderDecoder, FanInInitializer, Mlp, MultiHead, RMSNorm
from lm.objectives import UL2
from lm.optim import Adafactor, InverseSquareRoot, OptimizerConfig

# Section 4.2: T5 1.1's shape with SwiGLU.
BASE = EncoderDecoder(
    vocab_size=32_128,
    num_layers=12,
    model_dim=768,
    num_heads=12,
    head_dim=64,
    mlp_dim=2048,
    max_length=512,
    norm=RMSNorm(epsilon=1e-6),
    positions=Bucketed(num_buckets=32, max_distance=128),
    attention=MultiHead(scale=1.0),
    mlp=Mlp(activation="silu", gated=True),
    tied_embeddings=False,
    initializer=FanInInitializer(),
)
DECODER = Decoder(
    vocab_size=32_128,
    num_layers=12,
    model_dim=768,
    num_heads=12,
    head_dim=64,
    mlp_dim=2048,
    max_length=1024,
    norm=RMSNorm(epsilon=1e-6),
    mlp=Mlp(activation="silu", gated=True),
    tied_embeddings=False,
)
TINY = {"vocab_size": 512, "num_layers": 2, "model_dim": 32, "num_heads": 4, "head_dim": 8, "mlp_dim": 64}

MODELS: dict[str, EncoderDecoder | Decoder] = {
    "tiny": dataclasses.replace(BASE, **TINY, max_length=64),
    "base": BASE,
    "20b": dataclasses.replace(BASE, num_layers=32, model_dim=4096, num_heads=16, head_dim=256, mlp_dim=16_384),
    "decoder_tiny": dataclasses.replace(DECODER, **TINY, max_length=128),
    "decoder_base": DECODER,
}


def get_model(variant: str = "base") -> EncoderDecoder | Decoder:
    """Returns the architecture alone."""
    if variant not in MODELS:
        raise ValueError(f"there are {', '.join(MODELS)}")
    return MODELS[variant]


def get_config(variant: str = "") -> Experiment:
    """The mixture of seven denoisers (table 1); the tiny ones are small enough for tests."""
    model = get_model(variant or "base")
    tiny = variant.endswith("tiny")
    return Experiment(
        model=model,
        objective=UL2(),
        data=DataConfig(
            # Half of the tokens in runs of three: the extreme denoisers need many sentinels.
            tokenizer=Bytes(num_sentinels=100 if tiny else 256),
            sequence_length=model.max_length,
            encoder_length=model.max_length if model.encoder_depth else None,
        ),
        optimizer=OptimizerConfig(
            rule=Adafactor(),
            schedule=InverseSquareRoot(warmup_steps=5 if tiny else 10_000),
            learning_rate=1e-2,
            weight_decay=0.0,
        ),
        batch_size=8 if tiny else 128,
        num_steps=40 if tiny else 500_000,
    )
