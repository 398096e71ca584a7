"""What the documents say is held by a test is held by one that exists, and their commands can be given."""

import ast
import pathlib
import re
import shlex

import pytest

from lm import config

ROOT = pathlib.Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
# `tests/room/test_file.py::test_name[case]`, `tests/room/test_file.py`, `tests/room` and `python -m tests.program`
NAMED = re.compile(r"`(tests/[\w./-]+)(?:::(\w+)(?:\[[^\]]*\])?)?`|`python -m (tests[\w.]+)")
# Issue 5 by its sections: what docs/reliability.md must have a promise for, by a word of the test or the program.
SUBJECTS = (
    *("test_soak", "tests.soak", "test_checkpoints", "test_a_full_disk", "test_two_runs_in_one_folder"),
    *("test_launch", "test_diagnosis", "test_spikes", "test_a_step_is_computed_twice", "test_replay", "test_watchdog"),
    *("test_timeline", "test_artefacts", "test_fuzz", "tests.fuzz"),
)


def _tests(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_test_that_a_document_names_exists(document):
    for file, name, program in NAMED.findall(document.read_text(encoding="utf-8")):
        path = ROOT / (file or program.replace(".", "/") + ".py")
        if program and not path.exists():
            path = path.with_suffix("") / "__main__.py"
        assert path.exists(), f"{document.name} names {file or program}"
        assert not name or name in _tests(path), f"{document.name} names {file}::{name}"


def _commands(text):
    """Yields the words of each command for a program of ours, transcripts with a prompt left out."""
    found = []
    for fenced, indented in re.findall(r"^```\w*\n(.*?)^```|((?:^ {4}.*\n)+)", text, flags=re.M | re.S):
        found += (fenced or indented).replace("\\\n", " ").splitlines()
    found += re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    for line in found:
        if not line.startswith("$"):
            for command in re.findall(r"python -m ((?:lm|benchmarks)\.[^;#\[|>]*)", line):
                # One that is quoted whole ends with the quote.
                yield shlex.split(command.rstrip('"') if command.count('"') % 2 else command)


def _flags(path):
    """Returns the names that a program's file defines, and those of its start."""
    found = re.findall(r'DEFINE_\w+\(\s*"(\w+)"', path.read_text(encoding="utf-8"))
    if "define_start()" in path.read_text(encoding="utf-8"):
        found += ["coordinator", "num_processes", "process_id", "join_timeout"]
    return {"help", "config", *found, *(f"no{name}" for name in found)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_of_a_document_can_be_given(document):
    for program, *words in _commands(document.read_text(encoding="utf-8")):
        path = ROOT / (program.replace(".", "/") + ".py")
        assert path.exists(), f"{document.name} names {program}"
        given = [word.removeprefix("--").partition("=") for word in words if word.startswith("--")]
        names = {name for name, _, _ in given if not name.startswith("config.")}
        assert names <= _flags(path), f"{document.name}: {program} has no {names - _flags(path)}"
        file = next((value for name, _, value in given if name == "config"), "")
        if (ROOT / file.partition(":")[0]).is_file() and "$" not in file:
            overrides = {name.removeprefix("config."): value for name, _, value in given if "config." in name}
            problems = config.override(config.load(file), overrides).problems()
            # The text is the reader's.
            assert [line for line in problems if "no such file" not in line] == [], words


def test_every_promise_names_what_holds_it():
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("|")]
    promises = [row for row in rows if len(row) == 2 and not re.match(r"\s*(promise\b|---)", row[0])]
    assert len(promises) > 20
    for promise, held in promises:
        assert NAMED.search(held), promise
        assert "..." not in held, promise
    together = " ".join(held for _, held in promises)
    assert [subject for subject in SUBJECTS if subject not in together] == []
