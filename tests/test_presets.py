"""The presets of published models: parameter counts without allocating, and a tiny variant of each that trains."""

import dataclasses
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import (
    albert,
    bart,
    bert,
    electra,
    gemma,
    glm,
    mistral,
    modernbert,
    palm,
    qwen,
    roberta,
    starcoder,
    t5,
    transformer2017,
    ul2,
)
from lm import parallel
from lm.data import train_batches
from lm.optim import build_optimizer
from lm.training.state import init_state
from lm.training.step import make_train_step

# Those of BERT, RoBERTa, ALBERT, ModernBERT, BART, T5 1.0, Gemma 2 and 3 are what `transformers` counts in the model
# with its heads (BertForPreTraining, RobertaForMaskedLM, AlbertForPreTraining, ...Generation, ...CausalLM) built from
# the released shapes, tied weights once, as are StarCoder's (GPTBigCodeForCausalLM); those of T5 1.1, Mistral and Qwen
# are of the released checkpoints.
COUNTS = [
    (bert, "base", 110_106_428),
    (bert, "large", 336_226_108),
    (roberta, "base", 124_697_433),
    (roberta, "large", 355_412_057),
    (albert, "base", 11_813_810),
    (albert, "large", 17_847_474),
    (albert, "xlarge", 59_021_490),
    (albert, "xxlarge", 223_158_450),
    (modernbert, "base", 149_655_232),
    (modernbert, "large", 395_881_664),
    (t5, "small", 60_506_624),
    (t5, "base", 222_903_552),
    (t5, "large", 737_668_096),
    (t5, "3b", 2_851_598_336),
    (t5, "11b", 11_307_321_344),
    (t5, "v1_1_small", 76_961_152),
    (t5, "v1_1_base", 247_577_856),
    (t5, "v1_1_large", 783_150_080),
    (t5, "v1_1_xl", 2_849_757_184),
    (t5, "v1_1_xxl", 11_135_332_352),
    (bart, "base", 139_420_416),
    (bart, "large", 406_291_456),
    (gemma, "gemma2_2b", 2_614_341_888),
    (gemma, "gemma2_9b", 9_241_705_984),
    (gemma, "gemma2_27b", 27_227_128_320),
    (gemma, "gemma3_1b", 999_885_952),
    (gemma, "gemma3_4b", 3_880_263_168),
    (gemma, "gemma3_12b", 11_766_034_176),
    (gemma, "gemma3_27b", 27_009_346_304),
    (mistral, "7b", 7_241_732_096),
    (qwen, "qwen2_0_5b", 494_032_768),
    (qwen, "qwen2_1_5b", 1_543_714_304),
    (qwen, "qwen2_7b", 7_615_616_512),
    (qwen, "qwen2_72b", 72_706_203_648),
    (qwen, "qwen3_0_6b", 596_049_920),
    (qwen, "qwen3_1_7b", 1_720_574_976),
    (qwen, "qwen3_4b", 4_022_468_096),
    (qwen, "qwen3_8b", 8_190_735_360),
    (qwen, "qwen3_14b", 14_768_307_200),
    (qwen, "qwen3_32b", 32_762_123_264),
    (starcoder, "1b", 1_137_207_296),
    (starcoder, "3b", 3_043_311_104),
    (starcoder, "7b", 7_327_263_232),
    (starcoder, "15b", 15_517_456_384),
]
# ELECTRA's discriminators, as `transformers` counts ElectraForPreTraining: without a head for masked tokens. The paper
# says 14M, 110M and 335M.
DISCRIMINATORS = [("small", 13_549_057), ("base", 109_483_009), ("large", 335_142_913)]
# What papers give rounded: PaLM, table 1, in billions; the Transformer, table 3, in millions; UL2, title; GLM, with
# both tables of positions.
ROUNDED = [
    (palm, "8b", 8.63e9, 0.001),
    (palm, "62b", 62.50e9, 0.001),
    (palm, "540b", 540.35e9, 0.001),
    (transformer2017, "base", 65e6, 0.04),
    (transformer2017, "big", 213e6, 0.01),
    (ul2, "20b", 20e9, 0.03),
    (glm, "base", 110e6, 0.01),
    (glm, "large", 335e6, 0.01),
    (glm, "10b", 10e9, 0.02),
]
# One tiny variant of what is most unlike each other, and the others as the long form: their parts are those of
# tests/test_cells.py, which trains them all.
SHORT = (bert, electra, gemma, mistral, t5)
TINY = [
    pytest.param(module, variant, marks=() if module in SHORT and variant == "tiny" else pytest.mark.slow)
    for module in (
        *(albert, bart, bert, electra, gemma, glm, mistral, modernbert),
        *(palm, qwen, roberta, starcoder, t5, transformer2017, ul2),
    )
    for variant in module.MODELS
    if variant.endswith("tiny")
]


def _name(value):
    return value if isinstance(value, str) else pathlib.Path(value.__file__).stem if hasattr(value, "__file__") else ""


@pytest.mark.parametrize(("module", "variant", "count"), COUNTS, ids=_name)
def test_published_count_is_exact(module, variant, count):
    assert module.get_model(variant).num_parameters() == count


@pytest.mark.parametrize(("module", "variant", "count", "tolerance"), ROUNDED, ids=_name)
def test_rounded_count_is_near(module, variant, count, tolerance):
    np.testing.assert_allclose(module.get_model(variant).num_parameters(), count, rtol=tolerance)


@pytest.mark.parametrize(("variant", "count"), DISCRIMINATORS)
def test_discriminators_count_is_exact(variant, count):
    model = electra.get_model(variant)
    assert electra.get_config(variant).problems() == []
    kept = jax.eval_shape(model.build().init, jax.random.key(0))["discriminator"]
    assert sum(leaf.size for leaf in jax.tree.leaves(kept)) == count


@pytest.mark.parametrize(("module", "variant"), [(m, v) for m, v, *_ in [*COUNTS, *ROUNDED]], ids=_name)
def test_every_variant_is_a_valid_run(module, variant):
    assert module.get_config(variant).problems() == []


@pytest.mark.parametrize(("module", "variant"), TINY, ids=_name)
def test_tiny_variant_trains(module, variant, corpus):
    run = module.get_config(variant)
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, source=corpus))
    assert run.problems() == []
    vocabulary = run.data.tokenizer.build(None)
    model = run.model.build()
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    optimizer = build_optimizer(run.optimizer, run.num_steps, shapes, model.axes())
    batches = train_batches(run.data, run.objective, vocabulary, run.batch_size)
    with parallel.use(parallel.build_mesh(parallel.MeshConfig(data=1), jax.devices()[:1]), parallel.DEFAULT_RULES):
        step = jax.jit(make_train_step(run, model, optimizer, vocabulary.token_bytes))
        state = jax.jit(lambda: init_state(model, optimizer, jnp.asarray(0), None))()
        for batch in itertools.islice(batches, 2):
            state, metrics = step(state, batch)
            assert metrics["skipped"] == 0
            assert np.isfinite(metrics["loss"])
            assert metrics["gradient_norm"] > 0
    batches.close()
