"""Which attention kernel computes what, and which way of dividing a sequence takes what: tiny runs of each.

Owns the list of what can be asked of attention. Whether it is computed, and why not, is asked of
`Experiment.problems()`, of the check of a mesh and of the check of the devices; nothing is written here by hand.
"""

import dataclasses
from collections.abc import Mapping

from jax.sharding import AbstractMesh

from lm.config import ConfigError
from lm.experiment import Experiment
from lm.models import (
    Alibi,
    Auto,
    Blocked,
    Bucketed,
    Chunked,
    Cudnn,
    Gather,
    Latent,
    Layer,
    Plain,
    Relative,
    Ring,
    Splash,
    Ulysses,
)
from lm.models.kernels import platform_problems
from lm.parallel import MESH_AXES
from lm.training.division import check_attention

KERNELS = {type(kernel).__name__: kernel for kernel in (Plain(), Blocked(), Chunked(), Cudnn(), Splash(), Auto())}
WAYS = {type(way).__name__: way for way in (Ring(), Ulysses(), Gather())}
PLATFORMS = {"a CPU": "cpu", "an NVIDIA GPU": "gpu", "a TPU": "tpu"}
# Of the device mesh that divides a sequence.
NUM_SHARDS = 2
# By the name of the cell of objective and architecture, see `lm.evaluation.cells.SIGHTS`.
SIGHTS = {
    "causal": ("Causal", "Decoder"),
    "prefixes that see both ways": ("PrefixLM", "Decoder"),
    "both ways": ("MaskedLM (ROBERTA)", "Encoder"),
    "an encoder's result": ("SpanCorruption", "EncoderDecoder"),
}


def _with_model(run: Experiment, **changes: object) -> Experiment:
    return dataclasses.replace(run, model=dataclasses.replace(run.model, **changes))


def _with_attention(run: Experiment, **changes: object) -> Experiment:
    return _with_model(run, attention=dataclasses.replace(run.model.attention, **changes))


def ask(sights: Mapping[str, Experiment]) -> dict[str, Experiment]:
    """Returns a run for each thing that can be asked of attention, all but one in bfloat16.

    Args:
      sights: a run for each of `SIGHTS`.
    """
    sights = {name: _with_model(run, dtype="bfloat16") for name, run in sights.items()}
    causal = sights["causal"]
    latent = Latent(query_rank=None, kv_rank=8, nope_dim=4, rotary_dim=4, value_dim=4)
    return sights | {
        "fewer key heads than query heads": _with_model(causal, num_kv_heads=1),
        "windows": _with_model(causal, layers=(Layer(window=8),)),
        "a soft-cap on scores": _with_attention(causal, logit_softcap=50.0),
        "sinks": _with_attention(causal, sinks=True),
        "biases in buckets (T5)": _with_model(causal, positions=Bucketed()),
        "linear biases (ALiBi)": _with_model(causal, positions=Alibi()),
        "vectors of distances (Shaw)": _with_model(causal, positions=Relative()),
        "dropped weights": _with_attention(causal, dropout_rate=0.1),
        "float32": _with_model(causal, dtype="float32"),
        "heads of 12 channels": _with_model(causal, head_dim=12),
        "values narrower than keys (latent attention)": _with_model(causal, attention=latent),
    }


def by_kernel(asked: Experiment) -> dict[str, list[str]]:
    """Returns what each kernel says against a run."""
    return {name: _with_attention(asked, kernel=kernel).problems() for name, kernel in KERNELS.items()}


def on_platform(platform: str) -> dict[str, list[str]]:
    """Returns what each kernel says against devices of a kind."""
    return {name: platform_problems(kernel, platform) for name, kernel in KERNELS.items()}


def by_way(asked: Experiment) -> dict[str, list[str]]:
    """Returns what each way of dividing the sequence between `NUM_SHARDS` devices says against a run."""
    return {name: _divided_problems(_with_attention(asked, context_parallel=way)) for name, way in WAYS.items()}


def ask_divided(sights: Mapping[str, Experiment]) -> dict[str, Experiment]:
    """Returns a run for each thing that can be asked of a divided sequence; arguments as of `ask`."""
    asked, causal = ask(sights), _with_model(sights["causal"], dtype="bfloat16")
    odd = dataclasses.replace(causal, data=dataclasses.replace(causal.data, sequence_length=62))
    kernels = {f"kernel {name}": _with_attention(causal, kernel=kernel) for name, kernel in KERNELS.items()}
    others = {
        "rows of 62 tokens, twice an odd number": odd,
        "3 heads": _with_model(causal, num_heads=3, head_dim=8),
    }
    return asked | kernels | others


def _divided_problems(run: Experiment) -> list[str]:
    sizes = tuple(NUM_SHARDS if axis == "context" else 1 for axis in MESH_AXES)
    try:
        check_attention(run, AbstractMesh(sizes, MESH_AXES))
    except ConfigError as error:
        return run.problems() + str(error).splitlines()
    return run.problems()
