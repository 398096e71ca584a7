"""The train step of two sizes beside a plain PyTorch GPT, where torch is installed: python -m benchmarks.train_step

The short form of `python -m benchmarks.run --subjects=train-tiny,train-small --against=torch`, with its flags.
"""

import importlib.util

from absl import flags

from benchmarks import run
from lm import flags as program

if __name__ == "__main__":
    flags.FLAGS.set_default("subjects", ["train-tiny", "train-small"])
    flags.FLAGS.set_default("against", ["torch"] if importlib.util.find_spec("torch") else [])
    program.run(run.main)
