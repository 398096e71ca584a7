"""The program convert: from a checkpoint to a run and back, and a run started from a checkpoint."""

import json

import numpy as np
import pytest

from tests.system.runs import history, run, tiny_flags, write_corpus

pytestmark = pytest.mark.system
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small random Llama with a byte-level tokenizer of its own."""
    folder = tmp_path_factory.mktemp("llama")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate(["<|endoftext|>", *alphabet])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}\n')
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def tensors(folder):
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


def test_there_and_back(checkpoint, tmp_path):
    status, out, err = run("lm.convert", f"--from={checkpoint}", f"--to={tmp_path / 'run'}")
    assert status == 0, err
    assert "a run of Decoder" in out
    status, out, err = run(
        "lm.generate", f"--workdir={tmp_path / 'run'}", "--prompt=abc", "--max_tokens=8", "--temperature=0"
    )
    assert status == 0, err
    made = out.removesuffix("\n")
    status, out, err = run("lm.convert", f"--from={tmp_path / 'run'}", f"--to={tmp_path / 'back'}")
    assert status == 0, err
    assert "LlamaForCausalLM" in out
    before, after = tensors(checkpoint), tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(value, after[name])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (checkpoint / name).read_bytes() == (tmp_path / "back" / name).read_bytes()
    assert json.loads((tmp_path / "back" / "config.json").read_text())["eos_token_id"] == 0
    # The same greedy text, from the folder alone.
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    ids = torch.tensor([[0, *tokenizer("abc", add_special_tokens=False)["input_ids"]]])  # prompts begin with bos
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    text = tokenizer.decode(model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, 1:])
    assert made == text.removesuffix("<|endoftext|>")


def test_trained_on_at_once_and_opened_again(checkpoint, tmp_path):
    status, _, err = run("lm.convert", f"--from={checkpoint}", f"--to={tmp_path / 'run'}")
    assert status == 0, err
    flags = tiny_flags(write_corpus(tmp_path / "corpus"))
    flags = [flag for flag in flags if not flag.startswith(("--config=", "--config.data.tokenizer"))]
    flags += [
        f"--config={tmp_path / 'run' / 'config.json'}",
        "--config.optimizer.schedule=Constant",
        "--config.optimizer.schedule.warmup_steps=0",
        f"--config.init_from={checkpoint}",
        "--config.num_steps=2",
        f"--workdir={tmp_path / 'trained'}",
    ]
    status, _, err = run("lm.train", *flags)
    assert status == 0, err
    first = history(tmp_path / "trained")[0]["loss"]
    # The random original is far from uniform; a fresh model of ours would begin at log(257) = 5.55.
    assert first > 6.0
    status, _, err = run("lm.convert", f"--from={tmp_path / 'trained'}", f"--to={tmp_path / 'back'}")
    assert status == 0, err
    before, after = tensors(checkpoint), tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    assert any(not np.array_equal(before[name], after[name]) for name in before)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    # The converted run is the same start.
    flags = [flag.replace(f"init_from={checkpoint}", f"init_from={tmp_path / 'run'}") for flag in flags]
    status, _, err = run("lm.train", *flags[:-1], f"--workdir={tmp_path / 'again'}")
    assert status == 0, err
    assert history(tmp_path / "again") == history(tmp_path / "trained")
    # Another model than the folder's is refused in one sentence.
    flags[-1] = f"--workdir={tmp_path / 'other'}"
    status, _, err = run("lm.train", *flags, f"--config.init_from={checkpoint}", "--config.model.positions.theta=1")
    assert status == 2
    assert "another model" in err
    assert "theta" in err


def test_bad_folders_are_refused(checkpoint, tmp_path):
    for flags, words in (
        ([], "--from=FOLDER"),
        ([f"--from={tmp_path / 'nothing'}", f"--to={tmp_path / 'x'}"], "not the folder of a run"),
        ([f"--from={checkpoint}", f"--to={checkpoint}"], "not empty"),
    ):
        status, _, err = run("lm.convert", *flags)
        assert status == 2
        assert words in err
        assert not (tmp_path / "x").exists()
