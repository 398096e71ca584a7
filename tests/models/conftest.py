"""A mesh in force for every test of this room, and the batches and weights that they share."""

import jax
import numpy as np
import pytest

from lm import parallel
from lm.batch import Batch


@pytest.fixture(autouse=True)
def _mesh():
    with parallel.use(parallel.build_mesh(parallel.MeshConfig(), jax.devices()[:1]), parallel.DEFAULT_RULES):
        yield


def _make_batch(rows, *, length=None, vocab_size=50, seed=0, prefixes=None, encoder=None):
    """Rows of segment lengths, such as [[5, 3], [8]], as a packed batch of random tokens.

    `prefixes` are the bidirectional lengths of the segments; `encoder` the same rows for the encoder's side.
    """
    rng = np.random.default_rng(seed)
    length = length or max(sum(row) for row in rows)
    segment_ids = np.zeros((len(rows), length), np.int32)
    positions = np.zeros((len(rows), length), np.int32)
    bidirectional = np.zeros((len(rows), length), np.bool_)
    for i, row in enumerate(rows):
        start = 0
        for j, size in enumerate(row):
            segment_ids[i, start : start + size] = j + 1
            positions[i, start : start + size] = np.arange(size)
            if prefixes is not None:
                bidirectional[i, start : start + prefixes[i][j]] = True
            start += size
    tokens = rng.integers(1, vocab_size, (len(rows), length), dtype=np.int32)
    batch = Batch(
        inputs=tokens,
        targets=np.roll(tokens, -1, axis=1),
        weights=(segment_ids != 0).astype(np.float32),
        segment_ids=segment_ids,
        positions=positions,
        bidirectional=bidirectional,
    )
    if encoder is not None:
        other = _make_batch(encoder, vocab_size=vocab_size, seed=seed + 1)
        batch = batch._replace(
            encoder_inputs=other.inputs, encoder_segment_ids=other.segment_ids, encoder_positions=other.positions
        )
    return jax.tree.map(jax.numpy.asarray, batch)


@pytest.fixture(autouse=True, scope="session")
def _whole_programs():
    """Compiles a model as one program where a test calls it outside of `jax.jit`; its operations would be a hundred."""
    from lm.models.electra import ElectraModel
    from lm.models.model import Model

    patch = pytest.MonkeyPatch()
    patch.setattr(Model, "init", jax.jit(Model.init, static_argnames="self"))
    sizes = ("self", "batch_size", "length")
    patch.setattr(Model, "init_cache", jax.jit(Model.init_cache, static_argnames=sizes))
    patch.setattr(Model, "apply", jax.jit(Model.apply, static_argnames=("self", "empty", "with_logits")))
    patch.setattr(ElectraModel, "apply", jax.jit(ElectraModel.apply, static_argnames=("self", "with_logits")))
    yield
    patch.undo()


@pytest.fixture(name="make_batch", scope="session")
def _make_batch_fixture():
    return _make_batch


@pytest.fixture(name="shake", scope="session")
def _shake_fixture():
    """Moves every parameter away from its initial value, so that no bias is zero and no scale is one."""

    def shake(params, seed=1, size=0.3):
        # Drawn by numpy: a program for each shape would take longer than the test.
        rng = np.random.default_rng(seed)
        moved = [np.asarray(x) + size * rng.standard_normal(x.shape, np.float32) for x in jax.tree.leaves(params)]
        return jax.tree.unflatten(jax.tree.structure(params), [jax.numpy.asarray(x) for x in moved])

    return shake
