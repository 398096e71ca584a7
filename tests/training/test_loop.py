"""The loop as a whole: what a second start, data that end or fail, and other weights leave behind."""

import builtins
import contextlib
import dataclasses
import errno
import io
import json
import os
import pathlib
import resource
import shutil
import signal
import threading
import time

import jax
import pytest

from configs import roberta
from lm.config import ConfigError, UserError
from lm.data import DataConfig, DataError, SentencePiece
from lm.evaluation import heldout
from lm.evaluation.heldout import make_evaluate
from lm.experiment import CheckpointConfig, EvaluationConfig
from lm.objectives import ROBERTA
from lm.training import checkpoints as checkpoints_module
from lm.training.advance import Advance
from lm.training.checkpoints import CheckpointError, Checkpoints
from lm.training.events import Events, read_events
from lm.training.logging import read_metrics
from lm.training.loop import train
from lm.training.manifests import read_manifest, write_manifest
from lm.training.timeline import Timeline
from lm.training.workdir import WorkdirError
from tests.training.experiments import tiny


def _lines(workdir, split):
    return [line for line in read_metrics(workdir / "metrics.jsonl") if line["split"] == split]


def _write(folder, number=12, text="to be or not to be, that is the question\n"):
    folder.mkdir(exist_ok=True)
    for i in range(number):
        (folder / f"{i:02}.txt").write_text(f"{i} {text}")
    return f"{folder}/*.txt"


def test_a_finished_run_started_again_adds_nothing(tmp_path, corpus, capfd):
    for _ in range(2):
        assert train(tiny(corpus, num_steps=4), str(tmp_path), make_evaluate)
    assert [line["step"] for line in _lines(tmp_path, "train")] == [1, 2, 3, 4]
    assert [line["step"] for line in _lines(tmp_path, "validation")] == [4]
    assert "nan" not in capfd.readouterr().err


def test_every_step_is_timed_by_its_own_end(tmp_path, corpus, monkeypatch):
    """A step is noted when the next one was dispatched: on a CPU, long after it was over; the last one at once."""
    advance = Advance.__call__

    def take_long(self, state, batch, step):
        result = jax.block_until_ready(advance(self, state, batch, step))
        time.sleep(0.05)
        return result

    monkeypatch.setattr(Advance, "__call__", take_long)
    assert train(tiny(corpus, num_steps=5, checkpoint=CheckpointConfig(every=2)), str(tmp_path), make_evaluate)
    seconds = [line["seconds_per_step"] for line in _lines(tmp_path, "train")[1:]]
    assert len(seconds) == 4
    assert min(seconds) >= 0.05


def test_data_that_end_where_an_evaluation_is_due_are_still_scored_whole(tmp_path, monkeypatch):
    phases, phase = [], Timeline.phase
    monkeypatch.setattr(Timeline, "phase", lambda timeline, name: phases.append(name) or phase(timeline, name))
    source = _write(tmp_path / "text")
    data = dataclasses.replace(tiny(source).data, num_epochs=1, window=4)
    run = tiny(source, data=data, num_steps=1000, batch_size=8, evaluation=EvaluationConfig(every=1, num_batches=1))
    assert train(run, str(tmp_path / "run"), make_evaluate)
    ends = _lines(tmp_path / "run", "validation")[-1]
    assert [line["step"] for line in _lines(tmp_path / "run", "validation")] == list(range(1, ends["step"] + 1))
    assert ends["tokens"] > 8 * 16
    assert [name for name in phases if "evaluate" in name] == ["evaluate"] * ends["step"] + ["evaluate_whole"]


def test_a_run_stopped_by_bad_text_loses_no_step(tmp_path):
    source = _write(tmp_path / "text", 40)
    bad = tmp_path / "text" / "bad.txt"
    bad.write_bytes(b"caf\xe9 " * 40)
    data = dataclasses.replace(tiny(source).data, window=1, prefetch=0, validation_fraction=0.0)
    run = tiny(source, data=data, num_steps=100, checkpoint=CheckpointConfig(every=100))
    with pytest.raises(DataError, match=r"bad\.txt is not valid UTF-8"):
        train(run, str(tmp_path / "run"), make_evaluate)
    checkpoints = Checkpoints(tmp_path / "run", run.checkpoint)
    (step,) = checkpoints.steps()
    checkpoints.close()
    assert [line["step"] for line in _lines(tmp_path / "run", "train")] == list(range(1, step + 1))
    saved = json.loads((tmp_path / "run" / "checkpoints" / str(step) / "data" / "metadata").read_text())
    assert saved["counters"]["seen_tokens"] == _lines(tmp_path / "run", "train")[-1]["total_tokens"]


def test_text_that_changed_is_refused_in_a_sentence(tmp_path):
    source, workdir = _write(tmp_path / "text"), str(tmp_path / "run")
    assert train(tiny(source, num_steps=2), workdir, make_evaluate)
    (tmp_path / "text" / "00.txt").write_text("another text")
    with pytest.raises(WorkdirError, match="the text changed"):
        train(tiny(source, num_steps=2), workdir, make_evaluate)
    assert train(tiny(source, num_steps=2), workdir, make_evaluate, force_config=True)
    _write(tmp_path / "text", 20)
    with pytest.raises(UserError, match="saved with documents"):
        train(tiny(source, num_steps=2), workdir, make_evaluate, force_config=True)


def test_a_start_that_failed_does_not_hold_its_folder(tmp_path, corpus):
    run, workdir = tiny(corpus, num_steps=2), tmp_path / "run"
    large = dataclasses.replace(run.data, tokenizer=SentencePiece(vocab_size=450, num_sentinels=10))
    small = dataclasses.replace(run, data=large, model=dataclasses.replace(run.model, vocab_size=300))
    with pytest.raises(ConfigError, match="smaller than the tokenizer"):
        train(small, str(workdir), make_evaluate)
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"\0" * 100)
    with pytest.raises(DataError, match="binary"):
        train(
            dataclasses.replace(run, data=DataConfig(source=str(bad), sequence_length=16)), str(workdir), make_evaluate
        )
    assert train(run, str(workdir), make_evaluate)
    assert json.loads((workdir / "config.json").read_text())["data"]["source"] == corpus
    assert json.loads((workdir / "tokenizer" / "vocabulary.json").read_text())["kind"] == "bytes"


def test_weights_of_another_tokenizer_are_refused(tmp_path, corpus, trained):
    run = tiny(corpus, num_steps=2, init_from=str(trained))
    assert train(run, str(tmp_path / "same"), make_evaluate)
    other = dataclasses.replace(run.data, tokenizer=SentencePiece(vocab_size=450, num_sentinels=10))
    with pytest.raises(ConfigError, match="another tokenizer"):
        train(dataclasses.replace(run, data=other), str(tmp_path / "other"), make_evaluate)


def test_weights_of_another_kind_of_model_are_refused(tmp_path, corpus, trained):
    run = tiny(corpus, model=roberta.get_model("tiny"), objective=ROBERTA, init_from=str(trained))
    with pytest.raises(ConfigError, match=f"{trained} is a run of Decoder, this is one of Encoder; "):
        train(run, str(tmp_path), make_evaluate)


@pytest.mark.parametrize(
    ("every", "evaluate", "fraction", "words"),
    [
        (2, 2, 0.3, None),
        (4, 2, 0.3, None),
        (2, 3, 0.3, "a multiple of evaluation.every"),
        (2, None, 0.3, "evaluation.every, which is none"),
        (2, 2, 0.0, "validation_fraction is 0"),
    ],
)
def test_keep_best_needs_figures_to_choose_by(corpus, every, evaluate, fraction, words):
    run = tiny(
        corpus,
        checkpoint=CheckpointConfig(every=every, keep_best=1),
        evaluation=EvaluationConfig(every=evaluate),
        data=dataclasses.replace(tiny(corpus).data, validation_fraction=fraction),
    )
    assert run.problems() == [] if words is None else words in "\n".join(run.problems())


def _full_at(monkeypatch, *steps):
    """A disk that is full whenever the checkpoint of one of these steps is to be finished."""

    def write(folder, facts):
        if facts["step"] in steps:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_manifest(folder, facts)

    monkeypatch.setattr(checkpoints_module, "write_manifest", write)


def test_a_full_disk_stops_no_training_and_is_tried_again(tmp_path, corpus, monkeypatch, caplog):
    _full_at(monkeypatch, 2)
    run = tiny(corpus, num_steps=6, checkpoint=CheckpointConfig(every=2, keep_last=5))
    assert train(run, str(tmp_path), make_evaluate)
    assert "checkpoint 2 could not be saved: No space left on device. Training goes on" in caplog.text
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [4, 6]
    assert [line["step"] for line in _lines(tmp_path, "train")] == list(range(1, 7))


def test_a_last_save_that_fails_ends_the_run_in_a_sentence(tmp_path, corpus, monkeypatch):
    _full_at(monkeypatch, 4, 6)
    run = tiny(corpus, num_steps=6, checkpoint=CheckpointConfig(every=2, keep_last=1))
    with pytest.raises(CheckpointError, match=r"step 6 could not be saved in .*: No space left on device; .* step 2\."):
        train(run, str(tmp_path), make_evaluate)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdecimal()] == ["2"]
    monkeypatch.undo()
    assert train(run, str(tmp_path), make_evaluate)
    assert [line["step"] for line in _lines(tmp_path, "train")] == list(range(1, 7))


def test_files_deleted_underneath_are_made_again(tmp_path, corpus):
    def make_deleting_evaluate(assembly):
        evaluate = make_evaluate(assembly)

        def wrapped(params, whole, check):
            if not whole:
                shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
                (tmp_path / "metrics.jsonl").unlink()
            return evaluate(params, whole, check)

        return wrapped

    run = tiny(
        corpus, num_steps=6, checkpoint=CheckpointConfig(every=2), evaluation=EvaluationConfig(every=4, num_batches=1)
    )
    assert train(run, str(tmp_path), make_deleting_evaluate)
    assert (tmp_path / "checkpoints" / "6" / "manifest.json").exists()
    assert [line["step"] for line in _lines(tmp_path, "train")] == [5, 6]
    assert train(run, str(tmp_path), make_evaluate)


def _asked_in_batch(monkeypatch, number):
    """Asks this process to stop in a batch of its evaluations; returns the list to which each batch adds itself."""
    add, batches = heldout._add, []

    def added(total, result):
        add(total, result)
        batches.append(len(batches) + 1)
        if len(batches) == number:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(heldout, "_add", added)
    return batches


def _compared(workdir):
    """The saved steps, and the figures by which each is compared with the others."""
    folders = sorted((workdir / "checkpoints").iterdir())
    return {int(folder.name): read_manifest(folder)["metrics"] for folder in folders}


def test_asked_to_stop_in_an_evaluation_it_saves_and_the_next_start_evaluates(tmp_path, corpus, monkeypatch):
    evaluation = EvaluationConfig(every=2, num_batches=3)
    checkpoint = CheckpointConfig(every=2, keep_last=1, keep_best=1)
    run = tiny(corpus, num_steps=4, evaluation=evaluation, checkpoint=checkpoint)
    batches = _asked_in_batch(monkeypatch, -1)
    assert train(run, str(tmp_path / "whole"), make_evaluate)
    in_all = len(batches)
    batches = _asked_in_batch(monkeypatch, 2)
    assert not train(run, str(tmp_path / "asked"), make_evaluate)
    assert batches == [1, 2]
    assert [line["step"] for line in _lines(tmp_path / "asked", "train")] == [1, 2]
    assert _lines(tmp_path / "asked", "validation") == []
    assert Checkpoints(tmp_path / "asked", run.checkpoint).steps() == [2]
    # In the last evaluation, over the whole split, it is asked again.
    batches = _asked_in_batch(monkeypatch, 4)
    assert not train(run, str(tmp_path / "asked"), make_evaluate)
    assert batches == [1, 2, 3, 4]
    assert [metrics and metrics["nll"] for metrics in _compared(tmp_path / "asked").values()] == [
        _lines(tmp_path / "whole", "validation")[0]["nll"],
        None,
    ]
    # And in its second pass, over the batches by whose figures checkpoints are compared.
    batches = _asked_in_batch(monkeypatch, in_all - 4)
    assert not train(run, str(tmp_path / "asked"), make_evaluate)
    assert _compared(tmp_path / "asked")[4] is None
    batches = _asked_in_batch(monkeypatch, -1)
    assert train(run, str(tmp_path / "asked"), make_evaluate)
    assert len(batches) == in_all - 3
    assert _lines(tmp_path / "asked", "validation") == _lines(tmp_path / "whole", "validation")
    assert _compared(tmp_path / "asked") == _compared(tmp_path / "whole")
    assert list(_compared(tmp_path / "asked")) == [4]


class Killed(BaseException):
    """Caught by nothing, as SIGKILL is."""


def test_killed_between_the_figures_and_the_checkpoint_it_gets_them_at_the_next_start(tmp_path, corpus, monkeypatch):
    evaluation = EvaluationConfig(every=2, num_batches=2)
    checkpoint = CheckpointConfig(every=2, keep_last=2, keep_best=1)
    run = tiny(corpus, num_steps=3, evaluation=evaluation, checkpoint=checkpoint)
    _asked_in_batch(monkeypatch, 1)
    assert not train(run, str(tmp_path), make_evaluate)
    assert _compared(tmp_path) == {2: None}

    def killed(*_):
        raise Killed

    _asked_in_batch(monkeypatch, -1)
    monkeypatch.setattr(checkpoints_module, "add_metrics", killed)
    with pytest.raises(Killed):
        train(run, str(tmp_path), make_evaluate)
    monkeypatch.undo()
    (line,) = _lines(tmp_path, "validation")
    assert _compared(tmp_path) == {2: None}
    assert train(run, str(tmp_path), make_evaluate)
    first, last = _lines(tmp_path, "validation")
    assert (first, last["step"]) == (line, 3)
    assert _compared(tmp_path)[2]["nll"] == first["nll"]


def _turn_read_only(monkeypatch, folder):
    """Makes every change below a folder fail, in files that are open too; what was open for reading stays readable."""
    refusal = OSError(errno.EROFS, os.strerror(errno.EROFS))

    def refusing(function, reads=False):
        def called(path, *args, **kwargs):
            is_inside = isinstance(path, str | os.PathLike) and pathlib.Path(path).is_relative_to(folder)
            mode = args[0] if args else kwargs.get("mode", "r")
            if is_inside and not (reads and set(mode) <= set("rbt")):
                raise refusal
            return function(path, *args, **kwargs)

        return called

    monkeypatch.setattr(io, "open", refusing(io.open, reads=True))
    monkeypatch.setattr(builtins, "open", refusing(builtins.open, reads=True))
    for name in ("mkdir", "rename", "replace", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))
    # No file grows any more.
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


# TensorBoard's writer says its end in a thread of its own.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.usefixtures("capsys")
def test_read_only_in_mid_run_loses_nothing_that_was_saved(tmp_path, corpus, monkeypatch, caplog):
    made = []

    def make_breaking_evaluate(assembly):
        evaluate = make_evaluate(assembly)

        def wrapped(params, whole, check):
            made.append(whole)
            figures = evaluate(params, whole, check)
            if len(made) == 2:
                while not (tmp_path / "checkpoints" / "2" / "manifest.json").exists():
                    time.sleep(0.01)
                _turn_read_only(monkeypatch, tmp_path)
            return figures

        return wrapped

    run = tiny(
        corpus, num_steps=6, checkpoint=CheckpointConfig(every=2), evaluation=EvaluationConfig(every=2, num_batches=1)
    )
    run = dataclasses.replace(run, logging=dataclasses.replace(run.logging, tensorboard=True))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    before_it = {thread.name for thread in threading.enumerate()}
    try:
        with pytest.raises(CheckpointError, match=r"step 6 could not .*: Read-only file system.* is of step 2\."):
            train(run, str(tmp_path), make_breaking_evaluate)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        monkeypatch.undo()
    assert made == [False, False, True]
    # None that would keep the program from its end.
    assert {thread.name for thread in threading.enumerate() if not thread.daemon} <= before_it
    assert "checkpoint 4 could not be saved: Read-only file system" in caplog.text
    assert "metrics.jsonl cannot be written" in caplog.text
    assert [line["step"] for line in _lines(tmp_path, "train")] == [1, 2, 3, 4]
    assert train(run, str(tmp_path), make_evaluate)
    assert [line["step"] for line in _lines(tmp_path, "train")] == list(range(1, 7))
    assert [line["step"] for line in _lines(tmp_path, "validation")] == [2, 4, 6]


def test_events_that_the_disk_does_not_take_wait_for_the_next_try(tmp_path, caplog):
    events = Events(tmp_path / "gone")
    events.write("slow", 1)
    assert "events.jsonl cannot be written (No such file or directory)" in caplog.text
    (tmp_path / "gone").mkdir()
    events.write("slow", 2)
    # A disk that takes the one half of two lines: nothing stands twice, and nothing torn.
    size = (tmp_path / "gone" / "events.jsonl").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 90, before[1]))
    try:
        events.write("slow", 3)
        events.write("slow", 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "gone" / "events.jsonl").stat().st_size == size + 90
    events.write("slow", 5)
    assert [event["step"] for event in read_events(tmp_path / "gone")] == [1, 2, 3, 4, 5]
    assert "damaged" not in caplog.text


def test_events_that_wait_at_the_end_are_tried_once_more_and_those_that_are_lost_are_counted(tmp_path, caplog):
    events = Events(tmp_path / "gone")
    events.close()
    events.write("slow", 1)
    events.write("slow", 2)
    events.close()
    assert "events.jsonl: its last 2 event(s) are lost (No such file or directory)" in caplog.text
    events.write("slow", 3)
    (tmp_path / "gone").mkdir()
    events.close()
    assert [event["step"] for event in read_events(tmp_path / "gone")] == [3]


@pytest.mark.parametrize("end", ["stopped", "broken"])
def test_every_way_out_of_a_run_closes_its_events(tmp_path, corpus, monkeypatch, end):
    opened, closed = [], []
    close, init = Events.close, Events.__init__

    def opening(self, *args):
        init(self, *args)
        opened.append(self)

    def closing(self):
        close(self)
        closed.append(self)

    def make_ending_evaluate(assembly):
        def evaluate(params, whole, check):
            if end == "broken":
                raise RuntimeError("a bug")
            os.kill(os.getpid(), signal.SIGTERM)
            return check() or {}

        return evaluate

    monkeypatch.setattr(Events, "__init__", opening)
    monkeypatch.setattr(Events, "close", closing)
    with pytest.raises(RuntimeError) if end == "broken" else contextlib.nullcontext():
        train(tiny(corpus, num_steps=1), str(tmp_path / "run"), make_ending_evaluate)
    assert len(opened) == 1
    assert closed == opened
