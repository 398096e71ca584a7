"""The history of a run: a resumed run's file is that of an unbroken one; event files can be read."""

import json
import math
import resource

import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from lm.config import UserError
from lm.experiment import LoggingConfig
from lm.training.logging import MetricsWriter, Progress, _duration, read_metrics


def _write(workdir, first, steps, config=None):
    writer = MetricsWriter(workdir, config or LoggingConfig(tensorboard=False), first)
    for step in steps:
        writer.write(step, "train", {"loss": 1.0 / step}, data_order=f"{step:x}")
    writer.close()


def test_lines_after_the_restored_step_are_taken_back(tmp_path):
    _write(tmp_path, 0, range(1, 8))
    _write(tmp_path, 4, range(5, 10))
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 10))


def test_a_line_cut_short_by_a_kill_is_passed_over(tmp_path):
    _write(tmp_path, 0, range(1, 4))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "spl')
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    _write(tmp_path, 3, [4])
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_damaged_lines_are_passed_over_and_told(tmp_path, caplog):
    _write(tmp_path, 0, [1, 2])
    damaged = [b"\0\0\0\n", b"\xff\n", b'{"step": 3}\n', b'{"step": true, "split": "train"}\n', b"[]\n"]
    damaged += [b'{"step": 3, "split": "train", "loss": "x"}\n', b'{"step": 3, "split": "train", "loss": [1]}\n']
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.writelines(damaged)
    _write(tmp_path, 2, [3])
    assert "metrics.jsonl: 7 damaged line(s) passed over: 3, 4, 5, 6, 7, ..." in caplog.text
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_what_is_not_finite_stays_json(tmp_path):
    writer = MetricsWriter(tmp_path, LoggingConfig(tensorboard=False), 0)
    writer.write(1, "train", {"loss": math.nan, "gradient_norm": math.inf})
    writer.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: 1 / 0)
    assert (line["loss"], line["gradient_norm"]) == ("nan", "inf")


def test_event_files_hold_the_same_figures(tmp_path):
    _write(tmp_path, 0, [1, 2], LoggingConfig(tensorboard=True))
    (file,) = (tmp_path / "tensorboard").iterdir()
    found = {
        (event.step, value.tag): value.tensor.float_val[0] if value.HasField("tensor") else value.simple_value
        for event in EventFileLoader(str(file)).Load()
        for value in event.summary.value
    }
    assert found == {(1, "train/loss"): 1.0, (2, "train/loss"): 0.5}


def test_progress_lines(capsys):
    progress = Progress(LoggingConfig(progress="lines"), 0, 2)
    progress.update(1, 5.0, math.nan)
    progress.update(2, 4.0, 1234.0)
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert "step 1/2  loss 5.0000" in lines[0]
    assert "nan" not in lines[0]
    assert "step 2/2  loss 4.0000  1,234 tokens/s  00:00:00 left" in lines[-1]


def test_time_left_does_not_wrap_after_a_day():
    assert _duration(139 * 3600 + 62) == "139:01:02"


# TensorBoard's writer says its end in a thread of its own.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_lines_that_a_full_disk_does_not_take_wait_for_the_next_try(tmp_path, caplog):
    writer = MetricsWriter(tmp_path, LoggingConfig(tensorboard=True), 0)
    writer.write(1, "train", {"loss": 1.0})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (70, before[1]))
    try:
        writer.write(2, "train", {"loss": 2.0})
        writer._events._writer._async_writer._worker.join(20)
        writer.write(3, "train", {"loss": 3.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caplog.text.count("metrics.jsonl cannot be written") == 1
    assert caplog.text.count("tensorboard/ cannot be written") == 1
    writer.write(4, "train", {"loss": 4.0})
    writer.close()
    assert [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1.0, 2.0, 3.0, 4.0]


def test_lines_that_a_full_disk_never_takes_are_counted(tmp_path, caplog):
    writer = MetricsWriter(tmp_path, LoggingConfig(tensorboard=False), 0)
    writer.write(1, "train", {"loss": 1.0})
    writer.write(1, "validation", {"nll": 1.0})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, before[1]))
    try:
        writer.take_back(1, "validation")
        writer.write(1, "validation", {"nll": 2.0})
        writer.write(2, "train", {"loss": 2.0})
        writer.close()
        writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "the old validation line of step 1 could not be taken back (File too large)" in caplog.text
    assert caplog.text.count("its last 2 line(s) are lost (File too large)") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert [line["split"] for line in read_metrics(tmp_path / "metrics.jsonl")] == ["train", "validation"]


def test_a_file_that_cannot_be_written_is_named_at_the_start(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be written \(Is a directory\)"):
        MetricsWriter(tmp_path, LoggingConfig(tensorboard=False), 0)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_process_that_is_not_the_first_writes_and_says_nothing(tmp_path, capfd):
    writer = MetricsWriter(None, LoggingConfig(), 0)
    writer.write(1, "train", {"loss": 1.0})
    writer.take_back(1, "train")
    writer.close()
    progress = Progress(None, 0, 1)
    progress.update(1, 1.0, 1.0)
    progress.say("done")
    progress.close()
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr().err == ""
