"""The families at matched operations: --config=configs/compare.py:causal|prefix|mlm|span|ul2|moe, minutes each.

Equal tokenizer, text, width, optimizer and (within a step) number of operations; docs of `lm.report` show how all are
run and drawn together.
"""

import dataclasses
from typing import Any

from lm.data import Bytes, DataConfig
from lm.experiment import CheckpointConfig, EvaluationConfig, Experiment, LoggingConfig
from lm.models import Decoder, Dropless, Encoder, EncoderDecoder, MixtureOfExperts, MultiHead, RMSNorm
from lm.objectives import UL2, AnyObjective, Causal, MaskedLM, PrefixLM, SpanCorruption
from lm.optim import AdamW, OptimizerConfig, WarmupStableDecay

BUDGET = 4e12  # floating point operations of a run, as `flops_per_token` counts them
SIZES: dict[str, Any] = {
    "vocab_size": 384,
    "model_dim": 128,
    "num_heads": 4,
    "mlp_dim": 384,
    "max_length": 256,
    "norm": RMSNorm(),
    "attention": MultiHead(qk_norm="head"),
    "scan_layers": False,
}
DECODER = Decoder(**SIZES, num_layers=4)
# Two towers of half the depth.
PAIR = EncoderDecoder(**SIZES, num_layers=2)
# Four experts of half the width, two for each token: as many operations as the dense layer, twice the weights.
EXPERTS = MixtureOfExperts(num_experts=4, num_selected=2, dim=192, dispatch=Dropless(), load_balance=0.01)

Model = Decoder | Encoder | EncoderDecoder
# model, objective, decoder row (or only row), encoder row
VARIANTS: dict[str, tuple[Model, AnyObjective, int, int | None]] = {
    "causal": (DECODER, Causal(), 256, None),
    "prefix": (DECODER, PrefixLM(), 256, None),
    "mlm": (Encoder(**SIZES, num_layers=4), MaskedLM(), 256, None),
    "span": (PAIR, SpanCorruption(), 64, 256),
    "ul2": (PAIR, UL2(), 256, 256),
    "moe": (dataclasses.replace(DECODER, mlp=EXPERTS), Causal(), 256, None),
    "tiny": (dataclasses.replace(DECODER, num_layers=1, model_dim=32), Causal(), 64, None),
}


def get_config(variant: str = "") -> Experiment:
    """A run of `BUDGET` operations; `tiny` is small enough for tests."""
    variant = variant or "causal"
    if variant not in VARIANTS:
        raise ValueError(f"there are {', '.join(VARIANTS)}")
    model, objective, length, encoder_length = VARIANTS[variant]
    batch_size = 8 if variant != "span" else 16
    step = model.flops_per_token(length, encoder_length) * length * batch_size
    num_steps = 40 if variant == "tiny" else round(BUDGET / step)
    return Experiment(
        model=model,
        objective=objective,
        data=DataConfig(
            tokenizer=Bytes(num_sentinels=100),
            sequence_length=length,
            encoder_length=encoder_length,
            validation_fraction=0.01,
        ),
        optimizer=OptimizerConfig(
            rule=AdamW(),
            schedule=WarmupStableDecay(warmup_steps=num_steps // 20, decay_steps=num_steps // 4),
            learning_rate=3e-3,
        ),
        num_steps=num_steps,
        batch_size=batch_size,
        evaluation=EvaluationConfig(every=max(1, num_steps // 8), batch_size=16),
        checkpoint=CheckpointConfig(every=max(1, num_steps // 2)),
        logging=LoggingConfig(every=max(1, num_steps // 40)),
    )
