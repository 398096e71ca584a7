"""Train step against the machine's own matrix products and against PyTorch: python -m benchmarks.train_step

Prints, for each size and dtype, tokens/s and model FLOP/s of the whole train step (forward, backward,
clipping, AdamW), the share of the matrix-product speed measured in the same run, and, where torch is
installed, the same for a plain PyTorch GPT of the same shape. Rounds of all contestants are
interleaved, with the same number of threads; medians and spreads over rounds.
"""

import dataclasses
import importlib.util
import os
import platform
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from configs import gpt2
from lm import parallel
from lm.batch import Batch
from lm.data import DataConfig
from lm.experiment import Experiment, LossConfig
from lm.optim import AdamW, Constant, OptimizerConfig, build_optimizer
from lm.training.state import init_state
from lm.training.step import make_train_step

_SIZES = flags.DEFINE_list("sizes", ["4x256", "6x512"], "layers x width, heads of 64.")
_DTYPES = flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "Compute dtypes.")
_BATCH = flags.DEFINE_integer("batch_size", 8, "Rows.")
_LENGTH = flags.DEFINE_integer("length", 256, "Positions per row.")
_VOCAB = flags.DEFINE_integer("vocab_size", 8192, "Token ids.")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Interleaved rounds.")
_STEPS = flags.DEFINE_integer("steps", 2, "Steps per contestant and round.")
_COMPILE = flags.DEFINE_bool("torch_compile", False, "Also time torch.compile (compilation takes minutes on a CPU).")
_SCAN = flags.DEFINE_bool("scan_layers", True, "Layers as a loop in the program, or written out.")
_CHUNK = flags.DEFINE_integer("loss_chunk", 0, "Positions per chunk of the loss; 0 computes all logits at once.")


def matmul_flops(dtype: str, size: int = 1024) -> float:
    """Best measured FLOP/s of jax's own product of two square matrices that accumulates in float32."""
    a = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    product(a, a).block_until_ready()
    best = min(_time(lambda: product(a, a).block_until_ready()) for _ in range(10))
    return 2 * size**3 / best


def _time(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _times(function: Callable[[], object]) -> tuple[float, float]:
    """Returns the seconds that pass, and those that all threads of this process compute."""
    start = time.process_time()
    return _time(function), time.process_time() - start


def our_step(layers: int, width: int, dtype: str, tokens: np.ndarray) -> tuple[Callable[[], None], float]:
    """Returns a function that runs the timed steps, and the model FLOPs of one step."""
    model_config = dataclasses.replace(
        gpt2.get_model("small"),
        vocab_size=_VOCAB.value,
        num_layers=layers,
        model_dim=width,
        num_heads=width // 64,
        mlp_dim=4 * width,
        max_length=_LENGTH.value,
        dtype=dtype,
        scan_layers=_SCAN.value,
    )
    config = Experiment(
        model=model_config,
        data=DataConfig(sequence_length=_LENGTH.value),
        optimizer=OptimizerConfig(rule=AdamW(b2=0.95), schedule=Constant(), learning_rate=3e-4),
        loss=LossConfig(chunk=_CHUNK.value or None),
    )
    model = model_config.build()
    mesh = parallel.build_mesh(config.mesh, jax.devices()[:1])
    params = jax.eval_shape(model.init, jax.random.key(0))
    optimizer = build_optimizer(config.optimizer, config.num_steps, params, model.axes())
    step = jax.jit(make_train_step(config, model, optimizer, np.ones(_VOCAB.value, np.int32)), donate_argnums=0)
    ones = np.ones((_BATCH.value, _LENGTH.value), np.int32)
    positions = np.broadcast_to(np.arange(_LENGTH.value, dtype=np.int32), ones.shape)
    batch = Batch(
        inputs=tokens[:, :-1],
        targets=tokens[:, 1:],
        weights=ones.astype(np.float32),
        segment_ids=ones,
        positions=positions,
        bidirectional=np.zeros(ones.shape, np.bool_),
    )
    with parallel.use(mesh, parallel.DEFAULT_RULES):
        state = jax.jit(lambda: init_state(model, optimizer, jnp.asarray(0), None))()
        batch = jax.device_put(batch)
    box = [state]

    def run() -> None:
        with parallel.use(mesh, parallel.DEFAULT_RULES):
            for _ in range(_STEPS.value):
                box[0], metrics = step(box[0], batch)
            jax.block_until_ready((box[0], metrics))

    return run, model_config.flops_per_token(_LENGTH.value) * _BATCH.value * _LENGTH.value


def their_step(layers: int, width: int, dtype: str, tokens: np.ndarray, compiled: bool) -> Callable[[], None]:
    """Returns a function that runs the timed steps of the PyTorch model."""
    import torch

    from benchmarks.torch_gpt import TorchTrainer

    torch.set_num_threads(os.cpu_count() or 1)
    shape = {"vocab_size": _VOCAB.value, "num_layers": layers, "dim": width, "num_heads": width // 64}
    trainer = TorchTrainer({**shape, "max_length": _LENGTH.value}, bfloat16=dtype == "bfloat16", compiled=compiled)
    inputs, targets = (torch.from_numpy(t.astype(np.int64)) for t in (tokens[:, :-1], tokens[:, 1:]))

    def run() -> None:
        for _ in range(_STEPS.value):
            trainer.step(inputs, targets)

    return run


def has_torch() -> bool:
    """Whether PyTorch is installed."""
    return importlib.util.find_spec("torch") is not None


def measure(layers: int, width: int, dtype: str, tokens: np.ndarray) -> None:
    """Times all contestants in one size and dtype, round by round, and prints a line for each."""
    ours, flops = our_step(layers, width, dtype, tokens)
    contestants = {"lm": ours}
    if has_torch():
        contestants["torch eager"] = their_step(layers, width, dtype, tokens, False)
        if _COMPILE.value:
            contestants["torch compiled"] = their_step(layers, width, dtype, tokens, True)
    for run in contestants.values():
        run()
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    peaks = []
    for _ in range(_ROUNDS.value):
        for name, run in contestants.items():
            rounds[name].append(_times(run))
        peaks.append(matmul_flops(dtype))
    seconds = {name: [wall / _STEPS.value for wall, _ in found] for name, found in rounds.items()}
    processor = {name: statistics.median(cpu for _, cpu in found) / _STEPS.value for name, found in rounds.items()}
    peer = "torch eager" if has_torch() else "lm"
    for name, times in seconds.items():
        middle = statistics.median(times)
        ratio = statistics.median(t / s for t, s in zip(seconds[peer], times, strict=True))
        print(
            f"{f'{layers}x{width}':8} {dtype:9} {name:15} {_BATCH.value * _LENGTH.value / middle:9,.0f} "
            f"{(max(times) - min(times)) / middle:6.0%} {flops / middle / 1e9:8.1f} "
            f"{flops / middle / statistics.median(peaks):9.1%} {processor[name]:8.3f} "
            f"{processor[peer] / processor[name]:9.2f} {ratio:8.2f}",
            flush=True,
        )


def main(_: list[str]) -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, _VOCAB.value, (_BATCH.value, _LENGTH.value + 1)).astype(np.int32)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}")
    print(f"batch {_BATCH.value} x {_LENGTH.value}, vocabulary {_VOCAB.value}, medians of {_ROUNDS.value} rounds")
    print("cpu s: processor seconds a step, all threads: steadier than the clock where the machine is shared")
    print(
        f"{'size':8} {'dtype':9} {'who':15} {'tokens/s':>9} {'spread':>6} {'GFLOP/s':>8} {'of matmul':>9} "
        f"{'cpu s':>8} {'cpu ratio':>9} {'vs torch':>8}"
    )
    for size in _SIZES.value:
        layers, width = map(int, size.split("x"))
        for dtype in _DTYPES.value:
            measure(layers, width, dtype, tokens)


if __name__ == "__main__":
    app.run(main)
