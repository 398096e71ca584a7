"""Makes the artefact of this version, at each release: python -m tests.training.artefacts

Trains a tiny run on the corpus beside this file and keeps its folder as it stood after step 2, with the figures of the
steps that followed. It is never made again for a version that is out.
"""

import json
import pathlib
import shutil
import sys
import tempfile

import lm
from lm.data import Bytes, DataConfig
from lm.evaluation.heldout import make_evaluate
from lm.experiment import CheckpointConfig, EvaluationConfig, Experiment, LoggingConfig
from lm.models import Decoder
from lm.optim import Average, Constant, OptimizerConfig
from lm.training.logging import read_metrics
from lm.training.loop import train

HERE = pathlib.Path(__file__).parent
KEPT_STEP = 2
# What tells of the machine and is read by nobody.
PRIVATE = ("argv", "host", "platform", "xla_flags")


def get_config() -> Experiment:
    return Experiment(
        model=Decoder(vocab_size=371, num_layers=2, model_dim=8, num_heads=2, mlp_dim=16, max_length=16),
        # Relative to the root of the repository, where tests and this program run.
        data=DataConfig(
            source="tests/training/artefacts/corpus/*.txt",
            tokenizer=Bytes(),
            sequence_length=16,
            validation_fraction=0.3,
            window=4,
        ),
        optimizer=OptimizerConfig(schedule=Constant(), learning_rate=1e-2, average=Average(decay=0.9)),
        batch_size=8,
        num_steps=6,
        evaluation=EvaluationConfig(num_batches=1),
        checkpoint=CheckpointConfig(every=KEPT_STEP, keep_last=10),
        logging=LoggingConfig(every=1, tensorboard=False, progress="none"),
        compilation_cache=None,
    )


def make(target: pathlib.Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = pathlib.Path(folder) / "run"
        train(get_config(), str(run), make_evaluate)
        lines = list(read_metrics(run / "metrics.jsonl"))
        expected = [line for line in lines if line["step"] > KEPT_STEP]
        kept = [line for line in lines if line["step"] <= KEPT_STEP]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
        for checkpoint in (run / "checkpoints").iterdir():
            if checkpoint.name != str(KEPT_STEP):
                shutil.rmtree(checkpoint)
        record = json.loads((run / "run.json").read_text())
        record["starts"] = [{k: v for k, v in start.items() if k not in PRIVATE} for start in record["starts"]]
        (run / "run.json").write_text(json.dumps(record, indent=2) + "\n")
        for lock in run.glob("lock.*"):
            lock.unlink()
        for note in run.rglob("commit_success.txt"):
            note.write_text(note.read_text().replace(folder, ""))
        shutil.copytree(run, target / "run")
        names = ("step", "split", "loss", "nll", "gradient_norm")
        figures = [{name: line[name] for name in names if name in line} for line in expected]
        (target / "expected.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    folder = HERE / lm.__version__
    if folder.exists():
        sys.exit(f"{folder} is there; raise lm.__version__ first")
    make(folder)
