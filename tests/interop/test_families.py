"""Every family against `transformers` on small random models: same logits, same bits back, same greedy text."""

import functools
import json

import jax
import numpy as np
import pytest

from lm import interop, parallel
from lm.batch import Batch
from lm.config import from_json, to_json
from lm.decoding import Decoder, Sampling, pad_prompts
from lm.experiment import Experiment
from tests.interop.originals import DECODERS

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
TOLERANCE = 1e-4
LENGTHS = (11, 4, 7)


@pytest.fixture(autouse=True)
def _mesh():
    mesh = parallel.build_mesh(parallel.MeshConfig(), jax.devices()[:1])
    with parallel.use(mesh, parallel.DEFAULT_RULES):
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    @functools.cache
    def make(case):
        folder = tmp_path_factory.mktemp(case.name)
        case.build().save_pretrained(folder)
        return folder

    return make


@functools.cache
def load(folder):
    config = interop.load_config(folder)
    return config.build(), interop.load_params(folder)


def sequences(vocab_size, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, vocab_size, length).astype(np.int32) for length in LENGTHS]


def padded(texts, **fields):
    """One row a text, padded on the right."""
    shape = (len(texts), max(map(len, texts)) + 2)
    inputs, segments, positions = (np.zeros(shape, np.int32) for _ in range(3))
    for row, text in enumerate(texts):
        inputs[row, : len(text)], segments[row, : len(text)] = text, 1
        positions[row, : len(text)] = np.arange(len(text))
    return batch_of(inputs, segments, positions)


def packed(texts):
    """All texts in one row, and padding after them."""
    length = sum(map(len, texts)) + 3
    inputs, segments, positions = (np.zeros((1, length), np.int32) for _ in range(3))
    start = 0
    for number, text in enumerate(texts):
        place = slice(start, start + len(text))
        inputs[0, place], segments[0, place], positions[0, place] = text, number + 1, np.arange(len(text))
        start += len(text)
    return batch_of(inputs, segments, positions)


def batch_of(inputs, segments, positions):
    return Batch(
        inputs=inputs,
        targets=np.zeros_like(inputs),
        weights=np.zeros(inputs.shape, np.float32),
        segment_ids=segments,
        positions=positions,
        bidirectional=np.zeros(inputs.shape, bool),
    )


def logits_of(model, params, batch):
    return np.asarray(jax.jit(lambda params, batch: model.apply(params, batch).logits)(params, batch))


@pytest.mark.parametrize("case", DECODERS, ids=lambda case: case.name)
def test_logits_are_those_of_the_original(case, folders, record_property):
    original = transformers.AutoModelForCausalLM.from_pretrained(folders(case), attn_implementation="eager").eval()
    model, params = load(folders(case))
    texts = sequences(model.config.vocab_size)
    with torch.no_grad():
        expected = [original(torch.tensor(text[None].astype(np.int64))).logits[0].numpy() for text in texts]
    rows = logits_of(model, params, padded(texts))
    in_rows = [rows[i, : len(text)] for i, text in enumerate(texts)]
    in_one = np.split(logits_of(model, params, packed(texts))[0], np.cumsum(LENGTHS))[: len(texts)]
    worst = max(np.abs(a - b).max() for found in (in_rows, in_one) for a, b in zip(found, expected, strict=True))
    print(f"{case.name}: largest difference of logits {worst:.1e}, largest logit {max(np.abs(e).max() for e in expected):.1f}")
    assert worst < TOLERANCE


@pytest.mark.parametrize("case", DECODERS, ids=lambda case: case.name)
def test_written_back_bit_for_bit(case, folders, tmp_path):
    from safetensors.numpy import load_file

    model, params = load(folders(case))
    interop.save(tmp_path / "back", model.config, params)
    before, after = (load_file(folder / "model.safetensors") for folder in (folders(case), tmp_path / "back"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(tensor, after[name], err_msg=name)
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written["model_type"] == json.loads((folders(case) / "config.json").read_text())["model_type"]
    assert interop.load_config(tmp_path / "back") == model.config


@pytest.mark.parametrize("case", DECODERS, ids=lambda case: case.name)
def test_transformers_opens_what_is_written_and_writes_the_same_text(case, folders, tmp_path):
    model, params = load(folders(case))
    interop.save(tmp_path / "back", model.config, params)
    opened, problems = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(problems.values()), problems
    prompts = sequences(model.config.vocab_size, seed=1)
    decoder = Decoder(model=model, sampling=Sampling(temperature=0), max_tokens=12)
    ours = decoder.generate(params, pad_prompts(prompts))
    for i, prompt in enumerate(prompts):
        ids = torch.tensor(prompt[None].astype(np.int64))
        made = opened.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
        )
        assert made[0, len(prompt) :].tolist() == ours.row(i).tolist()


@pytest.mark.parametrize("case", DECODERS, ids=lambda case: case.name)
def test_config_survives_being_saved_with_a_run(case, folders):
    config = interop.load_config(folders(case))
    assert from_json(Experiment, to_json(Experiment(model=config))).model == config
