"""What a user can get wrong ends in a clear sentence and exit status 2, before anything is written."""

import gzip
import json
import os
import shutil
import sys

import pytest
from absl import flags as absl_flags
from absl.testing import flagsaver

from lm import flags
from lm import train as train_program
from lm.data import prefetching  # noqa: F401 Grain defines flags when it is imported, which flagsaver would take back
from tests.system.runs import run, tiny_flags, write_corpus

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("text"), 12)


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs lm.train in this process; returns (exit status, stderr)."""

    def run(*argv):
        # Alone: jax looks for others only before the first use of a device, which an earlier test made.
        monkeypatch.setattr(sys, "argv", ["lm/train.py", "--num_processes=1", *map(str, argv)])
        if not absl_flags.FLAGS.is_parsed():
            absl_flags.FLAGS(["test"])
        with flagsaver.flagsaver(), pytest.raises(SystemExit) as stopped:
            flags.run(train_program.main, train_program._schema)
        captured = capsys.readouterr()
        return stopped.value.code, captured.err, captured.out

    return run


def _tiny(source, **overrides):
    overrides = {
        "num_steps": 2,
        "batch_size": 8,
        "compilation_cache": "none",
        "optimizer.schedule.warmup_steps": 0,
    } | overrides
    return tiny_flags(source, **overrides)


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--config.model.num_layrs=3", "did you mean num_layers?"),
        ("--config.model.num_layers=three", "'three' is not int"),
        ("--config.objective=Casual", "did you mean Causal?"),
        ("--config.optimizer.schedule.warmup_steps=99", "warmup_steps"),
        ("--config.model.num_kv_heads=3", "num_kv_heads"),
        ("--config.data.sequence_length=4096", "longer than model.max_length"),
        ("--config.num_microbatches=3", "does not divide batch_size"),
        ("--config.loss.chunk=0", "loss.chunk"),
        ("--config.mesh.data=3", "there are 8"),
        ("--config.mesh.tensor=8", "mesh.tensor 8 does not divide the 4 heads"),
        ("--config.data.sequence_length=0", "sequence_length"),
        ("--config.model.vocab_size=100", "smaller than the tokenizer's"),
        ("--config.init_from=/nowhere", "no directory /nowhere"),
        ("--workdr=x", "workdr"),
        ("--config.num_steps", "needs a value"),
        ("config.num_steps=3", "'config.num_steps=3' is not a flag"),
    ],
)
def test_settings(call, source, tmp_path, flag, words):
    code, err, _ = call(*_tiny(source), f"--workdir={tmp_path / 'run'}", flag)
    assert code == 2
    assert words in err
    assert "Traceback" not in err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_every_clash_is_listed_at_once(call, source, tmp_path):
    code, err, _ = call(*_tiny(source), f"--workdir={tmp_path}/run", "--config.batch_size=0", "--config.loss.chunk=0")
    assert code == 2
    assert "config.batch_size" in err
    assert "config.loss.chunk" in err
    assert not (tmp_path / "run").exists()


def test_no_config_and_no_workdir(call, source):
    assert call("--workdir=x")[:2] == (2, "train: give --config=FILE.py, for example --config=configs/quickstart.py\n")
    code, err, _ = call(*_tiny(source))
    assert (code, err) == (2, "train: give --workdir=FOLDER, where the run is kept\n")


@pytest.mark.parametrize("config", [("--config=configs/llama3.py:tiny",), ("--config", "configs/llama3.py:tiny")])
def test_help_lists_every_field(call, config):
    code, _, out = call(*config, "--help")
    assert code == 0
    assert "model.num_layers = 2  [int]" in out
    assert "--workdir" in out


@pytest.mark.parametrize("line", ["from lm.models import Decodr", "import lm.modles", "Experiment()", "x = ("])
def test_a_config_file_that_does_not_import(call, tmp_path, line):
    (tmp_path / "mine.py").write_text(f"{line}\n")
    code, err, _ = call(f"--config={tmp_path}/mine.py", f"--workdir={tmp_path}/run")
    assert code == 2
    assert "mine.py: " in err
    assert "Traceback" not in err


@pytest.mark.parametrize("program", ["evaluate", "generate"])
@pytest.mark.parametrize("flag", ["--config.num_steps=3", "--config=configs/quickstart.py"])
def test_the_config_of_a_trained_run_is_that_of_its_folder(program, flag):
    code, out, err = run(f"lm.{program}", "--workdir=nowhere", flag)
    assert (code, out) == (2, "")
    sentence = f"{flag}: only lm.train and lm.plan take a config; a run's own is read from its folder (--workdir)"
    assert err == f"{program}: {sentence}\n"


ADDRESS = "gs://pail/run"


@pytest.mark.parametrize("path", [ADDRESS, "s3://pail/run", "gs:/pail/run", "", " "])
def test_a_workdir_that_is_no_folder(call, source, tmp_path, monkeypatch, path):
    config = _tiny(os.path.abspath(source))
    monkeypatch.chdir(tmp_path)
    code, err, _ = call(*config, f"--workdir={path}")
    assert code == 2
    there = f"--workdir={path}: an address is no folder; mount" if path.strip() else "give --workdir=FOLDER"
    assert err.startswith(f"train: {there}")
    assert len(err.splitlines()) == 1
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("evaluate", [f"--workdir={ADDRESS}"]),
        ("generate", [f"--workdir={ADDRESS}"]),
        ("replay", [f"--workdir={ADDRESS}", "--step=1"]),
        ("convert", [f"--from={ADDRESS}", "--to=x"]),
        ("convert", ["--from=x", f"--to={ADDRESS}"]),
        ("report", [ADDRESS]),
        ("prepare", [f"--output={ADDRESS}"]),
    ],
)
def test_no_program_takes_an_address_for_a_folder(program, arguments):
    code, out, err = run(f"lm.{program}", *arguments)
    assert (code, out) == (2, "")
    assert f"={ADDRESS}: an address is no folder" in err
    assert len(err.splitlines()) == 1


def _write(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", "no"),
        ("binary.txt", bytes(range(256)) * 20, "binary.txt"),
        ("latin.txt", b"caf\xe9 " * 50, "UTF-8"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', "broken.jsonl:2"),
        ("nofield.jsonl", b'{"words": "a"}\n', "text"),
        ("cut.txt.gz", gzip.compress(b"hello world " * 1000)[:60], "cut.txt.gz"),
    ],
    ids=["empty", "binary", "latin 1", "broken JSON", "no text", "cut"],
)
def test_data(call, tmp_path, name, content, words):
    path = _write(tmp_path / name, content)
    code, err, _ = call(*_tiny(str(path), **{"data.validation_fraction": 0}), f"--workdir={tmp_path / 'run'}")
    assert code == 2, err
    assert words in err
    assert len(err.strip().splitlines()) == 1, err


def test_missing_data(call, tmp_path):
    code, err, _ = call(*_tiny(f"{tmp_path}/none*.txt"), f"--workdir={tmp_path / 'run'}")
    assert code == 2
    assert "none*.txt" in err


def test_vocabulary_larger_than_the_text(call, source, tmp_path):
    flags = _tiny(source, **{"data.tokenizer": "SentencePiece", "data.tokenizer.vocab_size": 30000})
    code, err, _ = call(*flags, f"--workdir={tmp_path / 'run'}", "--config.model.vocab_size=30000")
    assert code == 2, err
    assert "30000" in err
    assert not list((tmp_path / "run").glob("tokenizer/*.model"))


def test_unwritable_workdir(call, source, tmp_path):
    _write(tmp_path / "file", b"")
    code, err, _ = call(*_tiny(source), f"--workdir={tmp_path}/file/run")
    assert code == 2
    assert "cannot write" in err


def test_a_file_for_a_folder_and_a_folder_for_a_file(call, source, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    _write(run / "checkpoints", b"")
    code, err, _ = call(*_tiny(source), f"--workdir={run}")
    said = "is no folder, so no checkpoint could be saved; move it away"
    assert (code, err) == (2, f"train: {run}/checkpoints {said}\n")
    assert [path.name for path in run.iterdir()] == ["checkpoints"]
    (run / "checkpoints").unlink()
    (run / "metrics.jsonl").mkdir()
    code, err, _ = call(*_tiny(source), f"--workdir={run}")
    said = "cannot be written (Is a directory); move it away, or mend the disk"
    assert (code, err) == (2, f"train: {run}/metrics.jsonl {said}\n")


def test_another_config_is_refused_and_forced(call, source, tmp_path):
    workdir = f"--workdir={tmp_path / 'run'}"
    assert call(*_tiny(source), workdir)[0] == 0
    code, err, _ = call(*_tiny(source, **{"optimizer.learning_rate": 0.5}), workdir)
    assert code == 2
    assert "config.optimizer.learning_rate: 0.01 -> 0.5" in err
    assert json.loads((tmp_path / "run" / "config.json").read_text())["optimizer"]["learning_rate"] == 0.01
    assert call(*_tiny(source, **{"optimizer.learning_rate": 0.5}), workdir, "--force_config")[0] == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["optimizer"]["learning_rate"] == 0.5
    # The saved config repeats the run.
    again = f"--config={tmp_path / 'run' / 'config.json'}"
    assert call(again, f"--workdir={tmp_path / 'again'}")[0] == 0


def test_two_runs_in_one_folder(call, source, tmp_path):
    import fcntl

    workdir = tmp_path / "run"
    assert call(*_tiny(source), f"--workdir={workdir}")[0] == 0
    with open(workdir / "lock.0", "a+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        code, err, _ = call(*_tiny(source), f"--workdir={workdir}")
    assert code == 2
    assert str(os.getpid()) in err


def test_a_corpus_smaller_than_a_batch_is_repeated(call, tmp_path):
    for number in range(6):
        _write(tmp_path / f"{number}.txt", b"To be, or not to be, that is the question. " * 2)
    code, err, _ = call(*_tiny(f"{tmp_path}/*.txt", batch_size=16), f"--workdir={tmp_path / 'run'}")
    assert code == 0, err


def test_documents_longer_than_the_sequence_are_cut_into_segments(call, tmp_path):
    for number in range(4):
        _write(tmp_path / f"{number}.txt", b"a long line without an end " * 400)
    code, err, _ = call(*_tiny(f"{tmp_path}/*.txt"), f"--workdir={tmp_path / 'run'}")
    assert code == 0, err


def test_the_tokenizer_of_a_run_cannot_be_exchanged(call, source, tmp_path):
    workdir = f"--workdir={tmp_path / 'run'}"
    assert call(*_tiny(source), workdir)[0] == 0
    flags = _tiny(source, **{"data.tokenizer": "Bytes", "data.tokenizer.num_sentinels": 7})
    code, err, _ = call(*flags, workdir, "--force_config")
    assert code == 2
    assert "cannot be exchanged" in err


def test_init_from_starts_from_the_weights_of_another_run(call, source, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert call(*_tiny(source, num_steps=5), f"--workdir={first}")[0] == 0
    flags = _tiny(source, num_steps=1, init_from=first)
    assert call(*flags, f"--workdir={second}")[0] == 0

    def losses(folder):
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return [line["loss"] for line in lines if line["split"] == "train"]

    assert losses(second)[0] < losses(first)[0] - 0.3
    # The second run goes on without the first.
    shutil.rmtree(first)
    code, err, _ = call(*flags, f"--workdir={second}")
    assert code == 0, err
