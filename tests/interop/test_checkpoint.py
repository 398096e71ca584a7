"""The engine: a folder is taken whole or refused in one sentence that names what is wrong."""

import dataclasses
import importlib
import json
import re
import shutil

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from lm import interop, models, parallel
from lm.batch import SpecialTokens
from lm.config import UserError
from lm.interop.checkpoint import FAMILIES
from lm.interop.meaning import differences

CONFIG = models.Decoder(
    vocab_size=11, num_layers=3, model_dim=8, num_heads=2, mlp_dim=12, max_length=16, tied_embeddings=False
)
NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture(scope="module")
def params():
    mesh = parallel.build_mesh(parallel.MeshConfig(), jax.devices()[:1])
    with parallel.use(mesh, parallel.DEFAULT_RULES):
        return jax.device_get(CONFIG.build().init(jax.random.key(0)))


@pytest.fixture
def folder(params, tmp_path):
    assert interop.save(tmp_path / "hf", CONFIG, params) == "LlamaForCausalLM"
    return tmp_path / "hf"


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def change_config(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def refused(folder, words, config=None):
    with pytest.raises(UserError) as caught:
        interop.load_params(folder, config)
    message = str(caught.value)
    assert words in message
    assert str(folder) in message
    assert len(message.splitlines()) == 1
    return message


def test_loading_undoes_saving(folder, params):
    jax.tree.map(np.testing.assert_array_equal, interop.load_params(folder), params)
    assert not differences(interop.load_config(folder), CONFIG)


def test_shards_are_the_same(folder, params, tmp_path):
    interop.save(tmp_path / "shards", CONFIG, params, shard_bytes=1000)
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 3
    jax.tree.map(np.testing.assert_array_equal, interop.load_params(tmp_path / "shards"), params)


def test_how_to_compute_is_the_callers_choice(folder, params):
    config = dataclasses.replace(CONFIG, dtype="bfloat16", remat="full", scan_layers=False, dropout_rate=0.5)
    jax.tree.map(np.testing.assert_array_equal, interop.load_params(folder, config), params)


def test_a_body_alone_needs_no_prefix(folder, params):
    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    change_tensors(folder, strip)
    jax.tree.map(np.testing.assert_array_equal, interop.load_params(folder), params)


def test_buffers_are_left_out(folder, params):
    change_tensors(folder, lambda tensors: tensors.update({"model.rotary_emb.inv_freq": np.zeros(4, np.float32)}))
    jax.tree.map(np.testing.assert_array_equal, interop.load_params(folder), params)


def test_missing_left_over_and_misshapen_tensors_are_named(folder):
    change_tensors(folder, lambda tensors: tensors.pop(NORM))
    refused(folder, f"lacks the tensor {NORM}, which")
    change_tensors(folder, lambda tensors: tensors.update({NORM: np.ones(7, np.float32)}))
    refused(folder, f"{NORM} has shape [7], but config.json asks for [8]")
    change_tensors(folder, lambda tensors: tensors.update({NORM: np.ones(8, np.float32), "odd": np.ones(1)}))
    refused(folder, "holds the tensor odd, which its config.json has no place for")
    change_tensors(folder, lambda tensors: tensors.update({"odder": np.ones(1), "oddest": np.ones(1)}))
    refused(folder, "the tensor odd and 2 more tensors")


def test_another_family_is_named(folder):
    change_config(folder, model_type="gpt2")
    refused(folder, "has no field")
    change_config(folder, model_type="whisper")
    message = refused(folder, "model_type is 'whisper', which is none of gpt2, llama")
    assert all(family.model_type in message for family in FAMILIES)


def test_config_and_tensors_that_disagree_are_refused(folder):
    change_config(folder, num_hidden_layers=2)
    refused(folder, "model.layers.2.")
    change_config(folder, num_hidden_layers=4)
    refused(folder, "lacks the tensor model.layers.3.")
    change_config(folder, num_hidden_layers=3, tie_word_embeddings=True)
    interop.load_params(folder)  # copies of tied weights carry nothing
    change_config(folder, hidden_act="tanh")
    refused(folder, "hidden_act is 'tanh'; known are")
    change_config(folder, hidden_act="silu", num_key_value_heads=5)
    refused(folder, "cannot work")


def test_another_model_than_wanted_is_refused(folder):
    wanted = dataclasses.replace(CONFIG, positions=models.Rotary(theta=7.0), vocab_size=12)
    words = "another model than the config describes, Decoder of the family llama and not Decoder of the family llama: "
    message = refused(folder, words, wanted)
    assert message.endswith("config.model.vocab_size: 12 -> 11 (and 1 more)")
    message = refused(folder, words, dataclasses.replace(wanted, vocab_size=11))
    assert message.endswith("config.model.layers.*.positions.theta: 7.0 -> 10000.0 (3 layers)")


def test_a_model_of_another_family_is_refused_in_one_sentence(folder):
    wanted = importlib.import_module("configs.t5").get_model("tiny")
    message = refused(folder, "Decoder of the family llama and not EncoderDecoder of the family t5: ", wanted)
    assert re.search(r': config\.model\.type: "EncoderDecoder" -> "Decoder" \(and \d+ more\)$', message)
    odd = dataclasses.replace(CONFIG, mlp=models.Mlp(activation="relu_squared"))
    message = refused(folder, "Decoder of the family llama and not Decoder of no family: ", odd)
    assert len(message.splitlines()) == 1


def test_folders_without_a_config(tmp_path):
    assert not interop.is_checkpoint(tmp_path)
    refused(tmp_path, "has no config.json")
    (tmp_path / "config.json").write_text("[")
    refused(tmp_path, "cannot be read")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_files_end_in_a_sentence(folder, tmp_path, data):
    """Any file cut short or with changed bytes in its header is read, or refused by a UserError; never a crash."""
    broken = tmp_path / "broken"
    shutil.rmtree(broken, ignore_errors=True)
    shutil.copytree(folder, broken)
    name = data.draw(st.sampled_from(["model.safetensors", "config.json"]))
    content = bytearray((broken / name).read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        for place, value in data.draw(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 255)), max_size=3)):
            content[place] = value
    (broken / name).write_bytes(content)
    try:
        interop.load_params(broken)
    except UserError as error:
        assert str(broken) in str(error)


def test_a_model_that_no_family_expresses_names_the_nearest(params, tmp_path):
    odd = dataclasses.replace(CONFIG, mlp=models.Mlp(activation="relu_squared"))
    with pytest.raises(UserError, match=r"(?s)no family .* expresses this model; the nearest is .*relu_squared"):
        interop.save(tmp_path / "hf", odd, params)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("preset", "variant", "architecture"),
    [
        ("gpt2", "tiny", "GPT2LMHeadModel"),
        ("llama3", "tiny", "LlamaForCausalLM"),
        ("mistral", "tiny", "MistralForCausalLM"),
        ("qwen", "tiny", "Qwen2ForCausalLM"),
        ("qwen", "qwen3_tiny", "Qwen3ForCausalLM"),
        ("gemma", "tiny", "Gemma2ForCausalLM"),
        ("gemma", "gemma3_tiny", "Gemma3ForCausalLM"),
        ("mixtral", "tiny", "MixtralForCausalLM"),
        ("qwen3_moe", "tiny", "Qwen3MoeForCausalLM"),
        ("deepseek_v3", "tiny", "DeepseekV3ForCausalLM"),
        ("bert", "tiny", "BertForPreTraining"),
        ("roberta", "tiny", "RobertaForMaskedLM"),
        ("albert", "tiny", "AlbertForPreTraining"),
        ("modernbert", "tiny", "ModernBertForMaskedLM"),
        ("t5", "tiny", "T5ForConditionalGeneration"),
        ("t5", "v1_1_tiny", "T5ForConditionalGeneration"),
        ("ul2", "tiny", "T5ForConditionalGeneration"),
        ("bart", "tiny", "BartForConditionalGeneration"),
    ],
)
def test_presets_are_of_their_families(preset, variant, architecture, tmp_path):
    config = importlib.import_module(f"configs.{preset}").get_model(variant)
    leaves, tree = jax.tree.flatten(jax.eval_shape(config.build().init, jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = tree.unflatten([rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves])
    assert interop.save(tmp_path / "hf", config, params) == architecture
    jax.tree.map(np.testing.assert_array_equal, interop.load_params(tmp_path / "hf", config), params)


def test_params_of_another_model_are_refused(params, tmp_path):
    wide = dataclasses.replace(CONFIG, mlp_dim=16)
    with pytest.raises(UserError, match="mlp/down/kernel is missing or not of the shape"):
        interop.save(tmp_path / "hf", wide, params)
    assert list(tmp_path.iterdir()) == []


def test_tokenizer_files_and_special_tokens_are_carried(params, tmp_path):
    source = tmp_path / "tokenizer"
    source.mkdir()
    for name in ("tokenizer.json", "merges.txt", "other.txt"):
        (source / name).write_bytes(b"\xff" + name.encode())
    interop.save(tmp_path / "hf", CONFIG, params, tokenizer_dir=source, specials=SpecialTokens(pad=3, bos=4, eos=None))
    names = {path.name for path in (tmp_path / "hf").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "merges.txt"}
    assert (tmp_path / "hf" / "merges.txt").read_bytes() == b"\xffmerges.txt"
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (written["pad_token_id"], written["bos_token_id"], written["eos_token_id"]) == (3, 4, None)


def test_a_decoder_starts_as_training_did(tmp_path):
    config = importlib.import_module("configs.bart").get_model("tiny")
    shapes = jax.eval_shape(config.build().init, jax.random.key(0))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    specials = SpecialTokens(pad=3, bos=4, eos=5)
    for start, token in (("bos", 4), ("eos", 5)):
        interop.save(tmp_path / start, config, zeros, specials=specials, start=start)
        written = json.loads((tmp_path / start / "config.json").read_text())
        assert written["decoder_start_token_id"] == token
