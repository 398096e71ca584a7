"""MaxText's train step of a Llama, as its own train loop builds it, without checkpoints, logging and metrics.

Runs in a Python that has MaxText, with its own jax, and may lack all that `lm` needs. Law: our weights and rows, the
same kind of step (AdamW, clipping, float32 parameters, nothing computed again), so that the first losses agree.
"""

import json
import os
import pathlib
from typing import Any

import jax
import numpy as np

from benchmarks.device import matmul, memory
from benchmarks.measuring import Work
from benchmarks.rows import Rows

# Read when they are imported.
os.environ.setdefault("DECOUPLE_GCLOUD", "TRUE")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# On a CPU the quickest that it has, a constant rate as ours, and nothing that writes or reports.
SETTINGS = {
    "hardware": "cpu",
    "scan_layers": False,
    "remat_policy": "none",
    "enable_dropout": False,
    "learning_rate": 3e-4,
    "warmup_steps_fraction": 0.0,
    "learning_rate_final_fraction": 1.0,
    "dataset_type": "synthetic",
    "skip_jax_distributed_system": True,
    "jax_cache_dir": "",
    "enable_checkpointing": False,
    "enable_tensorboard": False,
    "log_config": False,
}


def _settings(config: dict[str, Any], rows: Rows, dtype: str) -> dict[str, Any]:
    """Returns MaxText's settings of the Llama that a config.json describes."""
    return {
        **SETTINGS,
        "decoder_block": "llama2",
        "vocab_size": config["vocab_size"],
        "base_emb_dim": config["hidden_size"],
        "base_num_decoder_layers": config["num_hidden_layers"],
        "base_num_query_heads": config["num_attention_heads"],
        "base_num_kv_heads": config["num_key_value_heads"],
        "head_dim": config["head_dim"],
        "base_mlp_dim": config["intermediate_size"],
        "normalization_layer_epsilon": config["rms_norm_eps"],
        "rope_max_timescale": int(config["rope_theta"]),
        "logits_via_embedding": config["tie_word_embeddings"],
        "dtype": dtype,
        "per_device_batch_size": rows.batch,
        "max_target_length": rows.length,
    }


def _place(name: str) -> tuple[str, ...]:
    """Returns where MaxText has the weight that `transformers` calls `name`."""
    outer = {
        "model.embed_tokens": ("token_embedder", "embedding"),
        "model.norm": ("decoder", "decoder_norm", "scale"),
        "lm_head": ("decoder", "logits_dense", "kernel"),
    }
    inner = {
        "input_layernorm": ("pre_self_attention_layer_norm", "scale"),
        "post_attention_layernorm": ("post_self_attention_layer_norm", "scale"),
        "self_attn.q_proj": ("self_attention", "query", "kernel"),
        "self_attn.k_proj": ("self_attention", "key", "kernel"),
        "self_attn.v_proj": ("self_attention", "value", "kernel"),
        "self_attn.o_proj": ("self_attention", "out", "kernel"),
        "mlp.gate_proj": ("mlp", "wi_0", "kernel"),
        "mlp.up_proj": ("mlp", "wi_1", "kernel"),
        "mlp.down_proj": ("mlp", "wo", "kernel"),
    }
    name = name.removesuffix(".weight")
    if name in outer:
        return outer[name]
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    return "decoder", f"layers_{layer}", *inner[rest]


def _read_weights(folder: pathlib.Path, model: Any, head_dim: int) -> None:
    """Replaces the model's weights by those of a folder; MaxText has attention's scale in the queries' kernel."""
    from safetensors.numpy import load_file

    for name, tensor in load_file(folder / "model.safetensors").items():
        variable = model
        for step in _place(name):
            variable = getattr(variable, step)
        weight = tensor if "embed" in name else tensor.T
        if "q_proj" in name:
            weight = weight / np.sqrt(head_dim)
        variable.value = jax.device_put(
            weight.reshape(variable.value.shape).astype(np.float32), variable.value.sharding
        )


def _make_step(folder: pathlib.Path, rows: Rows, dtype: str) -> Any:
    """Builds the train step and its first state; returns what runs one step and gives the loss before it."""
    from flax import nnx
    from flax.core.spmd import logical_axis_rules
    from maxtext.configs import pyconfig
    from maxtext.trainers.pre_train import train
    from maxtext.utils import sharding, train_utils

    described = json.loads((folder / "config.json").read_text())
    defaults = str(pathlib.Path(pyconfig.__file__).with_name("base.yml"))
    settings = _settings(described, rows, dtype)
    output = {"run_name": "benchmark", "base_output_directory": str(folder)}
    config = pyconfig.initialize([__file__, defaults], **settings, **output)
    made = train_utils.setup_train_loop(config, None, jax.devices()[:1])
    shardings, mesh, whole = made[2], made[4], made[-1]
    _read_weights(folder, whole.model, described["head_dim"])
    graph, state = nnx.split(whole)
    of_params, shardings = sharding.maybe_update_params_sharding_with_opt(config, shardings)
    step, _ = train_utils.jit_train_and_eval_step(
        config, graph, mesh, state, shardings, train.train_step, params_shardings=of_params
    )
    ones = np.ones((rows.batch, rows.length), np.int32)
    batch = {name: rows.tokens(name) for name in ("inputs", "targets")}
    for name in ("inputs", "targets"):
        batch[f"{name}_segmentation"] = ones
        batch[f"{name}_position"] = np.broadcast_to(np.arange(rows.length, dtype=np.int32), ones.shape)
    batch = jax.device_put(batch, sharding.get_input_data_sharding(config, mesh))
    with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
        compiled = step.lower(state, batch).compile()
    newest = [state]
    del whole, state

    def run() -> float:
        newest[0], metrics = compiled(newest[0], batch)
        jax.block_until_ready(newest[0])
        return float(metrics["scalar"]["learning/loss"])

    return run


def train_work(folder: str, rows: Rows, dtype: str) -> Work:
    """Makes MaxText's train step of the Llama in `folder`, which our side has written."""
    box: list[Any] = []

    def step() -> float:
        if not box:
            box.append(_make_step(pathlib.Path(folder), rows, dtype))
        return box[0]()

    return Work({"step": step}, matmul(dtype), memory())
