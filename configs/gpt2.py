"""GPT-2 (Radford et al. 2019): --config=configs/gpt2.py:small|medium|large|xl, 124M to 1.5B parameters."""

from lm.data import DataConfig
from lm.experiment import Experiment
from lm.models import Decoder, LayerNorm, Learned, Mlp, MultiHead, NormalInitializer
from lm.optim import AdamW, Cosine, OptimizerConfig

# name: layers, width, heads
SIZES = {
    "tiny": (2, 64, 4),
    "small": (12, 768, 12),
    "medium": (24, 1024, 16),
    "large": (36, 1280, 20),
    "xl": (48, 1600, 25),
}


def get_model(variant: str = "small") -> Decoder:
    """Returns the architecture alone."""
    if variant not in SIZES:
        raise ValueError(f"there are {', '.join(SIZES)}")
    num_layers, model_dim, num_heads = SIZES[variant]
    return Decoder(
        vocab_size=50257,
        num_layers=num_layers,
        model_dim=model_dim,
        num_heads=num_heads,
        mlp_dim=4 * model_dim,
        max_length=1024,
        norm=LayerNorm(),
        positions=Learned(),
        attention=MultiHead(use_qkv_bias=True, use_output_bias=True),
        mlp=Mlp(activation="gelu_tanh", gated=False, use_bias=True),
        tied_embeddings=True,
        initializer=NormalInitializer(stddev=0.02, residual_scaling=True),
    )


def get_config(variant: str = "") -> Experiment:
    """GPT-2 on the user's text with the tokens per update of nanoGPT's reproduction (about half a million)."""
    return Experiment(
        model=get_model(variant or "small"),
        data=DataConfig(sequence_length=1024),
        optimizer=OptimizerConfig(
            rule=AdamW(b2=0.95),
            schedule=Cosine(warmup_steps=2000),
            learning_rate=6e-4,
            weight_decay=0.1,
        ),
        batch_size=480,
        num_microbatches=40,
        num_steps=600_000,
    )
