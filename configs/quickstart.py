"""The first run: a small modern decoder on the Python standard library's own text, minutes on two CPU cores."""

from lm.data import DataConfig, SentencePiece
from lm.experiment import CheckpointConfig, EvaluationConfig, Experiment, LoggingConfig
from lm.models import Decoder, Mlp, MultiHead, RMSNorm, Rotary
from lm.optim import AdamW, OptimizerConfig, WarmupStableDecay


def get_config(variant: str = "") -> Experiment:
    """About 4 million parameters; read with `python -m lm.train --help --config=configs/quickstart.py`."""
    if variant:
        raise ValueError("quickstart has no variants")
    return Experiment(
        model=Decoder(
            vocab_size=2048,
            num_layers=4,
            model_dim=256,
            num_heads=4,
            num_kv_heads=2,
            mlp_dim=768,
            max_length=256,
            norm=RMSNorm(),
            positions=Rotary(),
            attention=MultiHead(qk_norm="head"),
            mlp=Mlp(activation="silu", gated=True),
            tied_embeddings=True,
            # Four layers compile quickly enough written out, and run faster so on a CPU.
            scan_layers=False,
        ),
        data=DataConfig(
            tokenizer=SentencePiece(vocab_size=2048, training_megabytes=2),
            sequence_length=256,
        ),
        optimizer=OptimizerConfig(
            rule=AdamW(),
            schedule=WarmupStableDecay(warmup_steps=20, decay_steps=90),
            learning_rate=3e-3,
        ),
        num_steps=240,
        batch_size=8,
        evaluation=EvaluationConfig(every=80, num_batches=8),
        checkpoint=CheckpointConfig(every=80, keep_best=1),
        logging=LoggingConfig(every=5),
    )
