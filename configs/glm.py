"""GLM (Du et al. 2022): --config=configs/glm.py:tiny|base|large|10b, blank infilling by one stack."""

import dataclasses

from lm.data import DataConfig
from lm.experiment import Experiment
from lm.models import Decoder, LayerNorm, Learned, Mlp, MultiHead, NormalInitializer
from lm.objectives import GLM, Component, Mixture, SentenceBlanks, SuffixBlank
from lm.optim import AdamW, Cosine, OptimizerConfig

# Section 2.3: a pre-norm Transformer with GELU and a single output projection, and two tables of learned positions.
BASE = Decoder(
    vocab_size=30_522,
    num_layers=12,
    model_dim=768,
    num_heads=12,
    mlp_dim=3072,
    max_length=512,
    norm=LayerNorm(),
    positions=Learned(),
    attention=MultiHead(use_qkv_bias=True, use_output_bias=True),
    mlp=Mlp(activation="gelu_tanh", gated=False, use_bias=True),
    num_block_positions=512,
    tied_embeddings=True,
    initializer=NormalInitializer(stddev=0.02, residual_scaling=True),
    dropout_rate=0.1,
)

MODELS = {
    "tiny": dataclasses.replace(
        BASE, vocab_size=512, num_layers=2, model_dim=32, num_heads=4, mlp_dim=64, max_length=64, num_block_positions=64
    ),
    "base": BASE,
    "large": dataclasses.replace(BASE, num_layers=24, model_dim=1024, num_heads=16, mlp_dim=4096),
    "10b": dataclasses.replace(
        BASE,
        vocab_size=50_304,
        num_layers=48,
        model_dim=4096,
        num_heads=64,
        mlp_dim=16_384,
        max_length=1024,
        num_block_positions=1024,
        dtype="bfloat16",
        remat="full",
    ),
}
# Of the released 10B model: short blanks, whole sentences, and one long blank at the end for generation.
MIXED = Mixture(
    components=(
        Component(name="short", objective=GLM(), weight=0.5),
        Component(name="sentence", objective=GLM(blanks=SentenceBlanks()), weight=0.3),
        Component(name="suffix", objective=GLM(blanks=SuffixBlank(min_rate=0.25)), weight=0.2),
    )
)


def get_model(variant: str = "base") -> Decoder:
    """Returns the architecture alone."""
    if variant not in MODELS:
        raise ValueError(f"there are {', '.join(MODELS)}")
    return MODELS[variant]


def get_config(variant: str = "") -> Experiment:
    """Short blanks, in `10b` the mixture of three kinds; `tiny` is small enough for tests."""
    model = get_model(variant or "base")
    tiny = variant == "tiny"
    return Experiment(
        model=model,
        objective=MIXED if variant == "10b" else GLM(),
        data=DataConfig(sequence_length=model.max_length),
        optimizer=OptimizerConfig(
            rule=AdamW(b2=0.98, epsilon=1e-6),
            schedule=Cosine(warmup_steps=5 if tiny else 8000),
            learning_rate=1e-3 if tiny else 4e-4 if model.num_layers == 12 else 2e-4,
            weight_decay=0.1,
        ),
        batch_size=8 if tiny else 1024,
        num_steps=40 if tiny else 200_000,
    )
