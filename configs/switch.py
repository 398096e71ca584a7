"""Switch Transformers (Fedus et al. 2022): --config=configs/switch.py:tiny|base_8|base_128|large_128|c_2048.

Encoder-decoders with T5's shapes and experts in every second layer (in every layer of c_2048); 0.6B to 1.6T parameters.
"""

import dataclasses

from lm.data import DataConfig
from lm.experiment import Experiment
from lm.models import (
    Bucketed,
    Capacity,
    EncoderDecoder,
    FanInInitializer,
    Layer,
    MixtureOfExperts,
    Mlp,
    MultiHead,
    RMSNorm,
    Router,
)
from lm.objectives import SpanCorruption
from lm.optim import Adafactor, InverseSquareRoot, OptimizerConfig


def make_layers(num_experts: int) -> tuple[Layer, ...]:
    """Returns a dense layer and one of so many experts, each token to one of them (section 2)."""
    experts = MixtureOfExperts(
        num_experts=num_experts,
        num_selected=1,
        activation="relu",
        gated=False,
        router=Router(jitter=0.01),
        dispatch=Capacity(factor=1.25),
        load_balance=0.01,
    )
    return (Layer(), Layer(mlp=experts))


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
    layers=make_layers(8),
    tied_embeddings=True,
    scale_logits=True,
    # Section 2.4: a tenth of the usual variance, for stability.
    initializer=FanInInitializer(scale=0.1),
    dropout_rate=0.1,
)

MODELS = {
    "tiny": dataclasses.replace(
        BASE,
        vocab_size=512,
        num_layers=2,
        model_dim=32,
        num_heads=4,
        head_dim=8,
        mlp_dim=64,
        max_length=64,
        layers=make_layers(4),
    ),
    "base_8": BASE,
    "base_128": dataclasses.replace(BASE, layers=make_layers(128)),
    "large_128": dataclasses.replace(
        BASE, num_layers=24, model_dim=1024, num_heads=16, mlp_dim=4096, layers=make_layers(128)
    ),
    "c_2048": dataclasses.replace(
        BASE, num_layers=15, model_dim=2080, num_heads=32, mlp_dim=6144, layers=make_layers(2048)[1:]
    ),
}


def get_model(variant: str = "base_8") -> EncoderDecoder:
    """Returns the architecture alone."""
    if variant not in MODELS:
        raise ValueError(f"there are {', '.join(MODELS)}")
    return MODELS[variant]


def get_config(variant: str = "") -> Experiment:
    """Span corruption on the user's text, as T5; `tiny` is small enough for tests."""
    model = get_model(variant or "base_8")
    tiny = variant == "tiny"
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
        batch_size=8 if tiny else 2048,
        num_steps=40 if tiny else 550_000,
    )
