"""Hostile bytes for everything that reads a stranger's file: python -m tests.fuzz --target=jsonl --runs=100000

The targets are also run, shortly, by tests/test_fuzz.py. By hand they are led by coverage if the package
`atheris` is installed (extra `fuzz`), else they are mutated at random. Law of every target: a valid result, or
a UserError of one clear sentence; no file outside the given folder is opened, no process started, no pickle read.
"""

import dataclasses
import functools
import gzip
import io
import json
import pathlib
import random
import sys
import tempfile
from collections.abc import Callable

import numpy as np
from absl import app, flags

# Lies beside the folder that a target may read; seeds and mutations name it.
CANARY = "canary.json"
FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "pickle.find_class",
    "socket.connect",
)
NASTY = (
    *(b"null", b"-1", b"0", b"1e400", b"99999999999999999999", b"NaN", b"true", b"[]", b"{}", b'""', b'"\\ud800"'),
    *(b'"../canary.json"', b"\0", b"\xff", b"\xef\xbb\xbf", b"\r\n", b"[" * 100_000, b"9" * 5000, b'{"a":' * 20_000),
)
NASTY_VALUES = (
    *(None, -1, 0, 1, 2**31, 2**70, 1e308, float("nan"), True, "", "x", "\ud800", "\0", "None", f"../{CANARY}"),
    *([], {}, [[]], [None], {"type": "x"}, {"": 0}, [0] * 100),
)


class BrokenLawError(AssertionError):
    """A target did what no input may make it do."""


@dataclasses.dataclass(frozen=True)
class Target:
    """Something that reads bytes.

    Attributes:
      read: reads the bytes, with a folder for itself.
      seeds: valid inputs to begin with.
    """

    read: Callable[[pathlib.Path, bytes], object]
    seeds: Callable[[], list[bytes]]


def mutate(data: bytes, source: random.Random) -> bytes:
    """Returns the data with one to four things done to it; JSON is mostly changed as JSON."""
    for _ in range(source.randint(1, 4)):
        data = (_mutate_json if source.random() < 0.7 else _mutate_bytes)(data, source)
    return data


def _mutate_bytes(data: bytes, source: random.Random) -> bytes:
    at = source.randint(0, len(data))
    until = min(len(data), at + source.randint(0, 16))
    return source.choice((
        data[:at],
        data[:at] + data[until:],
        data[:at] + data[at:until] * 3 + data[until:],
        data[:at] + source.choice(NASTY) + data[at:],
        data[:at] + source.choice(NASTY) + data[until:],
        data[:at] + bytes(source.randrange(256) for _ in data[at:until]) + data[until:],
    ))  # fmt: skip


def _mutate_json(data: bytes, source: random.Random) -> bytes:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return _mutate_bytes(data, source)
    places: list[tuple[dict | list, str | int]] = []

    def walk(node: object) -> None:
        keys = node.keys() if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            places.append((node, key))
            walk(node[key])

    walk(found)
    if not places:
        return _mutate_bytes(data, source)
    node, key = source.choice(places)
    match source.randrange(4):
        case 0:
            node.pop(key)
        case 1 if isinstance(node, dict):
            node[source.choice(("", "type", "x", str(key) + "x"))] = node[key]
        case _:
            other, place = source.choice(places)
            node[key] = source.choice((*NASTY_VALUES, _get(other, place)))
    try:
        return json.dumps(found).encode()
    except (ValueError, RecursionError):
        return data


def _get(node: dict | list, key: str | int) -> object:
    try:
        return node[key]
    except (KeyError, IndexError):
        return None


# --- what is read -----------------------------------------------------------------------------------------------------


def _texts(name: str) -> Callable[[pathlib.Path, bytes], object]:
    """Reads every text of a file of the given name, as the data pipeline does."""

    def read(folder: pathlib.Path, data: bytes) -> None:
        from lm.data import formats, sources

        file = folder / name
        file.write_bytes(data)
        formats._open_version.cache_clear()
        for errors in ("strict", "replace"):
            corpus = sources.Files(paths=(str(file),), errors=errors).open()
            assert len(corpus.keys()) == len(corpus)
            for index in range(min(len(corpus), 20)):
                corpus.text(index).encode()
            assert corpus.fingerprint()

    return read


def _jsonl() -> bytes:
    return "\n".join(json.dumps({"text": text, "id": 1}) for text in ("one", "zwei ä", "", "四")).encode()


def _gz(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


def _zst(data: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor().compress(data)


def _parquet() -> list[bytes]:
    import pyarrow
    from pyarrow import parquet

    made = []
    for column in (pyarrow.array(["one", "zwei ä", ""]), pyarrow.array([1, 2, 3]), pyarrow.array([b"\xff", None])):
        written = io.BytesIO()
        parquet.write_table(pyarrow.table({"text": column}), written)
        made.append(written.getvalue())
    return made


def _array_record() -> list[bytes]:
    from array_record.python import array_record_module

    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, "seed")
        writer = array_record_module.ArrayRecordWriter(str(file), "group_size:1")
        for text in ("one", '{"text": "two"}', ""):
            writer.write(text.encode())
        writer.close()
        return [file.read_bytes()]


def _read_config(folder: pathlib.Path, data: bytes) -> None:
    from lm import config as configs
    from lm.experiment import Experiment
    from lm.training.workdir import read_config

    (folder / "config.json").write_bytes(data)
    experiment = read_config(folder)
    assert configs.from_json(Experiment, configs.to_json(experiment)) == experiment
    experiment.validate()


@functools.cache
def _config() -> bytes:
    from configs import quickstart
    from lm import config as configs

    return json.dumps(configs.to_json(quickstart.get_config())).encode()


def _configs() -> list[bytes]:
    from configs import mixtral, t5
    from lm import config as configs

    others = (t5.get_config("tiny"), mixtral.get_config("tiny"))
    return [_config(), *(json.dumps(configs.to_json(other)).encode() for other in others)]


def _read_overrides(folder: pathlib.Path, data: bytes) -> None:
    from lm import flags as program
    from lm.experiment import Experiment

    (folder / "config.json").write_bytes(_config())
    pairs = (line.partition("=") for line in data.decode("utf-8", "surrogateescape").splitlines())
    overrides = {path: value for path, _, value in pairs}
    experiment = program.resolve(str(folder / "config.json"), overrides, Experiment)
    experiment.validate()


def _overrides() -> list[bytes]:
    return [
        b"model.num_layers=8",
        b"objective=PrefixLM\nmodel.dtype=bfloat16",
        b"data.source=nowhere/*.txt,x.jsonl\nseed=1e3",
        b"optimizer.rule=Muon\noptimizer.learning_rate=1e-3\noptimizer.average=none",
        b"mesh.data=1\nmesh.fsdp=-1\ncheckpoint.keep_every=10",
        b"model.mlp.activation=silu\nmodel.positions=Rotary\nmodel.positions.theta=1e4",
    ]


def _read_tokenizer(name: str, described: bytes | None = None) -> Callable[[pathlib.Path, bytes], object]:
    """Reads a tokenizer's folder in which the file of the given name is the data."""

    def read(folder: pathlib.Path, data: bytes) -> None:
        from lm.data import tokenizers

        if described is not None:
            (folder / tokenizers.DESCRIPTION).write_bytes(described)
        (folder / name).write_bytes(data)
        _use(tokenizers.load(folder))

    return read


def _use(tokenizer) -> None:
    for text in ("def f(x): return x", "ä 四 🙂", ""):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32
        assert all(0 <= number < tokenizer.size for number in ids)
        tokenizer.decode(ids)
        tokenizer.pieces(ids)
    assert len(tokenizer.token_bytes) == len(tokenizer.starts_word) == tokenizer.size


def _read_hugging_face(folder: pathlib.Path, data: bytes) -> None:
    from lm.data import hugging_face

    (folder / "tokenizer.json").write_bytes(data)
    _use(hugging_face.HuggingFace(path=str(folder)).build(None))


@functools.cache
def _sentencepiece() -> tuple[bytes]:
    from lm.data import tokenizers

    class Text:
        def sample(self, num_bytes: int):
            yield "the quick brown fox jumps over the lazy dog\n" * 20

    made = tokenizers.SentencePiece(vocab_size=310, num_sentinels=2).build(Text())
    return (made._model,)


@functools.cache
def _tokenizer_json() -> tuple[bytes, ...]:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    made = []
    for model, trainer in (
        (models.BPE(), trainers.BpeTrainer),
        (models.WordPiece(unk_token="[UNK]"), trainers.WordPieceTrainer),
    ):
        one = tokenizers.Tokenizer(model)
        one.pre_tokenizer = pre_tokenizers.ByteLevel()
        one.decoder = decoders.ByteLevel()
        one.train_from_iterator(["the quick brown fox"] * 3, trainer(vocab_size=60, special_tokens=["<pad>", "[UNK]"]))
        made.append(one.to_str().encode())
    return tuple(made)


def _descriptions() -> list[bytes]:
    described = (
        {"kind": "bytes", "num_sentinels": 3},
        {"kind": "sentencepiece", "num_sentinels": 2},
        {"kind": "hugging_face", "file": "tokenizer.json"},
        {"kind": "hugging_face", "file": f"../{CANARY}"},
    )
    return [json.dumps({"format": "lm.vocabulary.1", **one}).encode() for one in described]


def _read_tokenized(name: str) -> Callable[[pathlib.Path, bytes], object]:
    """Reads a corpus tokenised ahead in which the file of the given name is the data."""

    def read(folder: pathlib.Path, data: bytes) -> None:
        from lm.data import tokenized

        for other, content in _tokenized_files().items():
            (folder / other).write_bytes(content)
        (folder / name).write_bytes(data)
        corpus = tokenized.TokenizedCorpus(folder)
        assert len(corpus.keys()) == len(corpus)
        for index in range(min(len(corpus), 20)):
            corpus.document_id(index)
            assert corpus.tokens(index).dtype == np.int32
        assert isinstance(corpus.fingerprint() + corpus.tokenizer_fingerprint(), str)

    return read


@functools.cache
def _tokenized_files() -> dict[str, bytes]:
    from lm.data import tokenized

    with tempfile.TemporaryDirectory() as made:
        folder = pathlib.Path(made)
        documents = [(f"a#{number}", number, np.arange(number + 1)) for number in range(3)]
        tokenized.write(folder, documents, 300, {"tokenizer": "t", "source": "s"})
        return {file.name: file.read_bytes() for file in folder.iterdir()}


def _read_safetensors(folder: pathlib.Path, data: bytes) -> None:
    from lm.interop.tensors import SINGLE, Tensors

    (folder / SINGLE).write_bytes(data)
    _use_tensors(Tensors(folder))


def _use_tensors(tensors) -> None:
    with tensors:
        for name in tensors.names[:20]:
            if np.prod(tensors.shape(name)) < 1 << 20:
                assert tensors.read(name).dtype == np.float32


@functools.cache
def _safetensors() -> tuple[bytes, ...]:
    from safetensors.numpy import save

    arrays = {
        "a.weight": np.ones((2, 3), np.float32),
        "b": np.zeros((4,), np.float16),
        "c": np.zeros((0, 2), np.float32),
    }
    return save(arrays), save({"ids": np.arange(3)})


def _read_index(folder: pathlib.Path, data: bytes) -> None:
    from lm.interop.tensors import INDEX, Tensors

    (folder / "model-00001-of-00001.safetensors").write_bytes(_safetensors()[0])
    (folder / INDEX).write_bytes(data)
    _use_tensors(Tensors(folder))


def _indexes() -> list[bytes]:
    maps = ({"a.weight": "model-00001-of-00001.safetensors"}, {"a.weight": f"../{CANARY}"})
    return [json.dumps({"metadata": {"total_size": 24}, "weight_map": one}).encode() for one in maps]


def _read_interop(folder: pathlib.Path, data: bytes) -> None:
    from lm.interop import checkpoint

    (folder / checkpoint.CONFIG).write_bytes(data)
    checkpoint.is_checkpoint(folder)
    checkpoint.load_config(folder)


def _interop() -> list[bytes]:
    from configs import albert, bart, bert, deepseek_v3, gemma, gpt2, llama3, mixtral, modernbert, qwen3_moe, t5
    from lm.interop import checkpoint

    made = []
    for preset in (albert, bart, bert, deepseek_v3, gemma, gpt2, llama3, mixtral, modernbert, qwen3_moe, t5):
        config = preset.get_config("tiny").model
        for family in checkpoint.FAMILIES:
            fields = family.write(config)
            if fields is not None:
                made.append(json.dumps({"model_type": family.model_type, **fields}).encode())
    return made


def _read_record(folder: pathlib.Path, data: bytes) -> None:
    from lm.training import workdir

    (folder / "run.json").write_bytes(data)
    assert isinstance(workdir.read_starts(folder), list)
    workdir.check_data(folder, "f", force_config=False)


def _records() -> list[bytes]:
    starts = [{"time": "2026-01-01T00:00:00Z", "argv": ["x"], "data_fingerprint": "f", "from_step": 0}]
    return [json.dumps({"config": {}, "starts": starts}).encode(), b'{"starts": []}']


def _read_metrics(folder: pathlib.Path, data: bytes) -> None:
    from lm.evaluation import comparison, curves
    from lm.training import events, timeline

    (folder / "metrics.jsonl").write_bytes(data)
    (folder / "events.jsonl").write_bytes(data)
    assert all(isinstance(event["step"], int) for event in events.read_events(folder))
    assert all(value >= 0 for value in timeline.read_seconds(folder, 2).values())
    history = curves.load_history(folder)
    assert comparison.write_table([history], [comparison.load_facts(folder)]).count("\n") == 3
    comparison.held_out(history, "bits_per_byte", "minutes")
    curves._points(history.train, "loss")


def _metrics() -> list[bytes]:
    lines = [
        {"step": 1, "split": "train", "data_order": "6f", "loss": 2.5, "total_tokens": 9, "time/step": 0.5},
        {"step": 2, "split": "train", "loss": "nan", "total_flops": 1e9, "seconds_per_step": 0.1, "time/data": 1.0},
        {"step": 2, "split": "validation", "nll": 2.0, "bits_per_byte": 1.0, "unigram_bits_per_byte": 3.0},
        {"time": "2026-01-01T00:00:00Z", "kind": "slow", "step": 2, "stack": ["x"]},
    ]
    return ["\n".join(map(json.dumps, lines)).encode(), *(json.dumps(line).encode() for line in lines[1:3])]


def _read_facts(name: str) -> Callable[[pathlib.Path, bytes], object]:
    """Reads what a run is where the file of the given name is the data."""

    def read(folder: pathlib.Path, data: bytes) -> None:
        from lm.evaluation import comparison
        from lm.training import timeline, workdir

        (folder / name).write_bytes(data)
        facts = comparison.load_facts(folder)
        history = comparison.History("x", [], [])
        assert comparison.write_table([history], [facts]).count("\n") == 3
        if starts := workdir.read_starts(folder):
            assert timeline.age(starts) >= 0

    return read


@functools.cache
def _batches():
    from lm.data import DataConfig, tokenizers, train_batches
    from lm.objectives import Causal

    folder = pathlib.Path(tempfile.mkdtemp())
    (folder / "a.txt").write_text("the quick brown fox\n" * 5)
    data = DataConfig(
        source=f"{folder}/a.txt", tokenizer=tokenizers.Bytes(), sequence_length=8, validation_fraction=0, prefetch=0
    )
    return train_batches(data, Causal(), tokenizers.Bytes().build(None), 2)


def _read_saved(folder: pathlib.Path, data: bytes) -> None:
    """Goes on from what a checkpoint says of the data, as the loop and lm.replay do."""
    from lm.config import UserError
    from lm.training.health import read_saved

    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        raise UserError("Orbax finds JSON that is none, and the loop takes the checkpoint before it") from None
    state, counters = read_saved(found)
    assert counters.seen_tokens >= 0
    batches = _batches()
    batches.set_state(state)
    next(batches)
    assert batches.get_state()["batches"] == state["batches"] + 1


def _saved() -> list[bytes]:
    from lm.training.health import Counters

    batches = _batches()
    next(batches)
    return [json.dumps({"batches": batches.get_state(), "counters": dataclasses.asdict(Counters())}).encode()]


def _read_roll_backs(folder: pathlib.Path, data: bytes) -> None:
    from lm.training.order import Detours

    (folder / "rollbacks.json").write_bytes(data)
    assert Detours(folder).batch_number(9) >= 9


def _read_manifest(folder: pathlib.Path, data: bytes) -> None:
    from lm.config import UserError
    from lm.training import manifests

    (folder / "a").write_bytes(b"a")
    (folder / manifests.MANIFEST).write_bytes(data)
    if damage := manifests.find_damage(folder):
        raise UserError(damage)
    manifests.read_manifest(folder)


def _manifests() -> list[bytes]:
    from lm.training import manifests

    with tempfile.TemporaryDirectory() as made:
        folder = pathlib.Path(made)
        (folder / "a").write_bytes(b"a")
        manifests.write_manifest(folder, {"step": 1, "metrics": {"nll": 2.0}})
        sound = (folder / manifests.MANIFEST).read_bytes()
    outside = json.loads(sound) | {"files": {f"../{CANARY}": [19, "0"]}}
    return [sound, json.dumps(outside).encode()]


TARGETS = {
    "text": Target(_texts("a.txt"), lambda: [b"one\ntwo \xc3\xa4\n", b"\xef\xbb\xbfx"]),
    "text_gz": Target(_texts("a.txt.gz"), lambda: [_gz(b"one\ntwo"), _gz(b"a") + _gz(b"b")]),
    "text_zst": Target(_texts("a.txt.zst"), lambda: [_zst(b"one\ntwo"), _zst(b"a") + _zst(b"b")]),
    "jsonl": Target(_texts("a.jsonl"), lambda: [_jsonl(), b'{"text": "a"}']),
    "jsonl_gz": Target(_texts("a.jsonl.gz"), lambda: [_gz(_jsonl())]),
    "parquet": Target(_texts("a.parquet"), _parquet),
    "array_record": Target(_texts("a.array_record"), _array_record),
    "array_record_jsonl": Target(_texts("a.jsonl.array_record"), _array_record),
    "tokenized_index": Target(_read_tokenized("tokenized.json"), lambda: [_tokenized_files()["tokenized.json"]]),
    "tokenized_offsets": Target(
        _read_tokenized("00000.offsets.npy"), lambda: [_tokenized_files()["00000.offsets.npy"]]
    ),
    "tokenized_tokens": Target(_read_tokenized("00000.tokens.npy"), lambda: [_tokenized_files()["00000.tokens.npy"]]),
    "tokenized_ids": Target(_read_tokenized("00000.ids.npy"), lambda: [_tokenized_files()["00000.ids.npy"]]),
    "vocabulary": Target(_read_tokenizer("vocabulary.json"), _descriptions),
    "sentencepiece": Target(_read_tokenizer("sentencepiece.model", _descriptions()[1]), lambda: list(_sentencepiece())),
    "tokenizer_json": Target(_read_hugging_face, lambda: list(_tokenizer_json())),
    "tokenizer_json_saved": Target(
        _read_tokenizer("tokenizer.json", _descriptions()[2]), lambda: list(_tokenizer_json())
    ),
    "config": Target(_read_config, _configs),
    "overrides": Target(_read_overrides, _overrides),
    "record": Target(_read_record, _records),
    "metrics": Target(_read_metrics, _metrics),
    "facts_config": Target(_read_facts("config.json"), _configs),
    "facts_record": Target(_read_facts("run.json"), _records),
    "checkpoint_data": Target(_read_saved, _saved),
    "checkpoint_manifest": Target(_read_manifest, _manifests),
    "roll_backs": Target(_read_roll_backs, lambda: [b'[{"after": 1, "batches": 3, "spike": 4}]', b"[]"]),
    "safetensors": Target(_read_safetensors, lambda: list(_safetensors())),
    "safetensors_index": Target(_read_index, _indexes),
    "interop_config": Target(_read_interop, _interop),
}


# --- the law ----------------------------------------------------------------------------------------------------------


class _Watch:
    """What Python's audit events say was done while a target read."""

    def __init__(self) -> None:
        self.on = False
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple) -> None:
        if self.on and (event in FORBIDDEN or (event == "open" and CANARY in str(arguments[0]))):
            self.seen.append(f"{event}{arguments}")


@functools.cache
def _watch() -> _Watch:
    return _Watch()


def attempt(target: Target, data: bytes, around: pathlib.Path) -> bool:
    """Lets a target read the data in a fresh folder below `around`; returns whether it was accepted.

    Raises:
      BrokenLawError: it did something forbidden, or its error is no sentence.
      Exception: it raised another error than UserError.
    """
    # Here as in the targets: `atheris` sees only what is imported after it.
    from lm.config import UserError

    watch = _watch()
    (around / CANARY).write_text('{"text": "outside"}')
    with tempfile.TemporaryDirectory(dir=around) as folder:
        watch.seen.clear()
        watch.on = True
        try:
            target.read(pathlib.Path(folder), data)
        except UserError as error:
            sentence = str(error).strip()
            if len(sentence) < 10 or "Traceback" in sentence or "outside" in sentence:
                raise BrokenLawError(f"no sentence for a user: {sentence!r}") from error
            return False
        finally:
            watch.on = False
            if watch.seen:
                raise BrokenLawError(f"forbidden: {watch.seen[0]}")
    return True


# --- by hand ----------------------------------------------------------------------------------------------------------

_TARGET = flags.DEFINE_enum("target", None, sorted(TARGETS), "What is to read.")
_RUNS = flags.DEFINE_integer("runs", 10_000, "How many inputs to try.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the mutations.")


def _fuzz_by_coverage(target: Target, around: pathlib.Path) -> None:
    import atheris

    with atheris.instrument_imports(include=["lm"]):
        for seed in target.seeds():
            attempt(target, seed, around)
    corpus = around / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(target.seeds()):
        (corpus / str(number)).write_bytes(seed)

    def mutator(data: bytes, max_size: int, seed: int) -> bytes:
        source = random.Random(seed)
        changed = mutate(data, source) if source.random() < 0.5 else atheris.Mutate(data, max_size)
        return changed[:max_size]

    arguments = [sys.argv[0], f"-runs={_RUNS.value}", f"-seed={_SEED.value + 1}", "-max_len=262144", str(corpus)]
    atheris.Setup(arguments, lambda data: attempt(target, data, around), custom_mutator=mutator)
    atheris.Fuzz()


def main(_: list[str]) -> None:
    """Runs one target."""
    target = TARGETS[_TARGET.value]
    with tempfile.TemporaryDirectory() as made:
        around = pathlib.Path(made)
        try:
            import atheris  # noqa: F401
        except ImportError:
            print("atheris is not installed (extra `fuzz`): random mutations", file=sys.stderr)
        else:
            return _fuzz_by_coverage(target, around)
        accepted = 0
        for run in range(_RUNS.value):
            source = random.Random(f"{_SEED.value} {run}")
            data = mutate(source.choice(target.seeds()), source)
            try:
                accepted += attempt(target, data, around)
            except BaseException:
                print(f"run {run} with --seed={_SEED.value}: {data[:300]!r}", file=sys.stderr)
                raise
        print(f"{_TARGET.value}: {_RUNS.value} inputs, {accepted} accepted, the others refused with a sentence")
    return None


if __name__ == "__main__":
    flags.mark_flag_as_required("target")
    app.run(main)
