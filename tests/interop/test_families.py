"""Every family against `transformers` on small random models: same logits, same bits back, same greedy text."""

import functools
import json

import jax
import numpy as np
import pytest

from lm import interop, parallel
from lm.batch import Batch
from lm.decoding import Decoder, Sampling, pad_prompts
from tests.interop.originals import CASES

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
TOLERANCE = 1e-4
LENGTHS, SOURCE_LENGTHS = (11, 4, 7), (5, 12, 6)
NEW_TOKENS = 8
# Filled by the fixture `folders`.
ORIGINALS = {}
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


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
        ORIGINALS[case] = case.build()
        ORIGINALS[case].save_pretrained(folder)
        return folder

    return make


@functools.cache
def load(folder):
    config = interop.load_config(folder)
    return config.build(), interop.load_params(folder)


def sequences(vocab_size, lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, vocab_size, length).astype(np.int32) for length in lengths]


def lay(texts):
    """Ids, segments and positions of rows: one a text with padding behind it, and last all texts in one."""
    width = sum(map(len, texts)) + 3
    ids, segments, positions = (np.zeros((len(texts) + 1, width), np.int32) for _ in range(3))
    start = 0
    for number, text in enumerate(texts):
        for row, begin in ((number, 0), (len(texts), start)):
            place = slice(begin, begin + len(text))
            ids[row, place], segments[row, place], positions[row, place] = text, number + 1, np.arange(len(text))
        start += len(text)
    return ids, segments, positions


def unlay(rows, texts):
    """What stands in rows as `lay` lays them, for each text alone and for each text in the packed row."""
    ends = np.cumsum([len(text) for text in texts])
    alone = [rows[i, : len(text)] for i, text in enumerate(texts)]
    return alone, np.split(rows[-1], ends)[: len(texts)]


def batch_of(texts, types, sources):
    ids, segments, positions = lay(texts)
    batch = Batch(
        inputs=ids,
        targets=np.zeros_like(ids),
        weights=np.zeros(ids.shape, np.float32),
        segment_ids=segments,
        positions=positions,
        bidirectional=np.zeros(ids.shape, bool),
        token_types=None if types is None else lay(types)[0],
    )
    if sources is None:
        return batch
    ids, segments, positions = lay(sources)
    return batch._replace(encoder_inputs=ids, encoder_segment_ids=segments, encoder_positions=positions)


def tensor(ids):
    return torch.tensor(np.asarray(ids, np.int64)[None])


def ask(original, case, text, types, source):
    """Returns the original's logits (of a body, hidden states) and class logits or None, of one text."""
    fields = {"input_ids": tensor(text)}
    if source is not None:
        fields = {"input_ids": tensor(source), "decoder_input_ids": tensor(text)}
    if types is not None:
        fields["token_type_ids"] = tensor(types)
    with torch.no_grad():
        output = original(**fields)
    names = {"body": "last_hidden_state"}.get(case.kind, "logits" if hasattr(output, "logits") else "prediction_logits")
    labels = getattr(output, "seq_relationship_logits", getattr(output, "sop_logits", None))
    return getattr(output, names)[0].numpy(), None if labels is None else labels[0].numpy()


def opened_by_transformers(case, folder):
    kind = getattr(transformers, case.model_class)
    model, problems = kind.from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
    missing = [name for names in problems.values() for name in names if case.kind != "body" or "pooler" not in name]
    assert not missing, problems
    return model.eval()


@every_case
def test_logits_are_those_of_the_original(case, folders):
    model, params = load(folders(case))
    original = ORIGINALS[case]
    vocab = model.config.vocab_size
    texts = sequences(vocab, LENGTHS)
    types = [text % 2 for text in texts] if model.config.num_token_types > 1 else None
    sources = sequences(vocab, SOURCE_LENGTHS, seed=2) if case.kind == "pair" else None
    expected = [ask(original, case, text, types and types[i], sources and sources[i]) for i, text in enumerate(texts)]

    @jax.jit
    def run(params, batch):
        output = model.apply(params, batch)
        labels = model.class_logits(params, output.hidden) if model.config.num_classes else None
        return output.hidden if case.kind == "body" else output.logits, labels

    rows, labels = jax.device_get(run(params, batch_of(texts, types, sources)))
    worst, largest = 0.0, 0.0
    for found in unlay(rows, texts):
        for ours, (theirs, _) in zip(found, expected, strict=True):
            worst, largest = max(worst, np.abs(ours - theirs).max()), max(largest, np.abs(theirs).max())
    if labels is not None:
        for found in unlay(labels, texts):
            for ours, (_, theirs) in zip(found, expected, strict=True):
                worst = max(worst, np.abs(ours[0] - theirs).max())
    print(f"{case.name}: largest difference {worst:.1e} of logits up to {largest:.1f}")
    assert worst < TOLERANCE


@every_case
def test_written_back_bit_for_bit(case, folders, tmp_path):
    from safetensors.numpy import load_file

    model, params = load(folders(case))
    architecture = interop.save(tmp_path / "back", model.config, params)
    before, after = (load_file(folder / "model.safetensors") for folder in (folders(case), tmp_path / "back"))
    if case.kind == "body":  # has no head, so its pooler is of no use
        before = {name: value for name, value in before.items() if "pooler" not in name}
        before = {f"bert.{name}".removeprefix("bert."): value for name, value in before.items()}
        after = {name.removeprefix("bert."): value for name, value in after.items()}
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(value, after[name], err_msg=name)
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written["model_type"] == json.loads((folders(case) / "config.json").read_text())["model_type"]
    assert architecture == case.model_class
    assert interop.load_config(tmp_path / "back") == model.config


@pytest.mark.parametrize("case", [case for case in CASES if case.kind in ("decoder", "pair")], ids=lambda c: c.name)
def test_transformers_opens_what_is_written_and_writes_the_same_text(case, folders, tmp_path):
    model, params = load(folders(case))
    interop.save(tmp_path / "back", model.config, params)
    opened = opened_by_transformers(case, tmp_path / "back")
    prompts = sequences(model.config.vocab_size, LENGTHS, seed=1)
    decoder = Decoder(model=model, sampling=Sampling(temperature=0), max_tokens=NEW_TOKENS)
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    if case.kind == "decoder":
        ours = decoder.generate(params, pad_prompts(prompts))
    else:
        ours = decoder.generate(params, pad_prompts([[2]] * len(prompts), encoder_prompts=prompts))
        settings |= {"decoder_start_token_id": 2, "num_beams": 1}
    for i, prompt in enumerate(prompts):
        made = opened.generate(tensor(prompt), attention_mask=torch.ones_like(tensor(prompt)), **settings)
        assert made[0, -NEW_TOKENS:].tolist() == ours.row(i).tolist()


@pytest.mark.parametrize("case", [case for case in CASES if case.kind not in ("decoder", "pair")], ids=lambda c: c.name)
def test_transformers_opens_written_encoders(case, folders, tmp_path):
    model, params = load(folders(case))
    interop.save(tmp_path / "back", model.config, params)
    before, after = ORIGINALS[case], opened_by_transformers(case, tmp_path / "back")
    text = sequences(model.config.vocab_size, (9,))[0]
    for a, b in zip(ask(before, case, text, None, None), ask(after, case, text, None, None), strict=True):
        np.testing.assert_array_equal(a, b)
