"""What is measured: the models and shapes of each suite, and who runs them.

A subject of the CPU's suite that is too big for one says in its note what was cut. Knows no way of
measuring. Law: every contender of a subject has the same shapes, dtype and data.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from benchmarks import ours
from benchmarks.measuring import Comparison, Contender, Named
from benchmarks.results import Row, Sample
from benchmarks.rows import Rows
from configs import bert, gpt2, llama3, mixtral, t5
from lm.models import Auto, Mlp, Rotary, accounting
from lm.models.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """The whole train step: forward, backward, clipping, AdamW.

    Attributes:
      model: its shape.
      rows: its data.
      note: what was cut.
    """

    model: Transformer
    rows: Rows
    note: str = ""

    def compare(self, name: str, dtype: str, against: Mapping[str, str], folder: pathlib.Path) -> Comparison:
        """Returns the comparison with the peers that have such a model; they start from our weights in `folder`.

        `against` has by the peer's name the Python that runs it.
        """
        attention = dataclasses.replace(self.model.attention, kernel=Auto())
        model = dataclasses.replace(self.model, dtype=dtype, attention=attention)
        weights = str(folder / "weights")
        contenders = [Contender("lm", ours.train_work, (model, self.rows, weights))]
        if "torch" in against and type(model.positions).__name__ == "Learned" and model.decoder_depth:
            shape = {"num_layers": model.num_layers, "dim": model.model_dim, "num_heads": model.num_heads}
            contenders += _both("torch", "gpt_work", (shape, self.rows, dtype))
        if "transformers" in against:
            contenders += _both("transformers", "transformers_train_work", (weights, self.rows, dtype))
        if "maxtext" in against and _is_llama(self.model):
            make = Named("benchmarks.maxtext_llama", "train_work")
            contenders.append(Contender("maxtext", make, (weights, self.rows, dtype), against["maxtext"]))
        flops = self.model.flops_per_token(self.rows.length, self.rows.encoder_length)
        work = {"step": (self.rows.size, flops * self.rows.batch * self.rows.length)}
        return Comparison(name, dtype, tuple(contenders), work, self.note)


@dataclasses.dataclass(frozen=True)
class Generation:
    """Greedy generation from random prompts of one length.

    Attributes:
      model: its shape.
      rows: prompts.
      new_tokens: how many are made after the first.
      note: what was cut.
    """

    model: Transformer
    rows: Rows
    new_tokens: int
    note: str = ""

    def compare(self, name: str, dtype: str, against: Mapping[str, str], folder: pathlib.Path) -> Comparison:
        """Returns the comparison with `transformers.generate` on our weights."""
        model = dataclasses.replace(self.model, dtype=dtype)
        weights = str(folder / "weights")
        contenders = [Contender("lm", ours.generate_work, (model, self.rows, self.new_tokens, weights))]
        if "transformers" in against:
            arguments = (weights, self.rows, self.new_tokens, dtype)
            contenders.append(
                Contender("transformers", Named("benchmarks.peers", "transformers_generate_work"), arguments)
            )
        work = {"prompt": (self.rows.size, None), "whole": (self.rows.batch * (self.new_tokens + 1), None)}
        return Comparison(name, dtype, tuple(contenders), work, self.note, copies=True)

    def bytes_read(self, dtype: str) -> float:
        """Returns how many bytes of weights and cache decoding cannot but read, all kept in `dtype`."""
        model = dataclasses.replace(self.model, dtype=dtype)
        weights = accounting.num_active_parameters(model.build().parameters()) * model.compute_dtype.itemsize
        length = self.rows.length + self.new_tokens / 2
        return self.new_tokens * (weights + self.rows.batch * length * accounting.cache_bytes_per_token(model))


def _is_llama(model: Transformer) -> bool:
    """Returns whether MaxText's block of the name "llama2" is the model's: rotary positions unscaled, a gated MLP."""
    positions = model.positions
    return (
        isinstance(positions, Rotary) and positions.scaling is None and isinstance(model.mlp, Mlp) and model.mlp.gated
    )


def _both(who: str, make: str, arguments: tuple[Any, ...]) -> list[Contender]:
    ways = ((False, "eager"), (True, "compiled"))
    function = Named("benchmarks.peers", make)
    return [Contender(f"{who} {way}", function, (*arguments, compiled)) for compiled, way in ways]


def add_decoding(rows: list[Row], new_tokens: int, batch: int, bytes_read: float) -> list[Row]:
    """Adds the part "decode", which reads so many bytes: generation without its prompt and first token, by rounds."""
    prompts = {row.who: row for row in rows if row.part == "prompt"}
    found = []
    for row in rows:
        if row.part == "whole":
            pairs = zip(row.samples, prompts[row.who].samples, strict=True)
            samples = [Sample(*(max(a - b, 1e-9) for a, b in zip(*pair, strict=True))) for pair in pairs]
            made = {"tokens": new_tokens * batch, "first": 0.0, "moved": bytes_read}
            found.append(dataclasses.replace(row, part="decode", samples=samples, **made))
    return rows + found


def _gpt(variant: str, **changes: Any) -> Transformer:
    return dataclasses.replace(gpt2.get_model(variant), **changes)


def _scaled(num_layers: int, model_dim: int, length: int) -> Transformer:
    sizes = {"num_layers": num_layers, "model_dim": model_dim, "num_heads": model_dim // 64, "mlp_dim": 4 * model_dim}
    return _gpt("small", vocab_size=8192, max_length=length, **sizes)


_TINY = _scaled(4, 256, 256)
_GPT2 = _gpt("small")
_BERT = dataclasses.replace(
    bert.get_model("base"),
    num_classes=0,
    dropout_rate=0.0,
    attention=dataclasses.replace(bert.get_model("base").attention, dropout_rate=0.0),
)
_T5 = t5.get_model("base")
_TINY_LLAMA = dataclasses.replace(
    llama3.get_model("tiny"),
    vocab_size=8192,
    num_layers=4,
    model_dim=256,
    num_heads=4,
    num_kv_heads=2,
    mlp_dim=768,
    max_length=256,
)
_MOE = dataclasses.replace(
    mixtral.get_model("tiny"),
    vocab_size=8192,
    num_layers=4,
    model_dim=256,
    num_heads=4,
    num_kv_heads=4,
    mlp_dim=512,
    max_length=256,
)


def _flat(model: Transformer) -> Transformer:
    """Returns the model with each layer written out and stored apart: on a CPU quicker to run and slower to compile.

    A stack of layers costs a copy of each layer's weights and of its gradients, 3 % of a step of 124M.
    """
    return dataclasses.replace(model, scan_layers=False, layers=model.layers * (model.num_layers // len(model.layers)))


CPU: dict[str, TrainStep | Generation] = {
    "train-tiny": TrainStep(_flat(_TINY), Rows(8, 256, 8192), "GPT-2's shape, 4 layers of width 256"),
    "train-small": TrainStep(_flat(_scaled(6, 512, 256)), Rows(8, 256, 8192), "GPT-2's shape, 6 layers of width 512"),
    "train-gpt2": TrainStep(_flat(_GPT2), Rows(1, 512, 50_257), "124M, batch 1 x 512"),
    "train-bert": TrainStep(_flat(_BERT), Rows(2, 128, 30_522), "BERT-base, batch 2 x 128, masked head, no dropout"),
    "train-t5": TrainStep(
        _flat(dataclasses.replace(_T5, num_layers=2)),
        Rows(2, 64, 32_128, 256),
        "T5-base with 2 of 12 layers in each stack, batch 2, encoder 256, decoder 64; AdamW",
    ),
    "train-llama-tiny": TrainStep(_flat(_TINY_LLAMA), Rows(8, 256, 8192), "Llama 3's shape, 4 layers of width 256"),
    "train-moe": TrainStep(_flat(_MOE), Rows(4, 256, 8192), "Mixtral's shape, 8 experts, top 2, 4 layers of width 256"),
    "generate-tiny-1": Generation(_TINY, Rows(1, 64, 8192), 64),
    "generate-tiny-32": Generation(_TINY, Rows(32, 64, 8192), 64),
    "generate-gpt2-1": Generation(_GPT2, Rows(1, 64, 50_257), 32),
    "generate-gpt2-32": Generation(_GPT2, Rows(32, 64, 50_257), 32),
}


_LLAMA = dataclasses.replace(llama3.get_model("1b"), remat="none")

GPU: dict[str, TrainStep | Generation] = {
    "train-tiny": TrainStep(_TINY, Rows(8, 256, 8192)),
    "train-gpt2": TrainStep(_GPT2, Rows(16, 1024, 50_257), "124M"),
    "train-gpt2-350m": TrainStep(_gpt("medium"), Rows(8, 1024, 50_257), "350M"),
    "train-gpt2-1.3b": TrainStep(
        _gpt("small", num_layers=24, model_dim=2048, num_heads=16, mlp_dim=8192), Rows(4, 1024, 50_257), "1.3B"
    ),
    "train-llama-1b": TrainStep(_LLAMA, Rows(2, 2048, 128_256), "Llama 3.2's shape"),
    "train-bert": TrainStep(_BERT, Rows(32, 512, 30_522), "BERT-base, masked head, no dropout"),
    "train-t5": TrainStep(_T5, Rows(32, 128, 32_128, 512), "T5-base, AdamW"),
    "train-moe": TrainStep(
        dataclasses.replace(_MOE, num_layers=12, model_dim=768, num_heads=12, num_kv_heads=12, mlp_dim=2048),
        Rows(16, 1024, 8192),
        "Mixtral's shape, 8 experts, top 2, 12 layers of width 768",
    ),
    "generate-gpt2-1": Generation(_GPT2, Rows(1, 512, 50_257), 256),
    "generate-gpt2-32": Generation(_GPT2, Rows(32, 512, 50_257), 256),
}
