"""A model on a mesh of eight devices computes what it computes on one."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from lm import models, parallel

DECODER = models.Decoder(
    vocab_size=48, num_layers=2, model_dim=16, num_heads=4, num_kv_heads=2, mlp_dim=24, max_length=32
)
CONFIGS = {
    "decoder": DECODER,
    "encdec": models.EncoderDecoder(
        vocab_size=48, num_layers=2, model_dim=16, num_heads=4, mlp_dim=24, positions=models.Bucketed()
    ),
    "latent": dataclasses.replace(
        DECODER, attention=models.Latent(query_rank=6, kv_rank=8, nope_dim=6, rotary_dim=4, value_dim=6)
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_sharded_equals_single(name, make_batch, shake):
    model = CONFIGS[name].build()
    batch = make_batch([[8, 8]] * 4, vocab_size=48, encoder=[[8, 8]] * 4 if name == "encdec" else None)

    def loss(params, batch):
        return (model.apply(params, batch).logits ** 2).mean()

    params = shake(model.init(jax.random.key(0)))
    expected = jax.jit(jax.value_and_grad(loss))(params, batch)
    mesh = parallel.build_mesh(parallel.MeshConfig(data=2, fsdp=2, tensor=2))
    rules = parallel.DEFAULT_RULES
    shardings = jax.tree.map(
        lambda axes: NamedSharding(mesh, parallel.spec(axes, rules.parameters)),
        model.axes(),
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )
    rows = NamedSharding(mesh, parallel.spec(("batch", "length"), rules.activations))
    with parallel.use(mesh, rules):
        # Another program: `jit` would find the single-device one again.
        step = jax.jit(lambda params, batch: jax.value_and_grad(loss)(params, batch))
        got = step(jax.device_put(params, shardings), jax.device_put(batch, rows))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=2e-4, atol=2e-5), got, expected
    )
