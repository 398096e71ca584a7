"""Every reader of tests/fuzz.py on hostile bytes, shortly: a valid result or a sentence, and nothing else."""

import io
import itertools
import json
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lm.interop.family import fold_layers
from lm.models import Layer
from tests import fuzz

QUICK = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


def _hostile(seeds):
    changed = st.builds(fuzz.mutate, st.sampled_from(seeds), st.randoms(use_true_random=False))
    return st.one_of(changed, changed, changed, st.binary(max_size=200))


def _holds(name, around, rounds):
    target = fuzz.TARGETS[name]

    @rounds
    @given(data=_hostile(target.seeds()))
    def law(data):
        fuzz.attempt(target, data, around)

    law()


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_hostile_bytes_end_in_a_result_or_a_sentence(name, tmp_path):
    _holds(name, tmp_path, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_many_hostile_bytes_end_in_a_result_or_a_sentence(name, tmp_path):
    _holds(name, tmp_path, settings(QUICK, max_examples=2000))


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_a_target_accepts_one_of_its_seeds(name, tmp_path):
    accepted = [fuzz.attempt(fuzz.TARGETS[name], seed, tmp_path) for seed in fuzz.TARGETS[name].seeds()]
    # A target that refuses everything would keep the law and test nothing.
    assert any(accepted) or name == "array_record_jsonl"


def _npy(array):
    written = io.BytesIO()
    np.save(written, array, allow_pickle=True)
    return written.getvalue()


def _json(seed, **changes):
    return json.dumps({**json.loads(seed), **changes}).encode()


def _inside(seed, value, *path):
    """A seed with one value in it, at a path of keys."""
    found = json.loads(seed)
    node = found
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return json.dumps(found).encode()


def _layers(number):
    """Every family's config of so many layers."""
    for seed in SEEDS["interop_config"]():
        names = [name for name in json.loads(seed) if name == "n_layer" or name.endswith("_layers")]
        yield _json(seed, **{name: number for name in names if isinstance(json.loads(seed)[name], int)})


def _without_unknown(seed):
    return _json(seed, model={**json.loads(seed)["model"], "unk_token": ""})


DEEP = b"[" * 100_000
_TOKENIZER = ("data", "tokenizer")
_SUBWORDS = b"data.tokenizer=SentencePiece\ndata.tokenizer"
SEEDS = {name: target.seeds for name, target in fuzz.TARGETS.items()}
_A_CONFIG = fuzz._config
# What was found in an afternoon: each ended in another exception, or took all memory or hours.
FOUND = {
    "a number of 5000 digits": ("jsonl", lambda: b'{"text": ' + b"9" * 5000 + b"}"),
    "a record that is no JSON": ("record", lambda: b'{"starts":'),
    "a record that nests without end": ("record", lambda: DEEP),
    "a start without its data": ("record", lambda: b'{"starts": [{}]}'),
    "a config that nests without end": ("config", lambda: DEEP),
    "a model's config that nests without end": ("interop_config", lambda: b'{"model_type": "bert", "a": ' + DEEP),
    "counters that are words": ("checkpoint_data", lambda: _json(SEEDS["checkpoint_data"]()[0], counters={"x": 1})),
    "batches that are none": ("checkpoint_data", lambda: b'{"batches": {}, "counters": {}}'),
    "a manifest that leads out": ("checkpoint_manifest", lambda: SEEDS["checkpoint_manifest"]()[1]),
    "a manifest without hashes": ("checkpoint_manifest", lambda: b'{"files": {"a": null}}'),
    "roll backs of words": ("roll_backs", lambda: b'[{"after": "x", "batches": 1, "spike": 1}]'),
    "no line that is one": ("metrics", lambda: b'{"step": 1}\n[]\n{"step": "x", "split": "train"}\n'),
    "a record that cannot be drawn": ("facts_record", lambda: b'{"starts":'),
    "a list for a number": ("interop_config", lambda: _json(SEEDS["interop_config"]()[0], vocab_size=[])),
    "a word for a number": ("interop_config", lambda: _json(SEEDS["interop_config"]()[0], num_hidden_layers="x")),
    "an index that leads out": ("safetensors_index", lambda: SEEDS["safetensors_index"]()[1]),
    "an index with no names": ("safetensors_index", lambda: b'{"weight_map": {"a": {}}}'),
    "an index with a number": ("safetensors_index", lambda: b'{"weight_map": {"a": 1.0}}'),
    "a name longer than names can be": ("safetensors_index", lambda: b'{"weight_map": {"a": "' + b"x" * 5000 + b'"}}'),
    "sentinels without end": ("vocabulary", lambda: b'{"kind": "bytes", "num_sentinels": 1180591620717411303424}'),
    "a negative number of sentinels": ("vocabulary", lambda: b'{"kind": "bytes", "num_sentinels": -1}'),
    "a vocabulary that leads out": ("vocabulary", lambda: SEEDS["vocabulary"]()[3]),
    "a path longer than paths can be": ("overrides", lambda: b"data.source=" + DEEP),
    "a name that no file can have": ("overrides", lambda: b"data.source=" + b"9" * 3000),
    "a zero byte in a pattern": ("overrides", lambda: b"data.source=\0here/*"),
    "the home of nobody": ("overrides", lambda: b"data.source=~nobody-of-this-name/*.txt"),
    "a number beyond floats": ("overrides", lambda: b"seed=1e400"),
    "an index of no shards": ("tokenized_index", lambda: _json(SEEDS["tokenized_index"]()[0], shards=[])),
    "an index of other shards": ("tokenized_index", lambda: _json(SEEDS["tokenized_index"]()[0], shards=[{}])),
    "an index without fingerprints": ("tokenized_index", lambda: _json(SEEDS["tokenized_index"]()[0], fingerprints=1)),
    "pickled objects": ("tokenized_offsets", lambda: _npy(np.asarray([{}, 1, 2, 3], object))),
    "offsets that are floats": ("tokenized_offsets", lambda: _npy(np.asarray([0.0, 1.0, 3.0, 6.0]))),
    "offsets of another shard": ("tokenized_offsets", lambda: _npy(np.asarray([0, 1]))),
    "sentinels without end in a config": ("config", lambda: _inside(_A_CONFIG(), 2**70, *_TOKENIZER, "num_sentinels")),
    "sentinels without end to train": ("overrides", lambda: _SUBWORDS + b".num_sentinels=1180591620717411303424"),
    "more channels than there are": ("config", lambda: _inside(_A_CONFIG(), 1e308, "model", "positions", "fraction")),
    "no source to train a tokenizer on": ("config", lambda: _inside(_A_CONFIG(), [], "data", "sources")),
    "no number in a config": ("config", lambda: _inside(_A_CONFIG(), float("nan"), "optimizer", "learning_rate")),
    "no number on the command line": ("overrides", lambda: b"optimizer.learning_rate=nan"),
    "an unknown character without an id": ("tokenizer_json", lambda: _without_unknown(SEEDS["tokenizer_json"]()[1])),
}  # fmt: skip


@pytest.mark.parametrize("case", FOUND)
def test_what_was_found_is_refused_with_a_sentence(case, tmp_path):
    name, data = FOUND[case]
    assert not fuzz.attempt(fuzz.TARGETS[name], data(), tmp_path)


def test_a_model_of_layers_without_end_is_refused_at_once(tmp_path):
    """Each took hours or all memory; a list of 1 << 14 layers that repeat nothing is described in under a second."""
    for data in _layers(10**9):
        assert not fuzz.attempt(fuzz.TARGETS["interop_config"], data, tmp_path)
    rng = np.random.default_rng(0)
    layers = [Layer(window=int(window)) for window in rng.integers(1, 3, 1 << 14)]
    start = time.process_time()
    described = fold_layers(layers)
    assert time.process_time() - start < 5
    rebuilt = itertools.chain(described["first_layers"], itertools.cycle(described["layers"]))
    assert list(itertools.islice(rebuilt, len(layers))) == layers


def test_the_law_sees_what_is_forbidden(tmp_path):
    def escapes(folder, data):
        (folder.parent / fuzz.CANARY).read_text()

    def unpickles(folder, data):
        np.load(io.BytesIO(_npy(np.asarray([io.BytesIO], object))), allow_pickle=True)

    for read in (escapes, unpickles):
        with pytest.raises(fuzz.BrokenLawError, match="forbidden"):
            fuzz.attempt(fuzz.Target(read, list), b"", tmp_path)
