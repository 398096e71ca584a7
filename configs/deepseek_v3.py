"""DeepSeek-V3 (DeepSeek-AI 2024): --config=configs/deepseek_v3.py:tiny|671b, 671B parameters, 37B of them active."""

import dataclasses

from lm.data import DataConfig
from lm.experiment import Experiment
from lm.models import (
    BiasBalancing,
    Decoder,
    ExpertGroups,
    Latent,
    Layer,
    MixtureOfExperts,
    Mlp,
    NormalInitializer,
    RMSNorm,
    Rotary,
    Router,
    SharedExpert,
)
from lm.optim import AdamW, Cosine, OptimizerConfig

MIXTURE = MixtureOfExperts(
    num_experts=256,
    num_selected=8,
    dim=2048,
    router=Router(
        score="sigmoid",
        normalize=True,
        scale=2.5,
        groups=ExpertGroups(num_groups=8, num_selected=4, score="best_two"),
        balancing=BiasBalancing(step=1e-3),
    ),
    shared=SharedExpert(dim=2048),
    # Section 4.2 has 1e-4 for the form that divides by the 8 experts per token.
    load_balance=1e-4 / 8,
    balance_rows=True,
)
DENSE = Layer(mlp=Mlp(activation="silu", gated=True))

DEEPSEEK_V3 = Decoder(
    vocab_size=129_280,
    num_layers=61,
    model_dim=7168,
    num_heads=128,
    mlp_dim=18_432,
    max_length=4096,
    norm=RMSNorm(epsilon=1e-6),
    positions=Rotary(theta=10_000.0),
    attention=Latent(query_rank=1536, kv_rank=512, nope_dim=128, rotary_dim=64, value_dim=128),
    mlp=MIXTURE,
    first_layers=(DENSE, DENSE, DENSE),
    tied_embeddings=False,
    initializer=NormalInitializer(stddev=0.006, residual_scaling=False),
    dtype="bfloat16",
    remat="full",
)

MODELS = {
    "tiny": dataclasses.replace(
        DEEPSEEK_V3,
        vocab_size=512,
        num_layers=3,
        model_dim=32,
        num_heads=4,
        mlp_dim=64,
        max_length=64,
        attention=Latent(query_rank=16, kv_rank=16, nope_dim=8, rotary_dim=8, value_dim=8),
        mlp=dataclasses.replace(
            MIXTURE,
            num_experts=8,
            num_selected=2,
            dim=32,
            router=dataclasses.replace(
                MIXTURE.router, groups=ExpertGroups(num_groups=4, num_selected=2, score="best_two")
            ),
            shared=SharedExpert(dim=32),
        ),
        first_layers=(DENSE,),
        initializer=NormalInitializer(),
        dtype="float32",
        remat="none",
    ),
    "671b": DEEPSEEK_V3,
}


def get_model(variant: str = "671b") -> Decoder:
    """Returns the architecture alone."""
    if variant not in MODELS:
        raise ValueError(f"there are {', '.join(MODELS)}")
    return MODELS[variant]


def get_config(variant: str = "") -> Experiment:
    """DeepSeek-V3 from scratch on the user's text; `tiny` is small enough for tests."""
    model = get_model(variant or "671b")
    tiny = variant == "tiny"
    return Experiment(
        model=model,
        data=DataConfig(sequence_length=min(model.max_length, 8192)),
        optimizer=OptimizerConfig(
            rule=AdamW(b2=0.95),
            schedule=Cosine(warmup_steps=5 if tiny else 2000),
            learning_rate=1e-2 if tiny else 3e-4,
        ),
        batch_size=8 if tiny else 512,
        num_steps=40 if tiny else 500_000,
    )
