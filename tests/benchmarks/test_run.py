"""The benchmark suite runs to its end, its contenders do the same work, and what cannot run is said in a sentence."""

import dataclasses
import importlib.util
import json
import pathlib
import subprocess
import sys
import time

import pytest

from benchmarks import measuring, memory, ours, subjects
from benchmarks.measuring import Comparison, Contender
from benchmarks.results import Record, Row, Sample, lines
from benchmarks.rows import Rows
from lm.models import accounting
from tests.benchmarks import contenders

TINY = dataclasses.replace(
    subjects.CPU["train-tiny"].model, vocab_size=64, num_layers=1, model_dim=32, num_heads=2, mlp_dim=32, max_length=32
)
HAS_PEERS = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


def _script(path, line):
    """Writes a program that stands for another Python."""
    path.write_text(f"#!/bin/sh\n{line}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def _run(*flags):
    command = [sys.executable, "-m", "benchmarks.run", *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_contenders_take_turns_in_their_own_python_and_a_broken_one_is_left_out(tmp_path):
    said = []
    other = _script(tmp_path / "other", f'WHO=other exec {sys.executable} "$@"')
    some = (
        Contender("1", contenders.counts, (1,)),
        Contender("2", contenders.counts, (2,), other),
        Contender("broken", contenders.fails, ()),
        Contender("absent", contenders.counts, (3,), _script(tmp_path / "absent", "exit 3")),
    )
    rows = Comparison("s", "float32", some, {"step": (10, 1e3)}, copies=True).measure(2, said.append)
    # What is copied to measure the machine comes after what the work needed was told.
    assert [(row.bandwidth, row.facts["copies"]) for row in rows] == [(1e9, 0), (1e9, 0)]
    assert [(row.who, row.first_result, row.facts["total"], len(row.samples)) for row in rows] == [
        ("1", 1.0, 1, 2),
        ("2", 2.0, 2, 2),
    ]
    assert [row.facts["python"] for row in rows] == [None, "other"]
    assert len(said) == 2
    assert "broken: ValueError: no such kernel" in said[0]
    assert "absent: its process ended with status 3" in said[1]


def test_what_finds_no_memory_beside_the_others_runs_alone_after_them(tmp_path):
    said, kept = [], []
    some = (
        Contender("1", contenders.counts, (1,)),
        Contender("large", contenders.fills_up, (tmp_path,)),
        Contender("late", contenders.fails_later, ()),
        Contender("gone", contenders.leaves, ()),
        Contender("2", contenders.sleeps, (0.05,)),
    )
    rows = Comparison("s", "float32", some, {"step": (10, 1e3)}).measure(2, said.append, kept.append)
    assert [(row.who, len(row.samples)) for row in rows] == [("1", 2), ("2", 2), ("large", 2)]
    assert [[row.who for row in found] for found in kept] == [["1", "2"]] * 2 + [["1", "2", "large"]] * 2
    assert "alone, after the others: large: RuntimeError: RESOURCE_EXHAUSTED: Out of memory while" in said[0]
    assert "left out: late: ValueError: went wrong" in said[1]
    assert "left out: gone: its process ended with status 3" in said[2]


def test_nothing_is_waited_for_when_the_time_is_up_and_finished_rounds_are_kept():
    said, kept = [], []
    some = (Contender("1", contenders.sleeps, (0.05,)), Contender("2", contenders.sleeps, (60,)))
    started = time.monotonic()
    rows = Comparison("s", "float32", some, {"step": (10, 1e3)}).measure(9, said.append, kept.append, started + 3)
    assert time.monotonic() - started < 30
    assert "2: no answer before the time was up" in said[0]
    assert "the time is up after 1 of 9 rounds" in said[1]
    assert kept == [rows]
    assert [(row.who, len(row.samples)) for row in rows] == [("1", 1)]
    assert rows[0].facts["resident_bytes"] > 0


def test_a_program_that_is_killed_leaves_a_whole_file_of_what_it_had(tmp_path, monkeypatch):
    record = Record({"started": "now"}, tmp_path / "found.json")
    record.keep("a", [1, 2])
    monkeypatch.setattr(pathlib.Path, "replace", lambda self, target: None)  # killed before
    record.keep("b", [3])
    assert json.loads((tmp_path / "found.json").read_text()) == {"started": "now", "subjects": {"a": [1, 2]}}


def test_faster_is_theirs_over_ours_round_by_round():
    mine = Row("s", "float32", "step", "lm", 1.0, None, [Sample(1.0, 2.0), Sample(4.0, 4.0)], 100, 1e9, 1e9)
    peer = dataclasses.replace(mine, who="torch", samples=[Sample(3.0, 2.0), Sample(12.0, 4.0)])
    assert mine.speedup_over(peer) == (3.0, 1.0)
    # One that ran alone had other rounds, and another number of them.
    alone = dataclasses.replace(peer, samples=[Sample(10.0, 4.0)] * 3, turns=1)
    assert mine.speedup_over(alone) == (4.0, 4.0 / 3.0)
    ours_line, theirs_line = lines([mine, peer])
    assert theirs_line.split()[-2:] == ["3.00", "1.00"]
    assert "lm" in ours_line.split()
    # Where ours was left out there is nothing to compare with.
    assert lines([peer])[0].split()[-1] == "1.0"


def test_decoding_is_measured_by_the_bytes_that_it_cannot_but_read():
    subject = subjects.Generation(TINY, Rows(2, 8, 64), 4)
    parameters = TINY.build().parameters()
    weights, cache = accounting.num_active_parameters(parameters), 2 * 32
    assert subject.bytes_read("bfloat16") == 4 * 2 * (weights + 2 * (8 + 2) * cache)
    assert subject.bytes_read("float32") == 2 * subject.bytes_read("bfloat16")
    whole, prompt = (
        Row("s", "float32", part, "lm", 1.0, None, [Sample(clock, clock)], 8, None, bandwidth=1e9)
        for part, clock in (("whole", 3.0), ("prompt", 1.0))
    )
    decode = subjects.add_decoding([whole, prompt], 4, 2, 1e9)[-1]
    assert "0.5B   50.0%" in lines([decode])[0]


@pytest.mark.system
def test_a_whole_comparison_agrees_on_losses_and_tokens(tmp_path):
    """Same weights and rows: the first losses and the greedy tokens are those of `transformers`."""
    if not HAS_PEERS:
        pytest.skip("torch and transformers are not installed")
    train = subjects.TrainStep(TINY, Rows(2, 16, 64)).compare(
        "t", "float32", {"transformers": sys.executable}, tmp_path / "a"
    )
    generate = subjects.Generation(TINY, Rows(2, 16, 64), 4).compare(
        "g", "float32", {"transformers": sys.executable}, tmp_path / "b"
    )
    eager = dataclasses.replace(train, contenders=train.contenders[:2])
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    said = []
    mine, theirs = eager.measure(1, said.append)
    assert not said
    assert mine.first_result == pytest.approx(theirs.first_result, rel=1e-5)
    rows = subjects.add_decoding(generate.measure(1, said.append), 4, 2, 1e6)
    assert {(row.who, row.part) for row in rows} == {
        (who, part) for who in ("lm", "transformers") for part in ("prompt", "whole", "decode")
    }
    assert all(row.bandwidth > 0 for row in rows)
    tokens = {row.who: row.facts["tokens"] for row in rows}
    assert tokens["lm"] == tokens["transformers"]


def test_maxtext_runs_what_it_has_an_equal_of_and_nothing_else(tmp_path):
    peers = {"maxtext": "other"}
    found = {name: subjects.CPU[name].compare(name, "float32", peers, tmp_path).contenders for name in subjects.CPU}
    assert {name for name, each in found.items() if "maxtext" in [c.name for c in each]} == {"train-llama-tiny"}
    assert [contender.python for contender in found["train-llama-tiny"]] == [sys.executable, "other"]


@pytest.mark.system
def test_program_writes_every_sample(tmp_path):
    output = tmp_path / "found.json"
    maxtext = _script(tmp_path / "python", "echo 0.2.5 0.11.2")
    peers = ("--against=maxtext", f"--maxtext_python={maxtext}")
    done = _run("--suite=cpu", *peers, "--subjects=data", "--rounds=1", f"--output={output}")
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    assert found["subjects"]["data"]["tokens_per_second"] > 0
    assert "jax" in found["machine"]
    assert (found["machine"]["maxtext"], found["machine"]["maxtext's jax"]) == ("0.2.5", "0.11.2")


@pytest.mark.system
@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--subjects=trane", "'trane' begins no subject"),
        ("--subjects=,", "'' begins no subject"),
        ("--maxtext_python=python3.12", "--maxtext_python is read with maxtext in --against only"),
        ("--against=mxnet", "'mxnet' is no peer"),
        ("--dtypes=float8", "'float8' is neither"),
        (
            "--against=maxtext --maxtext_python=no-such-python",
            "no-such-python has no MaxText; docs/performance.md",
        ),
        ("--against=maxtext --suite=gpu", "maxtext is compared on CPUs"),
        ("--against=maxtext --maxtext_python=/bin/true", "/bin/true has no MaxText"),
        ("--against= --output=no-such-folder/found.json", "no-such-folder/found.json cannot be written"),
        ("--against= --dtypes=", "--dtypes is empty"),
        ("--against= --minutes=nan", "--minutes: nan is no time"),
    ],
)
def test_wrong_flags_end_in_a_sentence(flag, sentence):
    # Without peers, which may not be installed; the last of equal flags counts.
    done = _run("--against=", *flag.split())
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_gpu_is_said_in_a_sentence(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    done = _run("--suite=gpu", "--against=")
    assert done.returncode == 2
    assert "needs a GPU that jax can use; jax sees only cpu" in done.stderr


def test_planned_bytes_show_what_a_chunked_loss_saves():
    model = dataclasses.replace(TINY, vocab_size=2048)

    def temporary(chunk):
        return memory.planned_bytes(ours.make_step(model, Rows(4, 32, 2048), chunk).compiled)["temporary_bytes"]

    assert temporary(8) < temporary(None)
    assert measuring.peak_resident_bytes() > 0
