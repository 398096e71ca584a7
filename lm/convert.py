"""Converts checkpoints: python -m lm.convert --from=DIR --to=DIR, to and from the format of Hugging Face.

From a Hugging Face folder (config.json, safetensors, tokenizer.json) to the folder of a run, which
lm.generate and lm.evaluate use; or from a run to a folder that `transformers` opens with from_pretrained.
To train on: python -m lm.train --config=RUN/config.json --config.init_from=RUN --workdir=NEW, where RUN is
what was written here. Exit status: 0 done, 2 something to mend, nothing written.
"""

import pathlib

from absl import flags

from lm import config as configs
from lm import flags as program
from lm.config import ConfigError

_FROM = flags.DEFINE_string("from", None, "Folder of a run, or of a Hugging Face checkpoint.")
_TO = flags.DEFINE_string("to", None, "Folder to write, in the other format; must be new or empty.")
_STEP = flags.DEFINE_integer("step", None, "Which checkpoint of the run (default: the newest).")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16", "float16"], "Of Hugging Face tensors.")


def _to_run(source: str, target: str) -> str:
    from lm import interop
    from lm.data import DataConfig, HuggingFace, load_tokenizer
    from lm.experiment import Experiment, suit
    from lm.training.checkpoints import save_params
    from lm.training.workdir import save_config

    model = interop.load_config(source)
    length, two_stacks = min(model.max_length, 1024), model.encoder_depth and model.decoder_depth
    tokenizer = HuggingFace(path=source)
    data = DataConfig(tokenizer=tokenizer, sequence_length=length, encoder_length=length if two_stacks else None)
    if problems := tokenizer.problems():
        raise ConfigError(f"{problems[0]}; transformers writes one with AutoTokenizer.save_pretrained")
    with interop.new_folder(pathlib.Path(target)) as partial:
        vocabulary = load_tokenizer(tokenizer, data, partial / "tokenizer")
        experiment = suit(model, data, vocabulary.specials)
        if problems := configs.check_types(experiment, Experiment):
            raise ConfigError("\n".join(problems))
        interop.copy_tokenizer(source, partial / "tokenizer")
        save_config(partial, experiment)
        save_params(partial, interop.load_params(source, model))
    return f"{target}: a run of {type(model).__name__}, {model.num_parameters():,} parameters"


def _to_checkpoint(source: str, target: str) -> str:
    from lm import interop
    from lm.training.assembly import load_run

    run = load_run(source, _STEP.value)
    start = next(iter(run.experiment.objective.traits.frame.start), "bos")
    settings = {"tokenizer_dir": run.workdir / "tokenizer", "specials": run.tokenizer.specials, "dtype": _DTYPE.value}
    architecture = interop.save(target, run.experiment.model, run.params, start=start, **settings)
    return f"{target}: step {run.step}, opens with transformers.{architecture}.from_pretrained"


def main(_: list[str]) -> int:
    """Converts what the flags name."""
    source, target = program.folder(_FROM.value, "--from"), program.folder(_TO.value, "--to")
    from lm.interop import is_checkpoint

    convert = _to_run if is_checkpoint(source) else _to_checkpoint
    print(convert(source, target))
    return 0


if __name__ == "__main__":
    program.run(main)
