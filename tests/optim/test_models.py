"""Rules on the parameter trees of real models: every leaf is understood as the model means it."""

import jax
import numpy as np
import pytest

from lm import models, parallel
from lm.optim import Adafactor, AdamW, Lion, Muon, OptimizerConfig, build_optimizer, roles_of, state_axes

SIZES = {"vocab_size": 31, "num_layers": 2, "model_dim": 16, "num_heads": 4, "mlp_dim": 32, "max_length": 24}
CONFIGS = {
    "llama": models.Decoder(**SIZES, num_kv_heads=2, tied_embeddings=False),
    "gpt2": models.Decoder(**SIZES, positions=models.Learned(), norm=models.LayerNorm(), mlp=models.Mlp(use_bias=True)),
    "qk_norm": models.Decoder(**SIZES, attention=models.MultiHead(qk_norm="all", use_qkv_bias=True, sinks=True)),
    "relative": models.Decoder(
        **SIZES,
        positions=models.Bucketed(),
        head_bias=True,
        embedding_dim=8,
        tied_embeddings=False,
        head_transform=models.HeadTransform(),
    ),
}
RULES = [AdamW(), Adafactor(min_size_to_factor=4), Lion(), Muon()]
is_parameter = lambda leaf: isinstance(leaf, models.Parameter)  # noqa: E731


@pytest.mark.parametrize("name", CONFIGS)
def test_roles_are_what_the_model_means(name):
    model = CONFIGS[name].build()
    described = model.parameters()
    shapes = jax.tree.map(lambda p: p.value, described, is_leaf=is_parameter)
    roles = roles_of(shapes, model.axes())

    def check(path, parameter, role):
        where = models.path_name(path)
        # To an optimizer a head is a table, though it is a product's operand.
        expected = {"scale": "vector", "bias": "vector"}.get(parameter.role, parameter.role)
        expected = "table" if "vocab" in parameter.axes and len(parameter.axes) > 1 else expected
        assert role.kind == expected, where
        assert role.stacked == tuple(i for i, axis in enumerate(parameter.axes) if axis == "layers"), where
        if parameter.role == "matrix":
            assert np.prod([parameter.shape[i] for i in role.rows]) == parameter.fan_in, where

    jax.tree_util.tree_map_with_path(check, described, roles, is_leaf=is_parameter)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("name", CONFIGS)
def test_updates_and_state_axes_fit(name, rule):
    model = CONFIGS[name].build()
    with parallel.shapes_only():
        shapes = jax.eval_shape(model.init, jax.random.key(0))
    optimizer = build_optimizer(OptimizerConfig(rule=rule), 10, shapes, model.axes())
    state = jax.eval_shape(optimizer.init, shapes)
    updates, _ = jax.eval_shape(optimizer.update, shapes, state, shapes)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), updates) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
    names = jax.tree.structure(state).flatten_up_to(state_axes(state, shapes, model.axes()))
    for leaf, axes in zip(jax.tree.leaves(state), names, strict=True):
        parallel.spec(axes, parallel.DEFAULT_RULES.parameters)
        assert len(axes) == leaf.ndim
