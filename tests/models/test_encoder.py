"""Laws of encoders: everything in a segment is seen, nothing outside; labels stand where their weights are."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import models

BERT = models.Encoder(
    vocab_size=50,
    num_layers=2,
    model_dim=16,
    num_heads=4,
    mlp_dim=24,
    max_length=32,
    norm=models.LayerNorm(),
    norm_placement="post",
    positions=models.Learned(),
    embedding_norm=True,
    num_token_types=2,
    head_transform=models.HeadTransform(),
    head_bias=True,
    num_classes=3,
)


@pytest.fixture(name="case")
def _case(make_batch, shake):
    model = BERT.build()
    return model, shake(model.init(jax.random.key(0))), make_batch([[4, 5]], length=10)


def test_every_position_sees_its_segment_whatever_the_flags(case):
    model, params, batch = case
    apply = jax.jit(model.apply)
    before = apply(params, batch).logits
    np.testing.assert_array_equal(before, apply(params, batch._replace(bidirectional=~batch.bidirectional)).logits)
    after = apply(params, batch._replace(inputs=batch.inputs.at[0, 3].set(7))).logits
    same = np.asarray(before == after)[0].all(axis=-1)
    assert not same[:4].any()
    assert same[4:9].all()


def test_a_window_is_centred(make_batch, shake):
    config = dataclasses.replace(BERT, num_layers=1, layers=(models.Layer(window=4),))
    model = config.build()
    params, batch = shake(model.init(jax.random.key(0))), make_batch([[9]])
    before = model.apply(params, batch).logits
    after = model.apply(params, batch._replace(inputs=batch.inputs.at[0, 4].set(7))).logits
    same = np.asarray(before == after)[0].all(axis=-1)
    assert same.tolist() == [True] * 2 + [False] * 5 + [True] * 2


def test_token_types_default_to_the_first(case):
    model, params, batch = case
    zeros = model.apply(params, batch._replace(token_types=jnp.zeros_like(batch.inputs))).logits
    np.testing.assert_array_equal(model.apply(params, batch).logits, zeros)
    ones = model.apply(params, batch._replace(token_types=jnp.ones_like(batch.inputs))).logits
    assert (np.asarray(ones) != np.asarray(zeros)).any()


def test_labels_count_where_their_weights_are(case):
    model, params, batch = case
    weights = jnp.zeros((1, 10)).at[0, 0].set(1.0).at[0, 4].set(0.5)
    labels = jnp.full((1, 10), 99).at[0, 0].set(2).at[0, 4].set(1)
    output = model.apply(params, batch._replace(label_targets=labels, label_weights=weights))
    logits = np.asarray(model.class_logits(params, output.hidden), np.float64)[0]
    nll = [np.log(np.exp(logits[i]).sum()) - logits[i, label] for i, label in ((0, 2), (4, 1))]
    np.testing.assert_allclose(output.losses["labels"].sum, nll[0] + 0.5 * nll[1], rtol=1e-5)
    assert float(output.losses["labels"].weight) == 1.5
    assert "labels" not in model.apply(params, batch).losses


def test_an_encoder_has_no_cache(case):
    with pytest.raises(ValueError, match="nothing to cache"):
        case[0].init_cache(case[1], 1, 4)


def test_a_factorised_embedding_needs_a_way_back():
    config = dataclasses.replace(BERT, embedding_dim=8)
    assert config.problems() == []
    problems = dataclasses.replace(config, head_transform=None).problems()
    assert len(problems) == 1
    assert "head_transform" in problems[0]


def test_second_positions_are_read(make_batch, shake):
    """GLM: tokens of a blank share a position in the text and are told apart by the one in the blank."""
    model = dataclasses.replace(BERT, num_block_positions=8).build()
    params, batch = shake(model.init(jax.random.key(0))), make_batch([[5]])
    with pytest.raises(ValueError, match="num_block_positions"):
        model.apply(params, batch)
    first, second = (
        model.apply(params, batch._replace(block_positions=jnp.asarray([places]))).logits
        for places in ([0, 0, 0, 1, 2], [0, 0, 0, 2, 1])
    )
    assert (np.asarray(first) != np.asarray(second)).any()
