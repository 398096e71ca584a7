"""Held-out loss of the run's own objective, and bits per byte by the yardstick that all runs share.

Knows no architecture; `lm.evaluation.yardstick` says how a text is scored. Law: the answer does not
depend on the batch size or the number of processes, because sums, not means, are added, in float64 on
the host, each token's exactly once.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lm.data import Batches, DataConfig, validation_batches
from lm.document import Objective
from lm.evaluation.yardstick import choose_yardstick
from lm.training.assembly import Assembly, row_shards
from lm.training.measuring import Evaluate
from lm.training.state import Tree
from lm.training.step import make_evaluation_step


@dataclasses.dataclass
class HeldOut:
    """Sums over the batches seen so far.

    Attributes:
      nll: negative log-likelihood in nats.
      weight: sum of the loss weights.
      correct: weight of the tokens that were the most likely ones.
      tokens: number of loss tokens.
      bytes: UTF-8 bytes those tokens stand for.
      counts: i64[V], how often each token was a target.
    """

    counts: np.ndarray
    nll: float = 0.0
    weight: float = 0.0
    correct: float = 0.0
    tokens: float = 0.0
    bytes: float = 0.0

    def figures(self) -> dict[str, float]:
        """Returns nll (nats a token), perplexity, bits_per_byte, accuracy, tokens, bytes, unigram_bits_per_byte.

        The last one is the entropy of the same targets' own frequencies: what a model that knows only
        how common each token is would need.
        """
        nll = self.nll / max(self.weight, 1e-9)
        tokens_per_byte = self.tokens / max(self.bytes, 1.0)
        share = self.counts[self.counts > 0] / max(self.counts.sum(), 1)
        unigram = float(-(share * np.log2(share)).sum())
        return {
            "nll": nll,
            "perplexity": math.exp(min(nll, 700.0)),
            "bits_per_byte": nll / math.log(2.0) * tokens_per_byte,
            "accuracy": self.correct / max(self.weight, 1e-9),
            "tokens": self.tokens,
            "bytes": self.bytes,
            "unigram_bits_per_byte": unigram * tokens_per_byte,
        }


# The figures that compare runs of different objectives, and so come from the yardstick.
SHARED = ("bits_per_byte", "unigram_bits_per_byte", "bytes")


def _go_on() -> None:
    """Leaves no evaluation off."""


def make_evaluate(assembly: Assembly, data: DataConfig | None = None, batch_size: int | None = None) -> Evaluate:
    """Returns the held-out evaluation of a run; see `HeldOut.figures`. Without a split there are none.

    The loss, perplexity, accuracy and tokens are of the run's own objective; what `SHARED` names is of the yardstick,
    which for a causal model is the same.

    Args:
      assembly: the parts of the run.
      data: another corpus to score; None is the run's own held-out split.
      batch_size: rows per batch, rounded up to fill the devices; None is what the config says.
    """
    config = assembly.experiment
    rows = batch_size or config.evaluation.batch_size or config.batch_size
    shards = row_shards(assembly.mesh)
    rows = -(-rows // shards) * shards
    if data is None and not config.data.validation_fraction:
        return lambda params, whole, check=_go_on: {}
    # Opened once before training, so that what is wrong with the split is said at the start.
    _open(assembly, data, config.objective, rows).close()
    yardstick = choose_yardstick(config.objective, config.model.layout).objective
    step = make_evaluation_step(config.loss, assembly.model, assembly.tokenizer.token_bytes)
    # Whole in every process, which all add up the same sums.
    step = jax.jit(step, out_shardings=NamedSharding(assembly.mesh, PartitionSpec()))

    def score(objective: Objective, params: Tree, whole: bool, check: Callable[[], None]) -> dict[str, float]:
        total = HeldOut(np.zeros(assembly.tokenizer.size, np.int64))
        batches = _open(assembly, data, objective, rows)
        try:
            limit = None if whole else config.evaluation.num_batches
            with assembly.placed():
                for batch in itertools.islice(batches, limit):
                    check()
                    result = step(params, assembly.place(batch))
                    _add(total, jax.device_get(result))
        finally:
            batches.close()
        return total.figures()

    def evaluate(params: Tree, whole: bool, check: Callable[[], None] = _go_on) -> dict[str, float]:
        own = score(config.objective, params, whole, check)
        if yardstick == config.objective:
            return own
        shared = score(yardstick, params, whole, check)
        return own | {name: shared[name] for name in SHARED}

    return evaluate


def _open(assembly: Assembly, data: DataConfig | None, objective: Objective, rows: int) -> Batches:
    config = assembly.experiment
    return validation_batches(data or config.data, objective, assembly.tokenizer, rows, *assembly.row_block())


def _add(total: HeldOut, result: Any) -> None:
    (tokens, _, _), counts = result
    total.nll += float(tokens.nll)
    total.weight += float(tokens.weight)
    total.correct += float(tokens.correct)
    total.tokens += float(counts["loss_tokens"])
    total.bytes += float(counts["loss_bytes"])
    total.counts += counts["targets"].astype(np.int64)
