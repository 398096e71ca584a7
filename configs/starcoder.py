"""StarCoder (Li et al. 2023): --config=configs/starcoder.py:tiny|1b|3b|7b|15b, causal with the middle filled in."""

import dataclasses

from lm.data import DataConfig
from lm.experiment import Experiment
from lm.models import Decoder, LayerNorm, Learned, Mlp, MultiHead, NormalInitializer
from lm.objectives import FillInTheMiddle
from lm.optim import AdamW, Cosine, OptimizerConfig

# Table 5: GPT-2's block with one head of keys and values, so that long files fit the cache.
STARCODER = Decoder(
    vocab_size=49_152,
    num_layers=40,
    model_dim=6144,
    num_heads=48,
    num_kv_heads=1,
    mlp_dim=24_576,
    max_length=8192,
    norm=LayerNorm(epsilon=1e-5),
    positions=Learned(),
    attention=MultiHead(use_qkv_bias=True, use_output_bias=True),
    mlp=Mlp(activation="gelu_tanh", gated=False, use_bias=True),
    tied_embeddings=True,
    initializer=NormalInitializer(stddev=0.02, residual_scaling=True),
    dropout_rate=0.1,
    dtype="bfloat16",
    remat="full",
)


def _size(num_layers: int, model_dim: int, num_heads: int) -> Decoder:
    return dataclasses.replace(
        STARCODER, num_layers=num_layers, model_dim=model_dim, num_heads=num_heads, mlp_dim=4 * model_dim
    )


MODELS = {
    "tiny": dataclasses.replace(_size(2, 32, 4), vocab_size=512, max_length=64, dtype="float32", remat="none"),
    "1b": _size(24, 2048, 16),
    "3b": _size(36, 2816, 22),
    "7b": _size(42, 4096, 32),
    "15b": STARCODER,
}


def get_model(variant: str = "15b") -> Decoder:
    """Returns the architecture alone."""
    if variant not in MODELS:
        raise ValueError(f"there are {', '.join(MODELS)}")
    return MODELS[variant]


def get_config(variant: str = "") -> Experiment:
    """Half of the texts with their middle at the end, in both orders; `tiny` is small enough for tests."""
    model = get_model(variant or "15b")
    tiny = variant == "tiny"
    return Experiment(
        model=model,
        objective=FillInTheMiddle(rate=0.5, spm_rate=0.5),
        data=DataConfig(sequence_length=model.max_length),
        optimizer=OptimizerConfig(
            rule=AdamW(b2=0.95),
            schedule=Cosine(warmup_steps=5 if tiny else 2000),
            learning_rate=1e-3 if tiny else 3e-4,
            weight_decay=0.1,
        ),
        batch_size=8 if tiny else 512,
        num_steps=40 if tiny else 250_000,
    )
