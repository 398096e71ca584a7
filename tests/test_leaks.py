"""No mask leaks: what a position must not see is changed, and its logits stay the same bit for bit.

Every kind of mask in every kernel; and each test fails once the mask is taken away.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import parallel
from lm.batch import Batch
from lm.models import Blocked, Chunked, Decoder, Encoder, EncoderDecoder, Layer, MultiHead, NormalInitializer, Plain
from lm.models.attention import Layout

LENGTH, VOCAB = 12, 50
KERNELS = {"plain": Plain(), "blocked": Blocked(blocks=5), "chunked": Chunked(chunk=5)}


def make_batch(segments, prefixes, encoder=None):
    """One row of segments of these lengths, each with a bidirectional prefix."""
    rng = np.random.default_rng(0)
    ids, positions = np.zeros((2, 1, LENGTH), np.int32)
    flags = np.zeros((1, LENGTH), bool)
    start = 0
    for number, (size, prefix) in enumerate(zip(segments, prefixes, strict=True)):
        ids[0, start : start + size] = number + 1
        positions[0, start : start + size] = np.arange(size)
        flags[0, start : start + prefix] = True
        start += size
    tokens = rng.integers(1, VOCAB, (1, LENGTH), dtype=np.int32)
    batch = Batch(tokens, tokens, (ids > 0).astype(np.float32), ids, positions, flags)
    if encoder is not None:
        other = make_batch(encoder, [0] * len(encoder))
        batch = batch._replace(
            encoder_inputs=other.inputs, encoder_segment_ids=other.segment_ids, encoder_positions=other.positions
        )
    return jax.tree.map(jnp.asarray, batch)


@dataclasses.dataclass(frozen=True)
class Case:
    """Changing `field` at `changed` must leave the logits at `unseen` alone, and reach those at `seen`."""

    kind: type
    batch: Batch
    changed: list[int]
    unseen: list[int]
    seen: list[int]
    window: int | None = None
    field: str = "inputs"

    @property
    def sees_ahead(self) -> bool:
        """Whether flags let positions of a causal tower see ahead."""
        return self.kind is not Encoder and bool(self.batch.bidirectional.any())


ROW = list(range(LENGTH))
CASES = {
    "causal": Case(Decoder, make_batch([12], [0]), [6], ROW[:6], ROW[6:]),
    # The prefix sees all of itself and nothing behind it.
    "prefix": Case(Decoder, make_batch([12], [5]), [5], ROW[:5], ROW[5:]),
    "within a prefix": Case(Decoder, make_batch([12], [5]), [4], [], ROW),
    "bidirectional": Case(Encoder, make_batch([6, 6], [6, 6]), [11], ROW[:6], ROW[6:]),
    "bidirectional decoder": Case(Decoder, make_batch([6, 6], [6, 6]), [11], ROW[:6], ROW[6:]),
    # Of one layer: a position sees itself and the two before it.
    "window": Case(Decoder, make_batch([12], [0]), [4], ROW[:4] + ROW[7:], ROW[4:7], window=3),
    # Two to either side.
    "window both ways": Case(Encoder, make_batch([12], [12]), [5], ROW[:3] + ROW[8:], ROW[3:8], window=4),
    "packed": Case(Decoder, make_batch([5, 7], [0, 0]), [0], ROW[5:], ROW[:5]),
    "packed prefixes": Case(Decoder, make_batch([5, 7], [3, 3]), [0], ROW[5:], ROW[:5]),
    "padding": Case(Decoder, make_batch([7], [0]), [9], ROW[:7], []),
    "padding of an encoder": Case(Encoder, make_batch([7], [7]), [9], ROW[:7], []),
    "cross attention": Case(
        EncoderDecoder, make_batch([5, 7], [0, 0], [6, 4]), [1], ROW[5:], ROW[:5], field="encoder_inputs"
    ),
    "padding of the source": Case(
        EncoderDecoder, make_batch([5, 7], [0, 0], [6, 4]), [11], ROW, [], field="encoder_inputs"
    ),
    "target of an encoder-decoder": Case(EncoderDecoder, make_batch([12], [0], [12]), [6], ROW[:6], ROW[6:]),
}


@pytest.fixture(autouse=True)
def _one_device():
    with parallel.use(parallel.build_mesh(parallel.MeshConfig(), jax.devices()[:1]), parallel.DEFAULT_RULES):
        yield


def make_program(kind, window, kernel):
    config = kind(
        vocab_size=VOCAB,
        num_layers=1,
        model_dim=16,
        num_heads=2,
        mlp_dim=16,
        max_length=LENGTH,
        layers=(Layer(window=window),),
        attention=MultiHead(kernel=kernel),
        initializer=NormalInitializer(stddev=0.4, residual_scaling=False),
    )
    model = config.build()
    return jax.jit(lambda batch: model.apply(model.init(jax.random.key(0)), batch).logits[0])


masked_program = functools.cache(make_program)
unmasked_program = functools.cache(make_program)


def logits_before_and_after(case, program):
    """f32[2, T, V]: the logits of the row as it is, and with the changed tokens."""
    tokens = np.array(getattr(case.batch, case.field))
    tokens[0, case.changed] = (tokens[0, case.changed] + 1) % VOCAB
    # One program, run twice: equal inputs give equal bits.
    return np.asarray(program(case.batch)), np.asarray(program(case.batch._replace(**{case.field: tokens})))


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        (name, kernel)
        for name, case in CASES.items()
        for kernel in KERNELS
        if KERNELS[kernel].reads_flags or not case.sees_ahead
    ],
)
def test_what_must_not_be_seen_changes_nothing(name, kernel):
    case = CASES[name]
    before, after = logits_before_and_after(case, masked_program(case.kind, case.window, KERNELS[kernel]))
    np.testing.assert_array_equal(before[case.unseen], after[case.unseen])
    for place in case.seen:
        assert np.any(before[place] != after[place]), f"position {place} should have seen the change"


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.unseen])
def test_without_the_mask_it_is_seen(name, monkeypatch):
    def everything(layout):
        shape = (layout.queries.segment_ids.shape[0], layout.queries.positions.shape[1], layout.keys.positions.shape[1])
        return jnp.ones(shape, bool)

    monkeypatch.setattr(Layout, "allowed", everything)
    case = CASES[name]
    before, after = logits_before_and_after(case, unmasked_program(case.kind, case.window, Plain()))
    for place in case.unseen:
        assert np.any(before[place] != after[place]), f"position {place} saw nothing although there was no mask"
