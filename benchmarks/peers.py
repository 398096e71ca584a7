"""What a user would pick instead: the models of `transformers`, and the plain PyTorch GPT of torch_gpt.py.

Runs in processes of its own; imports nothing that starts jax's devices. Law: the same rows, the same
kind of step (clipping, fused AdamW; bfloat16 is autocast, as PyTorch's users do it), the threads of
the process; models of `transformers` start from our weights.
"""

import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from benchmarks.measuring import COPY, Work, best_speed
from benchmarks.rows import Rows
from benchmarks.torch_gpt import Gpt

Loss = Callable[[], torch.Tensor]


def _device() -> str:
    return "cuda" if os.environ.get("JAX_PLATFORMS") != "cpu" and torch.cuda.is_available() else "cpu"


def _prepare() -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    # What jax does with float32 by default: on GPUs such products are of TensorFloat-32.
    torch.set_float32_matmul_precision("high" if _device() == "cuda" else "highest")


def _wait() -> None:
    if _device() == "cuda":
        torch.cuda.synchronize()


def matmul(dtype: str) -> tuple[Callable[[], Any], float]:
    """Returns a function that multiplies two square matrices, and its operations."""
    size = 1024 if _device() == "cpu" else 8192
    a = torch.randn((size, size), dtype=getattr(torch, dtype), device=_device())

    def product() -> None:
        torch.matmul(a, a)
        _wait()

    return product, 2.0 * size**3


def copy() -> float:
    """Returns bytes/s of reading and writing an array that is larger than any cache."""
    x = torch.zeros(2**26, device=_device())

    def pass_over() -> None:
        for _ in range(4):  # so that a GPU is waited for once
            x.add_(1)
        _wait()

    return best_speed(pass_over, 4 * 2 * x.nbytes)


def _memory() -> dict[str, Any]:
    return {"device_bytes": lambda: torch.cuda.max_memory_allocated() if _device() == "cuda" else None}


def _train(model: torch.nn.Module, loss: Loss, dtype: str) -> Work:
    """Makes a step of clipping and fused AdamW around a loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> float:
        with torch.autocast(_device(), torch.bfloat16, enabled=dtype == "bfloat16"):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        _wait()
        return float(value.detach())

    return Work({"step": step}, matmul(dtype), _memory())


def _tensor(rows: Rows, name: str) -> torch.Tensor:
    return torch.from_numpy(rows.tokens(name)).long().to(_device())


def gpt_work(shape: dict[str, int], rows: Rows, dtype: str, compiled: bool) -> Work:
    """Makes the train step of the plain GPT, eager or compiled."""
    _prepare()
    model = Gpt(**shape, vocab_size=rows.vocab_size, max_length=rows.length).to(_device())
    run: Any = torch.compile(model) if compiled else model
    inputs, targets = _tensor(rows, "inputs"), _tensor(rows, "targets")
    return _train(model, lambda: run(inputs, targets), dtype)


def _open(folder: str, dtype: str) -> Any:
    """Opens the folder that our side has written before; it has not where it could not be made."""
    import transformers

    name = json.loads((pathlib.Path(folder) / "config.json").read_text())["architectures"][0]
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return getattr(transformers, name).from_pretrained(folder, dtype=getattr(torch, dtype)).to(_device())


def transformers_train_work(folder: str, rows: Rows, dtype: str, compiled: bool) -> Work:
    """Makes the train step of the model of `transformers` in `folder`, eager or compiled."""
    _prepare()
    model = _open(folder, "float32").train()
    run: Any = torch.compile(model) if compiled else model
    inputs, targets = _tensor(rows, "inputs"), _tensor(rows, "targets")
    read = {"input_ids": inputs}
    if rows.encoder_length is not None:
        read = {"input_ids": _tensor(rows, "encoder_inputs"), "decoder_input_ids": inputs}

    def loss() -> torch.Tensor:
        return functional.cross_entropy(run(**read).logits.flatten(0, 1).float(), targets.flatten())

    return _train(model, loss, dtype)


def transformers_generate_work(folder: str, rows: Rows, new_tokens: int, dtype: str) -> Work:
    """Makes greedy generation by `generate`: the prompt with its first token; and with `new_tokens` more after it."""
    _prepare()
    model = _open(folder, dtype).eval()
    prompt, made = _tensor(rows, "inputs"), {}

    def generate(count: int) -> Callable[[], None]:
        def run() -> None:
            with torch.inference_mode():
                made["tokens"] = model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=count,
                    min_new_tokens=count,
                    do_sample=False,
                    use_cache=True,
                    eos_token_id=None,
                    pad_token_id=0,
                )
                _wait()

        return run

    facts = {**_memory(), "tokens": lambda: made["tokens"][:, prompt.shape[1] :].tolist()}
    parts = {"prompt": generate(1), "whole": generate(new_tokens + 1), COPY: copy}
    return Work(parts, matmul(dtype), facts)
