"""MaxText is asked for the model that our folder describes, and is given each of its weights, without MaxText here."""

import json
import types

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from benchmarks import maxtext_llama, ours
from benchmarks.rows import Rows
from configs import llama3

MODEL = llama3.get_model("tiny")
SIZES = {"D": 32, "N": 4, "K": 2, "H": 8, "F": 64, "V": 512}
LAYER = {
    "pre_self_attention_layer_norm.scale": "D",
    "post_self_attention_layer_norm.scale": "D",
    "self_attention.query.kernel": "DNH",
    "self_attention.key.kernel": "DKH",
    "self_attention.value.kernel": "DKH",
    "self_attention.out.kernel": "NHD",
    "mlp.wi_0.kernel": "DF",
    "mlp.wi_1.kernel": "DF",
    "mlp.wo.kernel": "FD",
}
SHAPES = {
    "token_embedder.embedding": "VD",
    "decoder.decoder_norm.scale": "D",
    "decoder.logits_dense.kernel": "DV",
    **{f"decoder.layers_{i}.{name}": shape for i in range(2) for name, shape in LAYER.items()},
}


def _stand_in():
    """Returns a tree of MaxText's names (0.2.5, layers written out) with NaN in its shapes, and its leaves."""
    model, leaves = types.SimpleNamespace(), {}
    for path, shape in SHAPES.items():
        *outer, name = path.split(".")
        node = model
        for step in outer:
            node.__dict__.setdefault(step, types.SimpleNamespace())
            node = getattr(node, step)
        leaves[path] = types.SimpleNamespace(value=jnp.full([SIZES[axis] for axis in shape], jnp.nan))
        setattr(node, name, leaves[path])
    return model, leaves


def test_every_weight_has_its_place_and_every_place_its_weight(tmp_path):
    ours.save_first_weights(MODEL, str(tmp_path / "weights"))
    model, leaves = _stand_in()
    config = json.loads((tmp_path / "weights" / "config.json").read_text())
    maxtext_llama._read_weights(tmp_path / "weights", model, config["head_dim"])
    assert not any(np.isnan(leaf.value).any() for leaf in leaves.values())
    theirs = load_file(tmp_path / "weights" / "model.safetensors")
    places = {"self_attn": ("self_attention", "query key value out"), "mlp": ("mlp", "wi_0 wi_1 wo")}
    for block, names in {"self_attn": "q_proj k_proj v_proj o_proj", "mlp": "gate_proj up_proj down_proj"}.items():
        for name, part in zip(names.split(), places[block][1].split(), strict=True):
            kernel = np.asarray(leaves[f"decoder.layers_1.{places[block][0]}.{part}.kernel"].value)
            weight = theirs[f"model.layers.1.{block}.{name}.weight"].T
            scale = np.sqrt(8) if part == "query" else 1.0
            np.testing.assert_allclose(kernel.reshape(weight.shape) * scale, weight, rtol=1e-6)
    settings = maxtext_llama._settings(config, Rows(3, 16, 512), "bfloat16")
    assert (settings["base_emb_dim"], settings["base_num_kv_heads"], settings["head_dim"]) == (32, 2, 8)
    assert (settings["rope_max_timescale"], settings["normalization_layer_epsilon"]) == (500_000, 1e-5)
    assert (settings["per_device_batch_size"], settings["max_target_length"], settings["dtype"]) == (3, 16, "bfloat16")
