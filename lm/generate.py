"""Continues prompts with a trained run: python -m lm.generate --workdir=runs/quickstart --prompt="Once upon"

One prompt is written as its text is made; several (or several samples) are made in batches. Prompts
are also read from a file, or from standard input with --prompt_file=-, one a line. With --suffix a run that was
trained to (fill-in-the-middle, span corruption, UL2, GLM) fills in what stands between prompt and suffix.
"""

import sys

from absl import flags

from lm import flags as program
from lm.config import ConfigError

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
_STEP = flags.DEFINE_integer("step", None, "Which checkpoint (default: the newest).")
_PROMPT = flags.DEFINE_multi_string("prompt", [], "Text to continue; may be given several times.")
_SUFFIX = flags.DEFINE_string("suffix", None, "Text to fill in before: what is made stands between prompt and suffix.")
_PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "File with one prompt a line; - is standard input.")
_NUM_SAMPLES = flags.DEFINE_integer("num_samples", 1, "Continuations of each prompt.", lower_bound=1)
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", None, "Most tokens to make (default: what fits, up to 256).")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 is greedy, 1 is the model's own distribution.")
_TOP_K = flags.DEFINE_integer("top_k", None, "Draw from the k most likely tokens only.")
_TOP_P = flags.DEFINE_float("top_p", None, "Draw from the most likely tokens that make up this probability only.")
_COMPONENT = flags.DEFINE_string("component", None, "Objective of a mixture to prompt as (default: the first able).")
_MODE = flags.DEFINE_string("mode", None, "Mode token of a prompt to UL2: R, S, X (default: S; R to fill in).")
_SEED = flags.DEFINE_integer("seed", 0, "Seed; a prompt's text does not depend on the batch it sits in.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Rows made together.", lower_bound=1)


def _read_prompts() -> list[str]:
    prompts = list(_PROMPT.value)
    if _PROMPT_FILE.value is not None:
        try:
            with open(0 if _PROMPT_FILE.value == "-" else _PROMPT_FILE.value, encoding="utf-8") as lines:
                prompts += [line.rstrip("\r\n") for line in lines if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--prompt_file={_PROMPT_FILE.value}: {error}") from error
    return prompts or [""]


def main(_: list[str]) -> int:
    """Generates with the run that the flags name."""
    workdir = program.folder(_WORKDIR.value, "--workdir", " of a trained run")
    prompts = [prompt for prompt in _read_prompts() for _ in range(_NUM_SAMPLES.value)]
    from lm.decoding import Sampling, arrange, build_decoder, choose_frame, complete_texts, fit_max_tokens, stream_text
    from lm.training.assembly import load_run

    sampling = Sampling(temperature=_TEMPERATURE.value, top_k=_TOP_K.value, top_p=_TOP_P.value)
    if problems := sampling.problems():
        raise ConfigError("; ".join(f"--{problem}" for problem in problems))
    run = load_run(workdir, _STEP.value)
    traits, suffix = run.experiment.objective.traits, _SUFFIX.value or ""
    frame = choose_frame(traits, _COMPONENT.value, _MODE.value, fill_in=_SUFFIX.value is not None)
    most = fit_max_tokens(run.model, run.tokenizer, prompts, 256, frame, suffix)
    most = most if _MAX_TOKENS.value is None else _MAX_TOKENS.value
    settings = {"seed": _SEED.value, "frame": frame, "suffix": suffix}
    with run.assembly.placed():
        model, params = arrange(run.model, run.params)
        decoder = build_decoder(model, run.tokenizer, frame, sampling, most)
        if len(prompts) == 1:
            pieces = stream_text(decoder, params, run.tokenizer, prompts[0], **settings)
            # The first piece is made before anything is printed: a prompt that is too long is refused there.
            print(prompts[0] + next(pieces), end="", flush=True)
            for piece in pieces:
                print(piece, end="", flush=True)
            print(suffix)
            return 0
        settings["batch_size"] = _BATCH_SIZE.value
        completed = complete_texts(decoder, params, run.tokenizer, prompts, **settings)
        for i, (text, continuation) in enumerate(zip(prompts, completed, strict=True)):
            print(f"--- {i + 1} of {len(prompts)}\n{text}{continuation}{suffix}", flush=True)
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]  # a terminal may be declared ASCII
    program.run(main)
