"""Every cell of docs/cells.md: the valid ones train through the real path, the others are refused in words."""

import dataclasses
import functools
import itertools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import parallel
from lm.config import ConfigError
from lm.data import train_batches
from lm.data.tokenizers import ByteTokenizer
from lm.decoding import DecodingError, Sampling, build_decoder, choose_frame
from lm.evaluation import attention_cells, cells
from lm.models import path_name
from lm.optim import build_optimizer
from lm.training.state import init_state
from lm.training.step import make_train_step

VOCABULARY = ByteTokenizer(cells.TOKENIZER.num_sentinels)
ALL = {" on ".join(key): run for key, run in cells.cells().items()}
CHOICES = {f"{choice}, {' on '.join(sight)}": run for (choice, *sight), run in cells.choices().items()}
VALID = {name: run for name, run in (ALL | CHOICES).items() if not run.problems()}
INVALID = {name: run for name, run in (ALL | CHOICES).items() if run.problems()}


@pytest.fixture(scope="module", autouse=True)
def _one_device():
    mesh = parallel.build_mesh(parallel.MeshConfig(data=1), jax.devices()[:1])
    with parallel.use(mesh, parallel.DEFAULT_RULES):
        yield


def test_the_table_is_the_generated_one():
    committed = pathlib.Path(__file__).parent.parent / "docs" / "cells.md"
    assert committed.read_text(encoding="utf-8") == cells.write_table()


def test_attention_that_is_asked_for_is_computed_by_some_kernel_and_refused_by_others_in_words():
    sights = cells.attention_sights()
    answers = [attention_cells.by_kernel(run) for run in attention_cells.ask(sights).values()]
    answers += [attention_cells.by_way(run) for run in attention_cells.ask_divided(sights).values()]
    answers += [attention_cells.on_platform(kind) for kind in attention_cells.PLATFORMS.values()]
    for answer in answers:
        assert [] in answer.values()
        for line in itertools.chain.from_iterable(answer.values()):
            assert line.startswith("config.")
            assert len(line.split()) > 8


def test_every_architecture_and_objective_has_a_valid_cell():
    for names in (cells.ARCHITECTURES, cells.OBJECTIVES):
        for name in names:
            if name != "Mixture of Causal and ReplacedTokenDetection":
                assert any(name in cell.split(" on ") for cell in VALID), name


# Runs with equal models, settings and fields of the batch are one program: they differ in data alone.
@functools.cache
def _compiled(settings, fields):
    del fields
    model = settings.model.build()
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    optimizer = build_optimizer(settings.optimizer, settings.num_steps, shapes, model.axes())
    step = make_train_step(settings, model, optimizer, VOCABULARY.token_bytes)

    return jax.jit(lambda: init_state(model, optimizer, jnp.asarray(0), None)), jax.jit(step)


def _train(run, corpus):
    data = dataclasses.replace(run.data, source=corpus, validation_fraction=0.0)
    batches = train_batches(data, run.objective, VOCABULARY, run.batch_size)
    first, second = itertools.islice(batches, 2)
    batches.close()
    fields = tuple(name for name, value in first._asdict().items() if value is not None)
    # Nothing but what the train step reads may decide on another program.
    plain = dataclasses.replace(run, data=cells.make_cell(*cells.SIGHTS[0]).data)
    if not run.objective.traits.component_names:
        plain = dataclasses.replace(plain, objective=cells.OBJECTIVES["Causal"])
    init, step = _compiled(plain, fields)
    state = init()
    params = state.params
    state, before = step(state, first)
    state, after = step(state, second)
    return first, params, state, (before, after)


@pytest.mark.parametrize("name", VALID)
def test_a_valid_cell_trains(name, corpus):
    run = VALID[name]
    batch, params, state, (before, after) = _train(run, corpus)
    assert int(state.step) == 2
    for metrics in (before, after):
        for figure, value in metrics.items():
            assert np.all(np.isfinite(value)), figure
        assert metrics["skipped"] == 0
        assert metrics["loss_tokens"] > 0
    # Without weight decay, what never has a gradient stays where it was, to the bit.
    moved = jax.tree.map(lambda old, new: bool(np.any(np.asarray(old) != np.asarray(new))), params, state.params)
    assert not [path_name(path) for path, leaf in jax.tree_util.tree_leaves_with_path(moved) if not leaf]
    # Small weights make every token equally likely (facts of the objectives: "init loss = ln V").
    assert abs(float(before["nll"]) - math.log(run.model.vocab_size)) < 0.1
    if run.model.num_classes:
        assert abs(float(before["loss/labels"]) - math.log(2)) < 0.05
    if run.model.judges_replacements:
        # Half a bit of doubt at every token, fifty times: ELECTRA's 50 ln 2.
        assert abs(float(before["loss/discriminator"]) - 50 * math.log(2)) < 1.0
    counted = batch.weights > 0
    assert float(before["loss_tokens"]) == counted.sum()
    names = run.objective.traits.component_names
    if names:
        assert sum(float(before[f"loss_tokens/{name}"]) for name in names) == counted.sum()
    seen = (batch.segment_ids > 0).sum()
    if batch.encoder_segment_ids is not None:
        seen += (batch.encoder_segment_ids > 0).sum()
    assert float(before["seen_tokens"]) == seen


@pytest.mark.parametrize("name", INVALID)
def test_an_invalid_cell_is_refused_in_words(name):
    run = INVALID[name]
    with pytest.raises(ConfigError) as error:
        run.validate()
    lines = str(error.value).splitlines()
    assert lines == run.problems()
    assert len(lines) == len(set(lines))
    for line in lines:
        assert line.startswith("config.")
        assert len(line.split()) > 8


@pytest.mark.parametrize("name", [name for name in ALL if name in VALID])
def test_what_cannot_generate_says_so_in_one_sentence(name):
    run = VALID[name]
    traits = run.objective.traits

    def build():
        return build_decoder(run.model.build(), VOCABULARY, choose_frame(traits), Sampling(), 4)

    if run.model.decoder_depth and (traits.autoregressive or traits.frames):
        assert build().max_tokens == 4
        return
    with pytest.raises(DecodingError) as error:
        build()
    assert len(str(error.value).splitlines()) == 1
